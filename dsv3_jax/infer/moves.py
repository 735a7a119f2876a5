"""What a change of placement costs: experts that GPUs do not hold yet and must fetch.

GPUs and nodes are alike, so a placement may be renumbered: only what lies together matters. numpy
alone. Letters as in `eplb`; P and Q parts (nodes, or GPUs of a node), X rows.
"""

import numpy as np


def moved(previous: np.ndarray, physical_to_logical: np.ndarray, num_gpus: int) -> np.ndarray:
  """How many experts the GPUs of each layer must fetch for the second placement, int64 [L].

  An expert that stays on its GPU costs nothing, whatever slot it has there.
  """
  return (in_place(previous, physical_to_logical, num_gpus) != previous).sum(-1)


def keep(previous: np.ndarray, expert_LI: np.ndarray, nodes: int, gpus: int) -> np.ndarray:
  """The second placement with nodes, GPUs and slots renumbered, so that less has to be fetched.

  Loads are the same, only on other GPUs: each of its GPUs takes the place of that one which holds
  most of what it needs, greedily, nodes first. int64 [L, I].
  """
  layers, slots = expert_LI.shape
  experts = int(max(previous.max(), expert_LI.max())) + 1
  for parts, rows in ((nodes, layers), (gpus // nodes, layers * nodes)):
    old_XPn, new_XPn = (x.reshape(rows, parts, -1) for x in (previous, expert_LI))
    place_XP = _match(_holds(old_XPn, experts) @ _holds(new_XPn, experts).transpose(0, 2, 1))
    expert_LI = np.take_along_axis(new_XPn, place_XP[..., None], 1).reshape(layers, slots)
  return in_place(previous, expert_LI, gpus)


def in_place(previous: np.ndarray, expert_LI: np.ndarray, gpus: int) -> np.ndarray:
  """The second placement with the slots of each GPU in such an order that experts keep theirs."""
  layers, slots = previous.shape
  size = slots // gpus
  old_Xi, new_Xi = previous.reshape(-1, size), expert_LI.reshape(-1, size)
  row_X = np.arange(len(old_Xi))
  left_Xi = np.ones(new_Xi.shape, bool)  # of the new ones, not yet placed
  found_Xi = np.full(new_Xi.shape, -1)
  for i in range(size):
    same_Xi = left_Xi & (new_Xi == old_Xi[:, i:i + 1])
    j_X = same_Xi.argmax(-1)
    hit_X = same_Xi[row_X, j_X]
    found_Xi[hit_X, i] = old_Xi[hit_X, i]
    left_Xi[row_X[hit_X], j_X[hit_X]] = False
  found_Xi[found_Xi < 0] = new_Xi[left_Xi]  # equally many in each row, and both in rows' order
  return found_Xi.reshape(layers, slots)


def _holds(expert_XPn: np.ndarray, experts: int) -> np.ndarray:
  """Which experts each part holds, float32 [X, P, E] of 0 and 1."""
  holds_XPE = np.zeros((*expert_XPn.shape[:2], experts), np.float32)
  np.put_along_axis(holds_XPE, expert_XPn, 1, -1)
  return holds_XPE


def _match(common_XPQ: np.ndarray) -> np.ndarray:
  """Which new part Q takes the place of each old part P, int64 [X, P]; most in common first."""
  rows, parts, _ = common_XPQ.shape
  row_X = np.arange(rows)
  free_XPQ = common_XPQ.transpose(0, 2, 1).copy()  # new by old
  place_XP = np.empty((rows, parts), np.int64)
  for new_X in np.argsort(-common_XPQ.max(1), -1, kind="stable").T:
    old_X = free_XPQ[row_X, new_X].argmax(-1)
    place_XP[row_X, old_X] = new_X
    free_XPQ[row_X, :, old_X] = -1
  return place_XP
