"""Placements of redundant experts: how balanced they are, what a change costs, and better ones.

`eplb` has the published algorithm. `rebalance_experts` here takes and returns the same and obeys
the same limits (equally many slots a GPU, groups whole on their node), and its busiest GPU is never
busier: it starts from the published placement and only ever improves on it, in three ways.

1. Exchanges of replicas between GPUs, and of a replica of one expert for a replica of another
   (`descent`). The greedy packing never looks back, and counts that are best for the busiest
   replica need not be best for the busiest GPU.
2. Where no single exchange helps, one that makes things worse at first is forced, and the search
   goes on from there for some steps; what comes out is kept where it is better.
3. Groups are exchanged between nodes, where a node has several.

Most of what is to be gained lies between two extremes. With many slots a GPU greedy packing is
nearly perfect already; with one slot a GPU there is nothing to pack, and the published counts are
the best there are. With 2 to 6 slots a GPU it leaves 2 to 40 %.

A change costs: each expert that a GPU did not hold is fetched over the network while requests run.
With the placement before, given as `previous`, the search starts there, so that few are fetched;
GPUs are renumbered so that they keep what they hold where a new placement is so much better that it
is worth it; and `max_moves` limits what is fetched in each layer.

numpy alone. Letters as in `eplb`.
"""

import numpy as np

from dsv3_jax.infer import descent, eplb

WORTH = 1.01  # how much busier the busiest GPU may be before a layer is placed anew or searched on
SURE = 1 - 1e-6  # what is less of a gain over the published placement is none
ROUNDS, DONORS, RECIPIENTS, STEPS = 8, 4, 2, 32  # of forced exchanges


def gpu_load(weight_LE: np.ndarray, physical_to_logical: np.ndarray, num_gpus: int) -> np.ndarray:
  """Load of each GPU, float64 [L, O], if an expert's load is shared equally by its replicas.

  Args:
    weight_LE: load of each expert.
    physical_to_logical: int [L, I]; -1 is an empty slot.
    num_gpus: divides I.
  """
  layers, experts = weight_LE.shape
  share_LE = weight_LE / np.maximum(descent.counts(physical_to_logical, experts), 1)
  share_LE = np.append(share_LE, np.zeros((layers, 1)), -1)  # which -1 finds
  return np.take_along_axis(share_LE, physical_to_logical, -1).reshape(
      layers, num_gpus, -1).sum(-1)


def imbalance(weight_LE: np.ndarray, physical_to_logical: np.ndarray, num_gpus: int) -> np.ndarray:
  """Max load / mean load over the GPUs, float64 [L]; 1 for a layer without load."""
  load_LO = gpu_load(weight_LE, physical_to_logical, num_gpus)
  mean_L = load_LO.mean(-1)
  return np.where(mean_L > 0, load_LO.max(-1) / np.where(mean_L > 0, mean_L, 1), 1.0)


def moved(previous: np.ndarray, physical_to_logical: np.ndarray, num_gpus: int) -> np.ndarray:
  """How many experts the GPUs of each layer must fetch for the second placement, int64 [L].

  An expert that stays on its GPU costs nothing, whatever slot it has there.
  """
  return (_in_place(previous, physical_to_logical, num_gpus) != previous).sum(-1)


def rebalance_experts(weight_LE: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int,
                      num_gpus: int, *, previous: np.ndarray | None = None,
                      max_moves: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A placement whose busiest GPU has at most the load that `eplb.rebalance_experts` gives it.

  Args:
    weight_LE, num_replicas, num_groups, num_nodes, num_gpus: see there.
    previous: int [L, I], the placement until now. The result keeps experts in their slots where
      that costs less than 1 % of balance.
    max_moves: experts that may be fetched in each layer; only with `previous`. The busiest GPU is
      then never busier than with `previous`, but may be busier than the published placement's.

  Returns:
    physical_to_logical, logical_to_physical, replica_count, see there; slots of an expert ascend.

  Raises:
    ValueError: see there; a `previous` of other sizes, that lacks an expert, or that cuts a group
      up; a negative max_moves, or one without `previous`.
  """
  sizes = eplb.check(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)
  if max_moves is not None and previous is None:
    raise ValueError(f"max_moves={max_moves} without previous; give the placement until now")
  if max_moves is not None and max_moves < 0:
    raise ValueError(f"max_moves={max_moves}; give 0 or more, or None for no limit")
  published_LI = eplb.rebalance_experts(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)[0]
  weight_LE = np.asarray(weight_LE, np.float64)
  most = lambda expert_LI: gpu_load(weight_LE, expert_LI, sizes.gpus).max(-1)
  if previous is None:
    return maps(_anew(weight_LE, published_LI, sizes), sizes.experts)
  previous = _checked(previous, sizes)
  found_LI, _ = descent.descend(weight_LE, previous, sizes.gpus, sizes.nodes, max_moves)
  found_LI = _in_place(previous, found_LI, sizes.gpus)
  anew_LI = keep(previous, _anew(weight_LE, published_LI, sizes), sizes.nodes, sizes.gpus)
  if max_moves is None:
    better_L = (most(found_LI) > most(published_LI)) | (most(found_LI) > WORTH * most(anew_LI))
  else:
    better_L = (most(found_LI) > most(anew_LI)) & ((anew_LI != previous).sum(-1) <= max_moves)
  return maps(np.where(better_L[:, None], anew_LI, found_LI), sizes.experts)


def maps(expert_LI: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(physical_to_logical, logical_to_physical, replica_count) of a placement; see `eplb`."""
  count_LE = descent.counts(expert_LI, experts)
  order_LI = np.argsort(expert_LI, axis=-1, kind="stable")  # slots, expert by expert
  first_LE = np.cumsum(count_LE, -1) - count_LE
  sorted_LI = np.take_along_axis(expert_LI, order_LI, -1)
  rank_LI = np.arange(expert_LI.shape[1]) - np.take_along_axis(first_LE, sorted_LI, -1)
  slot_LEY = np.full((*count_LE.shape, count_LE.max()), -1)
  slot_LEY[np.arange(len(expert_LI))[:, None], sorted_LI, rank_LI] = order_LI
  return expert_LI, slot_LEY, count_LE


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
  return _in_place(previous, expert_LI, gpus)


# --- searching ----------------------------------------------------------------------------------


def _anew(weight_LE: np.ndarray, published_LI: np.ndarray, sizes: eplb.Sizes) -> np.ndarray:
  """The best placement found, whatever it costs to get there, int64 [L, I]."""
  best_LI, load_LO = _improved(weight_LE, published_LI, sizes)
  if 1 < sizes.nodes < sizes.groups:
    other_LI, changed_L = _regrouped(weight_LE, sizes)
    row_X = np.nonzero(changed_L)[0]
    other_XI, other_XO = _improved(weight_LE[row_X], other_LI[row_X], sizes)
    better_X = other_XO.max(-1) < load_LO[row_X].max(-1)
    best_LI[row_X[better_X]], load_LO[row_X[better_X]] = other_XI[better_X], other_XO[better_X]
  published_L = gpu_load(weight_LE, published_LI, sizes.gpus).max(-1)
  surely_L = gpu_load(weight_LE, best_LI, sizes.gpus).max(-1) < SURE * published_L
  return np.where(surely_L[:, None], best_LI, published_LI)


def _improved(weight_LE: np.ndarray, expert_LI: np.ndarray, sizes: eplb.Sizes
              ) -> tuple[np.ndarray, np.ndarray]:
  """A placement after exchanges, forced ones too, int64 [L, I], and its loads, float64 [L, O]."""
  expert_LI, load_LO = descent.descend(weight_LE, expert_LI, sizes.gpus, sizes.nodes)
  least_L = load_LO.reshape(len(load_LO), sizes.nodes, sizes.gpus // sizes.nodes).mean(-1).max(-1)
  row_X = np.arange(len(expert_LI))
  for _ in range(ROUNDS):
    row_X = row_X[load_LO[row_X].max(-1) > WORTH * least_L[row_X]]
    of_T, trial_TI = _forced(weight_LE[row_X], expert_LI[row_X], load_LO[row_X], sizes)
    if not of_T.size:
      break
    row_T = row_X[of_T]
    trial_TI, trial_TO = descent.descend(weight_LE[row_T], trial_TI, sizes.gpus, sizes.nodes,
                                         steps=STEPS)
    # The best trial of each row; the first of equals, so that a run can be repeated.
    order_T = np.lexsort((trial_TO.max(-1), row_T))
    best_X = order_T[np.unique(row_T[order_T], return_index=True)[1]]
    best_X = best_X[trial_TO[best_X].max(-1) < SURE * load_LO[row_T[best_X]].max(-1)]
    row_X = row_T[best_X]
    expert_LI[row_X], load_LO[row_X] = trial_TI[best_X], trial_TO[best_X]
  return expert_LI, load_LO


def _forced(weight_XE: np.ndarray, expert_XI: np.ndarray, load_XO: np.ndarray, sizes: eplb.Sizes
            ) -> tuple[np.ndarray, np.ndarray]:
  """Placements T to try: one more replica of what is heaviest on the busiest GPU, for another's.

  The expert that loses one is among those whose replicas get least heavy by it; it is the one of
  them on the busiest GPU.

  Returns:
    The row that each trial is of, int64 [T], and the trials, int64 [T, I].
  """
  rows, experts = weight_XE.shape
  if not rows:
    return np.zeros(0, np.int64), expert_XI
  count_XE = descent.counts(expert_XI, experts)
  size, slots = sizes.slots // sizes.gpus, sizes.slots // sizes.nodes
  busiest_X = load_XO.argmax(-1)[:, None]
  here_Xi = np.take_along_axis(expert_XI, busiest_X * size + np.arange(size), -1)
  share_Xi = np.take_along_axis(weight_XE / count_XE, here_Xi, -1)
  heaviest_XR = np.argsort(-share_Xi, -1, kind="stable")[:, :RECIPIENTS]
  gets_XR = np.take_along_axis(here_Xi, heaviest_XR, -1)
  node_X = busiest_X // (sizes.gpus // sizes.nodes)
  near_XE = np.zeros((rows, experts), bool)
  np.put_along_axis(near_XE, np.take_along_axis(expert_XI, node_X * slots + np.arange(slots), -1),
                    True, -1)
  after_XE = np.where(near_XE & (count_XE > 1), weight_XE / np.maximum(count_XE - 1, 1), np.inf)
  gives_XD = np.argsort(after_XE, -1, kind="stable")[:, :DONORS]
  of_T, d_T, r_T = (x.ravel() for x in np.indices((rows, gives_XD.shape[1], gets_XR.shape[1])))
  gives_T, gets_T = gives_XD[of_T, d_T], gets_XR[of_T, r_T]
  real_T = np.isfinite(after_XE[of_T, gives_T]) & (gives_T != gets_T)
  of_T, gives_T, gets_T = of_T[real_T], gives_T[real_T], gets_T[real_T]
  trial_TI = expert_XI[of_T]
  load_TI = np.where(trial_TI == gives_T[:, None], np.repeat(load_XO, size, -1)[of_T], -1)
  trial_TI[np.arange(len(of_T)), load_TI.argmax(-1)] = gets_T
  return of_T, trial_TI


def _regrouped(weight_LE: np.ndarray, sizes: eplb.Sizes) -> tuple[np.ndarray, np.ndarray]:
  """The published placement for better balanced nodes, int64 [L, I], and where those differ."""
  size = sizes.experts // sizes.groups
  group_LG = weight_LE.reshape(sizes.layers, sizes.groups, size).sum(-1)
  greedy_LG = eplb.pack(group_LG.astype(np.float32), sizes.nodes)
  order_LG, _ = descent.descend(group_LG, greedy_LG, sizes.nodes)
  members_LE = (order_LG[..., None] * size + np.arange(size)).reshape(weight_LE.shape)
  expert_LI = eplb.within_nodes(weight_LE.astype(np.float32), members_LE, sizes)[0]
  return expert_LI, (order_LG != greedy_LG).any(-1)


# --- what is held already -----------------------------------------------------------------------


def _checked(previous: np.ndarray, sizes: eplb.Sizes) -> np.ndarray:
  previous = np.asarray(previous)
  if previous.shape != (sizes.layers, sizes.slots):
    raise ValueError(f"previous has shape {previous.shape}; give the placement's "
                     f"[layers, num_replicas], here {(sizes.layers, sizes.slots)}")
  if previous.dtype.kind not in "iu" or previous.min() < 0 or previous.max() >= sizes.experts:
    raise ValueError(f"previous holds {previous.min()} to {previous.max()} as {previous.dtype}; "
                     f"give experts, whole numbers from 0 to {sizes.experts - 1}")
  previous = previous.astype(np.int64)
  missing_LE = descent.counts(previous, sizes.experts) == 0
  if missing_LE.any():
    layer, expert = np.argwhere(missing_LE)[0]
    raise ValueError(f"previous lacks expert {expert} in layer {layer}; each needs a slot")
  group_LI = previous // (sizes.experts // sizes.groups)
  held_LNG = np.zeros((sizes.layers, sizes.nodes, sizes.groups), bool)
  np.put_along_axis(held_LNG, group_LI.reshape(sizes.layers, sizes.nodes, -1), True, -1)
  cut_LG = held_LNG.sum(1) > 1
  if cut_LG.any():
    layer, group = np.argwhere(cut_LG)[0]
    raise ValueError(f"previous has group {group} of layer {layer} on several nodes; give a "
                     "placement of the same num_groups, num_nodes and num_gpus")
  return previous


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


def _in_place(previous: np.ndarray, expert_LI: np.ndarray, gpus: int) -> np.ndarray:
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
