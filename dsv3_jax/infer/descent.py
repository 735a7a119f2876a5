"""The search under `placement`: the busiest GPU gives load away, until no single exchange helps.

Three exchanges are looked for in each layer, always for its busiest GPU and within that GPU's node:

    swap   one of its replicas against a lighter one of another GPU; both GPUs fetch an expert.
    share  another GPU gets one more replica of an expert that the busiest GPU holds, in place of a
           replica of an expert that has others: all of the first expert's replicas get lighter, all
           of the second's heavier, and one GPU fetches an expert.
    drop   the other way round: in place of a replica of an expert that has others, the busiest GPU
           gets one more of a light expert. Only where nothing else helps: it mends too many
           replicas of one expert, such as two on a GPU, but tends to lead nowhere elsewhere.

An exchange counts by the largest load that any GPU it touches has afterwards. It is made only where
that is below the busiest GPU's load before, so the loads sorted downwards fall in lexicographic
order: the search ends, and no layer is ever worse than it was. Of several the one with most gain a
fetched expert is made.

Layers are done side by side, and drop out as they are done. Letters as in `eplb`: I slots, O GPUs,
X rows (layers still at work), n slots of a node, i slots of a GPU.
"""

from typing import NamedTuple

import numpy as np

GAIN = 1e-9  # what is less is rounding, relative


class _View(NamedTuple):
  """The busiest GPU of each row and what its node holds.

  Attributes:
    top_X: its load.
    cols_Xn: the node's slots.
    expert_Xn, share_Xn: what they hold, and its load a replica.
    load_Xn: of each slot's GPU; infinite for the busiest GPU's own.
    mine_Xi: which of the node's slots are the busiest GPU's.
  """

  top_X: np.ndarray
  cols_Xn: np.ndarray
  expert_Xn: np.ndarray
  share_Xn: np.ndarray
  load_Xn: np.ndarray
  mine_Xi: np.ndarray

  def mine(self, values_Xn: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values_Xn, self.mine_Xi, -1)[:, :, None]


class _Exchange(NamedTuple):
  """The best exchange of each row: its cost (infinite: none), the busiest GPU's slot, the other."""

  cost_X: np.ndarray
  mine_X: np.ndarray
  other_X: np.ndarray


def descend(weight_LE: np.ndarray, expert_LI: np.ndarray, gpus: int, nodes: int = 1,
            moves: int | None = None, steps: int = 4000, close: float = 1e-3,
            swaps_only: bool = False) -> tuple[np.ndarray, np.ndarray]:
  """Improves a placement by exchanges; see the module's docstring.

  Args:
    weight_LE: float64, load of each expert.
    expert_LI: the expert of each slot; an expert may be absent.
    gpus, nodes: of the slots; experts stay on their node.
    moves: how many experts may be fetched in each layer; None is as many as help.
    steps: exchanges of a layer at most.
    close: a layer is done where its busiest GPU is this near to the mean of its busiest node.
    swaps_only: leaves the counts as they are.

  Returns:
    The placement, int64 [L, I], and the GPUs' loads, float64 [L, O].
  """
  layers, slots = expert_LI.shape
  expert_LI = expert_LI.astype(np.int64)
  count_LE = counts(expert_LI, weight_LE.shape[1])
  share_LE = weight_LE / np.maximum(count_LE, 1)
  size = slots // gpus
  load_LO = np.take_along_axis(share_LE, expert_LI, -1).reshape(layers, gpus, size).sum(-1)
  enough_L = load_LO.reshape(layers, nodes, gpus // nodes).mean(-1).max(-1) * (1 + close)
  left_L = np.full(layers, slots * steps if moves is None else moves)
  row_X = np.arange(layers)
  for _ in range(steps):
    row_X = row_X[(load_LO[row_X].max(-1) > enough_L[row_X]) & (left_L[row_X] > 0)]
    if not row_X.size:
      break
    view = _look(expert_LI[row_X], share_LE[row_X], load_LO[row_X], nodes)
    tried = [_swap(view)]
    if not swaps_only:
      tried += _share_and_drop(view, weight_LE[row_X], count_LE[row_X])
    gain_3X = view.top_X - np.stack([exchange.cost_X for exchange in tried])
    gain_3X[0] = np.where(left_L[row_X] > 1, gain_3X[0] / 2, -np.inf)  # a swap fetches two
    gain_3X[2:] = np.where(gain_3X[:2].max(0) > GAIN * view.top_X, -np.inf, gain_3X[2:])
    kind_X = gain_3X.argmax(0)
    helps_X = gain_3X.max(0) > GAIN * view.top_X
    mine_X, other_X = (np.take_along_axis(view.cols_Xn, np.choose(kind_X, slots_3X)[:, None], -1)
                       [helps_X, 0] for slots_3X in list(zip(*tried))[1:])
    row_X, kind_X = row_X[helps_X], kind_X[helps_X]
    my_X, their_X = expert_LI[row_X, mine_X], expert_LI[row_X, other_X]
    expert_LI[row_X, mine_X] = np.where(kind_X == 1, my_X, their_X)
    expert_LI[row_X, other_X] = np.where(kind_X == 2, their_X, my_X)
    more_X = np.array([0, 1, -1])[kind_X]  # replicas of the busiest GPU's expert
    count_LE[row_X, my_X] += more_X
    count_LE[row_X, their_X] -= more_X
    share_LE[row_X] = weight_LE[row_X] / np.maximum(count_LE[row_X], 1)
    load_LO[row_X] = np.take_along_axis(share_LE[row_X], expert_LI[row_X], -1).reshape(
        len(row_X), gpus, size).sum(-1)
    left_L[row_X] -= 1 + (kind_X == 0)
  return expert_LI, load_LO


def counts(expert_LI: np.ndarray, experts: int) -> np.ndarray:
  """Replicas of each expert, int64 [L, E]; slots that hold -1 are empty."""
  layers = len(expert_LI)
  flat_LI = np.where(expert_LI < 0, layers * experts,
                     expert_LI + experts * np.arange(layers)[:, None])
  return np.bincount(flat_LI.ravel(), minlength=layers * experts)[:layers * experts].reshape(
      layers, experts)


def _look(expert_XI: np.ndarray, share_XE: np.ndarray, load_XO: np.ndarray, nodes: int) -> _View:
  gpus = load_XO.shape[1]
  size = expert_XI.shape[1] // gpus  # slots of a GPU
  busiest_X = load_XO.argmax(-1)[:, None]
  first_X = busiest_X - busiest_X % (gpus // nodes)  # GPU of the node
  cols_Xn = first_X * size + np.arange(expert_XI.shape[1] // nodes)
  expert_Xn = np.take_along_axis(expert_XI, cols_Xn, -1)
  load_Xn = np.take_along_axis(load_XO, cols_Xn // size, -1)
  return _View(np.take_along_axis(load_XO, busiest_X, -1)[:, 0], cols_Xn, expert_Xn,
               np.take_along_axis(share_XE, expert_Xn, -1),
               np.where(cols_Xn // size == busiest_X, np.inf, load_Xn),
               (busiest_X - first_X) * size + np.arange(size))


def _swap(view: _View) -> _Exchange:
  share_Xi = view.mine(view.share_Xn)
  stays_Xi = view.top_X[:, None, None] - share_Xi
  stays_Xn = view.load_Xn - view.share_Xn
  return _best(np.maximum(stays_Xi + view.share_Xn[:, None], stays_Xn[:, None] + share_Xi), view)


def _share_and_drop(view: _View, weight_XE: np.ndarray, count_XE: np.ndarray
                    ) -> tuple[_Exchange, _Exchange]:
  """What loads become is estimated from above where a GPU holds both experts, or one twice."""
  rows, slots = view.expert_Xn.shape
  size = view.mine_Xi.shape[1]
  weight_Xn = np.take_along_axis(weight_XE, view.expert_Xn, -1)
  count_Xn = np.take_along_axis(count_XE, view.expert_Xn, -1)
  lighter_Xn = weight_Xn / (count_Xn + 1)  # a replica when there is one more
  # What each other replica gains when one goes, and how many of them this GPU has.
  gain_Xn = np.where(count_Xn > 1, weight_Xn / np.maximum(count_Xn - 1, 1) - view.share_Xn, np.inf)
  on_gpu_Xoi = view.expert_Xn.reshape(rows, -1, size)
  here_Xn = (on_gpu_Xoi[..., None] == on_gpu_Xoi[..., None, :]).sum(-1).reshape(rows, slots)
  load_Xn = np.where(np.isinf(view.load_Xn), view.top_X[:, None], view.load_Xn)
  others_Xn = _largest_elsewhere(load_Xn + here_Xn * gain_Xn, view.expert_Xn, size,
                                 weight_XE.shape[1])
  others_Xn = np.where(count_Xn > 1, others_Xn, np.inf)
  # The slot's GPU without the replica.
  less_Xn = np.where(here_Xn > 1, (here_Xn - 1) * np.where(count_Xn > 1, gain_Xn, 0), 0)
  less_Xn = load_Xn - view.share_Xn + less_Xn
  same_Xin = view.mine(view.expert_Xn) == view.expert_Xn[:, None]
  no_Xin = same_Xin | np.isinf(view.load_Xn)[:, None]
  share_Xin = np.maximum(
      np.maximum(less_Xn, others_Xn)[:, None],
      np.maximum(less_Xn[:, None] + view.mine(lighter_Xn),
                 view.top_X[:, None, None] - view.mine(here_Xn * (view.share_Xn - lighter_Xn))))
  drop_Xin = np.maximum(view.mine(less_Xn) + lighter_Xn[:, None], view.mine(others_Xn))
  return (_best(np.where(no_Xin, np.inf, share_Xin), view),
          _best(np.where(same_Xin, np.inf, drop_Xin), view))


def _largest_elsewhere(value_Xn: np.ndarray, expert_Xn: np.ndarray, size: int, experts: int
                       ) -> np.ndarray:
  """Of each slot: the largest value at its expert's slots on other GPUs; -infinity without any."""
  rows, slots = value_Xn.shape
  flat_Xn = expert_Xn + experts * np.arange(rows)[:, None]
  gpu_Xn = np.broadcast_to(np.arange(slots) // size, value_Xn.shape)
  first = np.full(rows * experts, -np.inf)
  np.maximum.at(first, flat_Xn.ravel(), value_Xn.ravel())
  is_Xn = value_Xn == first[flat_Xn]
  gpu = np.zeros(rows * experts, np.int64)  # a GPU that has the largest
  gpu[flat_Xn[is_Xn]] = gpu_Xn[is_Xn]
  there_Xn = gpu[flat_Xn] == gpu_Xn
  second = np.full(rows * experts, -np.inf)
  np.maximum.at(second, flat_Xn.ravel(), np.where(there_Xn, -np.inf, value_Xn).ravel())
  return np.where(there_Xn, second[flat_Xn], first[flat_Xn])


def _best(cost_Xin: np.ndarray, view: _View) -> _Exchange:
  rows, _, slots = cost_Xin.shape
  row_X = np.arange(rows)
  flat_X = cost_Xin.reshape(rows, -1).argmin(-1)
  return _Exchange(cost_Xin.reshape(rows, -1)[row_X, flat_X], view.mine_Xi[row_X, flat_X // slots],
                   flat_X % slots)
