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
the best there are. With 2 to 6 slots a GPU it leaves some per cent, of steep loads a quarter.

A change costs: each expert that a GPU did not hold is fetched over the network while requests run.
Given the placement before, as `previous`, GPUs are renumbered so that they keep what they can; with
`slack` the search starts from there, and what it finds is taken unless placing anew is better by
more than that; and `max_moves` limits what is fetched in each layer.

Loads change, and the placement is for those of the past. Where they are steady, its advantage is
there afterwards too. Where the mixture of text shifts from one window to the next, no policy that
looks back comes near balance, and this one and the published one are within 1 % of one another;
there `slack` costs up to 1 % more and fetches a third (`dsv3 simulate` shows all of this).

numpy alone. Letters as in `eplb`.
"""

import numpy as np

from dsv3_jax.infer import descent, eplb, moves

WORTH = 1.01  # how much above the mean the busiest GPU must be for forced exchanges
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
  share_LI = np.take_along_axis(share_LE, physical_to_logical, -1)
  return share_LI.reshape(layers, num_gpus, share_LI.shape[1] // num_gpus).sum(-1)


def imbalance(weight_LE: np.ndarray, physical_to_logical: np.ndarray, num_gpus: int) -> np.ndarray:
  """Max load / mean load over the GPUs, float64 [L]; 1 for a layer without load."""
  most_L = gpu_load(weight_LE, physical_to_logical, num_gpus).max(-1)
  mean_L = weight_LE.sum(-1) / num_gpus
  return np.where(mean_L > 0, most_L / np.where(mean_L > 0, mean_L, 1), 1.0)


def rebalance_experts(weight_LE: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int,
                      num_gpus: int, *, previous: np.ndarray | None = None,
                      slack: float = 0.0, max_moves: int | None = None
                      ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A placement whose busiest GPU has at most the load that `eplb.rebalance_experts` gives it.

  Args:
    weight_LE, num_replicas, num_groups, num_nodes, num_gpus: see there.
    previous: int [L, I], the placement until now; what can stay keeps its slot.
    slack: how much busier, relative, the busiest GPU may be for the sake of fewer experts fetched:
      of each layer, and of nodes on average. Only with `previous`.
    max_moves: experts that may be fetched in each layer. Only with `previous`. The busiest GPU is
      then never busier than it was, but may be busier than the published placement's.

  Returns:
    physical_to_logical, logical_to_physical, replica_count, see there; slots of an expert ascend.

  Raises:
    ValueError: see there; a `previous` of other sizes, that lacks an expert, or that cuts a group
      up; a negative max_moves, or one without `previous`.
  """
  sizes = eplb.check(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)
  for name, value in (("max_moves", max_moves), ("slack", slack or None)):
    if value is not None and previous is None:
      raise ValueError(f"{name}={value} without previous; give the placement until now")
    if value is not None and not value >= 0:
      raise ValueError(f"{name}={value}; give 0 or more")
  published_LI = eplb.rebalance_experts(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)[0]
  weight_LE = np.asarray(weight_LE, np.float64)
  if previous is not None:
    previous = _checked(previous, sizes)
  if max_moves is not None:
    found_LI = _limited(weight_LE, previous, published_LI, sizes, max_moves)
  elif slack:
    found_LI = _slack(weight_LE, previous, published_LI, sizes, slack)
  else:
    found_LI = _anew(weight_LE, published_LI, sizes)
    sure_L = _most(weight_LE, found_LI, sizes) < SURE * _most(weight_LE, published_LI, sizes)
    found_LI = np.where(sure_L[:, None], found_LI, published_LI)
    if previous is not None:
      found_LI = moves.keep(previous, found_LI, sizes.nodes, sizes.gpus)
  return maps(found_LI, sizes.experts)


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


# --- searching ----------------------------------------------------------------------------------


def _limited(weight_LE: np.ndarray, previous: np.ndarray, published_LI: np.ndarray,
             sizes: eplb.Sizes, max_moves: int) -> np.ndarray:
  """The best placement found that is so few experts away, int64 [L, I]."""
  found_LI, _ = descent.descend(weight_LE, previous, sizes.gpus, sizes.nodes, max_moves)
  found_LI = moves.in_place(previous, found_LI, sizes.gpus)
  row_X = np.nonzero((found_LI != previous).sum(-1) < max_moves)[0]  # the search ended before
  if not row_X.size:
    return found_LI
  anew_XI = moves.keep(previous[row_X], _anew(weight_LE[row_X], published_LI[row_X], sizes),
                 sizes.nodes, sizes.gpus)
  better_X = (((anew_XI != previous[row_X]).sum(-1) <= max_moves)
              & (_most(weight_LE[row_X], anew_XI, sizes)
                 < _most(weight_LE[row_X], found_LI[row_X], sizes)))
  found_LI[row_X[better_X]] = anew_XI[better_X]
  return found_LI


def _slack(weight_LE: np.ndarray, previous: np.ndarray, published_LI: np.ndarray,
           sizes: eplb.Sizes, slack: float) -> np.ndarray:
  """A placement near the one before, within the slack of the best found, int64 [L, I]."""
  found_LI, _ = descent.descend(
      np.repeat(weight_LE, sizes.nodes, 0), previous.reshape(sizes.layers * sizes.nodes, -1),
      sizes.gpus // sizes.nodes, close=slack)
  found_LI = moves.in_place(previous, found_LI.reshape(previous.shape), sizes.gpus)
  least_L = weight_LE.sum(-1) / sizes.gpus
  row_X = np.nonzero(_most(weight_LE, found_LI, sizes) > (1 + slack) * least_L)[0]
  if not row_X.size:
    return found_LI
  anew_XI = moves.keep(previous[row_X], _anew(weight_LE[row_X], published_LI[row_X], sizes),
                 sizes.nodes, sizes.gpus)
  better_X = np.zeros(len(row_X), bool)
  for measure in (_most, _peaks):
    better_X |= (measure(weight_LE[row_X], found_LI[row_X], sizes)
                 > (1 + slack) * measure(weight_LE[row_X], anew_XI, sizes))
  found_LI[row_X[better_X]] = anew_XI[better_X]
  return found_LI


def _most(weight_LE: np.ndarray, expert_LI: np.ndarray, sizes: eplb.Sizes) -> np.ndarray:
  """Load of the busiest GPU, float64 [L]."""
  return gpu_load(weight_LE, expert_LI, sizes.gpus).max(-1)


def _peaks(weight_LE: np.ndarray, expert_LI: np.ndarray, sizes: eplb.Sizes) -> np.ndarray:
  """Load of each node's busiest GPU, summed over the nodes, float64 [L]."""
  load_LO = gpu_load(weight_LE, expert_LI, sizes.gpus)
  return load_LO.reshape(len(load_LO), sizes.nodes, sizes.gpus // sizes.nodes).max(-1).sum(-1)


def _anew(weight_LE: np.ndarray, published_LI: np.ndarray, sizes: eplb.Sizes) -> np.ndarray:
  """The best placement found, whatever it costs to get there, int64 [L, I]."""
  best_LI = _improved(weight_LE, published_LI, sizes)
  if 1 < sizes.nodes < sizes.groups:
    other_LI, changed_L = _regrouped(weight_LE, sizes._replace(layers=len(weight_LE)))
    row_X = np.nonzero(changed_L)[0]
    other_XI = _improved(weight_LE[row_X], other_LI[row_X], sizes)
    better_X = (_most(weight_LE[row_X], other_XI, sizes)
                < SURE * _most(weight_LE[row_X], best_LI[row_X], sizes))
    best_LI[row_X[better_X]] = other_XI[better_X]
  return best_LI


def _improved(weight_LE: np.ndarray, start_LI: np.ndarray, sizes: eplb.Sizes) -> np.ndarray:
  """A placement after exchanges in each node, forced ones too, int64 [L, I].

  Nodes are searched on their own, not only the busiest: another may be that a minute later.
  """
  layers, gpus, slots = len(start_LI), sizes.gpus // sizes.nodes, sizes.slots // sizes.nodes
  weight_XE = np.repeat(weight_LE, sizes.nodes, 0)
  start_XI = start_LI.reshape(layers * sizes.nodes, slots)
  expert_XI, load_XO = descent.descend(weight_XE, start_XI, gpus)
  row_R = np.arange(len(expert_XI))
  for _ in range(ROUNDS):
    row_R = row_R[load_XO[row_R].max(-1) > WORTH * load_XO[row_R].mean(-1)]
    of_T, trial_TI = _forced(weight_XE[row_R], expert_XI[row_R], load_XO[row_R])
    if not of_T.size:
      break
    row_T = row_R[of_T]
    # By swaps alone: the first other exchange would often be the one back.
    trial_TI, trial_TO = descent.descend(weight_XE[row_T], trial_TI, gpus, steps=STEPS,
                                         swaps_only=True)
    # The best trial of each row; the first of equals, so that a run can be repeated.
    order_T = np.lexsort((trial_TO.max(-1), row_T))
    best_R = order_T[np.unique(row_T[order_T], return_index=True)[1]]
    best_R = best_R[trial_TO[best_R].max(-1) < SURE * load_XO[row_T[best_R]].max(-1)]
    row_R = row_T[best_R]
    expert_XI[row_R], load_XO[row_R] = trial_TI[best_R], trial_TO[best_R]
  sure_X = load_XO.max(-1) < SURE * gpu_load(weight_XE, start_XI, gpus).max(-1)
  return np.where(sure_X[:, None], expert_XI, start_XI).reshape(layers, sizes.slots)


def _forced(weight_XE: np.ndarray, expert_XI: np.ndarray, load_XO: np.ndarray
            ) -> tuple[np.ndarray, np.ndarray]:
  """Placements T to try: one more replica of what is heaviest on the busiest GPU, for another's.

  The expert that loses one is among those whose replicas get least heavy by it; it is the one of
  them on the busiest GPU.

  Returns:
    The row that each trial is of, int64 [T], and the trials, int64 [T, I].
  """
  rows, experts = weight_XE.shape
  size = expert_XI.shape[1] // load_XO.shape[1]
  count_XE = descent.counts(expert_XI, experts)
  here_Xi = np.take_along_axis(
      expert_XI, load_XO.argmax(-1)[:, None] * size + np.arange(size), -1)
  share_Xi = np.take_along_axis(weight_XE / np.maximum(count_XE, 1), here_Xi, -1)
  heaviest_XR = np.argsort(-share_Xi, -1, kind="stable")[:, :RECIPIENTS]
  gets_XR = np.take_along_axis(here_Xi, heaviest_XR, -1)
  after_XE = np.where(count_XE > 1, weight_XE / np.maximum(count_XE - 1, 1), np.inf)
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
