"""Where experts lie when they serve: the published balancer of expert parallelism (report 3.4).

A GPU waits at each layer's all-to-all for the GPU whose experts got most tokens, so a layer takes
as long as its busiest GPU: what counts is max load / mean load over the GPUs. Routing at inference
is not balanced, and nobody may change it. What may be chosen is which GPU holds which expert, and
there is memory for some experts to be held twice or more: redundant experts, among whose replicas
an expert's tokens are shared out equally. So there are more slots (physical experts) than experts,
the same number on each GPU, and the question is what to put into them, given how many tokens each
expert got in the last minutes. For example 4 experts in 6 slots:

    expert    0    1    2    3              GPU     0     1     2
    tokens   90   50   40   30      ->      slots  0 1   0 1   2 3
                                            load    70    70    70

This is the algorithm of DeepSeek's EPLB, in three steps for each layer:

1. Groups of experts go to nodes, equally many to each. With group-limited routing a token visits
   few groups, and so few nodes; a group that is spread over nodes would lose that.
2. Within a node each expert has a slot; each further slot goes to the expert whose replicas are
   loaded most. That is the best choice of counts for the busiest replica: let T be the smallest
   possible maximum. An expert is given one more only while its replicas' load exceeds T, or all are
   at most T already; so no expert gets more than the ceil(load / T) that any choice with maximum T
   gives it, until all is at most T.
3. Replicas go to the node's GPUs, equally many to each.

Steps 1 and 3 are a greedy packing: heaviest first, each onto the lightest pack that has room. Where
groups cannot be divided among nodes the whole is done once, as for one group on one node: `global`,
against `hierarchical`. The report's prefill is the one (4 nodes, 8 groups), its decoding the other
(40 nodes).

Sums are fp32 and the first of equals wins, as in the published code: equal input gives its output.
(Its sort leaves open which of equal items comes first, above 16 of them; here it is the first.)
What differs is that layers are done side by side. numpy alone.

Letters here: I slots, O GPUs, i slots of one GPU, Y replicas of one expert, X independent rows
(layers times nodes), n items and packs of a packing.
"""

from typing import NamedTuple

import numpy as np


class Sizes(NamedTuple):
  """What `rebalance_experts` was asked for, checked; global is one group on one node."""

  layers: int
  experts: int
  slots: int
  groups: int
  nodes: int
  gpus: int


def rebalance_experts(weight_LE: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int,
                      num_gpus: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The published placement of experts with redundant ones; hierarchical where that is possible.

  Slot p lies on GPU p // (num_replicas / num_gpus), GPU g on node g // (num_gpus / num_nodes).

  Args:
    weight_LE: load of each layer's experts, such as tokens routed to them; in any unit.
    num_replicas: slots of all GPUs together: a multiple of num_gpus, at least the experts.
    num_groups: expert groups of the router; experts of a group are consecutive.
    num_nodes: nodes. Hierarchical where num_groups is a multiple of it, else global.
    num_gpus: GPUs of all nodes together.

  Returns:
    physical_to_logical: int64 [L, I], the expert of each slot.
    logical_to_physical: int64 [L, E, Y], the slots of each expert; Y is the largest count, and
      -1 stands where an expert has fewer. The order is that in which the replicas were made.
    replica_count: int64 [L, E].

  Raises:
    ValueError: sizes that do not divide, too few slots, loads that are negative or not finite.
  """
  sizes = check(weight_LE, num_replicas, num_groups, num_nodes, num_gpus)
  weight_LE = np.asarray(weight_LE, np.float32)
  members_LE = group_members(weight_LE, sizes)
  expert_LI, rank_LI, count_LE = within_nodes(weight_LE, members_LE, sizes)
  return expert_LI, _inverse(expert_LI, rank_LI, count_LE), count_LE


def check(weight_LE: np.ndarray, num_replicas: int, num_groups: int, num_nodes: int,
          num_gpus: int) -> Sizes:
  """The sizes of a call of `rebalance_experts`.

  Raises:
    ValueError: see there.
  """
  weight_LE = np.asarray(weight_LE)
  if weight_LE.ndim != 2 or not weight_LE.size:
    raise ValueError(f"weight has shape {weight_LE.shape}; give [layers, experts]")
  if weight_LE.dtype.kind not in "buif":
    raise ValueError(f"weight has dtype {weight_LE.dtype}; give numbers")
  # Sums stay below fp32's largest number.
  bad_LE = ~(np.isfinite(weight_LE) & (weight_LE >= 0) & (weight_LE < 1e30))
  if bad_LE.any():
    layer, expert = np.argwhere(bad_LE)[0]
    raise ValueError(f"weight[{layer}, {expert}]={weight_LE[layer, expert]:g}; a load is finite "
                     "and not negative")
  layers, experts = weight_LE.shape
  for name, value in (("num_replicas", num_replicas), ("num_groups", num_groups),
                      ("num_nodes", num_nodes), ("num_gpus", num_gpus)):
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
      raise ValueError(f"{name}={value!r}; give a positive whole number")
  if num_replicas < experts:
    raise ValueError(f"num_replicas={num_replicas} is less than the {experts} experts; each needs "
                     "a slot")
  if num_replicas % num_gpus:
    below = num_replicas - num_replicas % num_gpus
    fits = f"{below} or {below + num_gpus}" if below >= experts else f"{below + num_gpus}"
    raise ValueError(f"num_replicas={num_replicas} is no multiple of num_gpus={num_gpus}; GPUs "
                     f"have equally many slots: {fits} would do")
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  if experts % num_groups:
    raise ValueError(f"num_groups={num_groups} does not divide the {experts} experts; groups are "
                     "of equal size")
  if num_gpus % num_nodes:
    raise ValueError(f"num_gpus={num_gpus} is no multiple of num_nodes={num_nodes}; nodes have "
                     "equally many GPUs")
  return Sizes(layers, experts, int(num_replicas), int(num_groups), int(num_nodes), int(num_gpus))


def group_members(weight_LE: np.ndarray, sizes: Sizes) -> np.ndarray:
  """Step 1: which experts each node serves, int64 [L, E]: node n's are the n-th part of a row."""
  size = sizes.experts // sizes.groups
  group_LG = weight_LE.reshape(sizes.layers, sizes.groups, size).sum(-1)
  order_LG = pack(group_LG, sizes.nodes)
  return (order_LG[..., None] * size + np.arange(size)).reshape(sizes.layers, sizes.experts)


def pack(weight_Xn: np.ndarray, packs: int) -> np.ndarray:
  """Greedy packing: heaviest first, each onto the lightest pack with room, the first of equals.

  Args:
    weight_Xn: float32 [X, n], items of each row.
    packs: divides n; each pack gets n / packs items. With one item a pack, item i goes to pack i.

  Returns:
    The items in their packs' order, int64 [X, n]: pack k's are the k-th part of a row, in the order
    in which they were put there.
  """
  rows, items = weight_Xn.shape
  room = items // packs
  if room == 1:
    return np.tile(np.arange(items), (rows, 1))
  order_Xn = np.argsort(-weight_Xn, axis=-1, kind="stable")
  sorted_Xn = np.take_along_axis(weight_Xn, order_Xn, -1)
  load_Xn = np.zeros((rows, packs), np.float32)  # infinite once a pack is full
  taken_Xn = np.zeros((rows, packs), np.int64)
  found_Xn = np.empty((rows, items), np.int64)
  row_X = np.arange(rows)
  for n in range(items):
    pack_X = load_Xn.argmin(-1)
    place_X = taken_Xn[row_X, pack_X]
    found_Xn[row_X, pack_X * room + place_X] = order_Xn[:, n]
    taken_Xn[row_X, pack_X] = place_X + 1
    load_Xn[row_X, pack_X] += np.where(place_X + 1 == room, np.inf, sorted_Xn[:, n])
  return found_Xn


def replicate(weight_Xe: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Step 2: each expert once, then one more of whichever has most load a replica, first of equals.

  Args:
    weight_Xe: float32 [X, e].
    slots: at least e.

  Returns:
    Expert of each slot and which of its replicas that is, int64 [X, slots]; replicas of each
    expert, int64 [X, e].
  """
  rows, experts = weight_Xe.shape
  expert_Xi = np.tile(np.arange(slots), (rows, 1))
  rank_Xi = np.zeros((rows, slots), np.int64)
  count_Xe = np.ones((rows, experts), np.int64)
  share_Xe = weight_Xe.copy()
  row_X = np.arange(rows)
  for i in range(experts, slots):
    expert_X = share_Xe.argmax(-1)
    expert_Xi[:, i] = expert_X
    rank_Xi[:, i] = count_Xe[row_X, expert_X]
    count_Xe[row_X, expert_X] += 1
    share_Xe[row_X, expert_X] = (
        weight_Xe[row_X, expert_X] / count_Xe[row_X, expert_X].astype(np.float32))
  return expert_Xi, rank_Xi, count_Xe


def within_nodes(weight_LE: np.ndarray, members_LE: np.ndarray, sizes: Sizes
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Steps 2 and 3 of all nodes: expert and replica number of each slot, [L, I]; counts, [L, E]."""
  rows = sizes.layers * sizes.nodes
  members_Xe = members_LE.reshape(rows, -1)
  weight_Xe = np.take_along_axis(weight_LE, members_LE, -1).reshape(rows, -1)
  local_Xi, rank_Xi, count_Xe = replicate(weight_Xe, sizes.slots // sizes.nodes)
  share_Xe = weight_Xe / count_Xe.astype(np.float32)
  order_Xi = pack(np.take_along_axis(share_Xe, local_Xi, -1), sizes.gpus // sizes.nodes)
  local_Xi = np.take_along_axis(local_Xi, order_Xi, -1)
  expert_LI = np.take_along_axis(members_Xe, local_Xi, -1).reshape(sizes.layers, -1)
  rank_LI = np.take_along_axis(rank_Xi, order_Xi, -1).reshape(sizes.layers, -1)
  count_LE = np.empty_like(members_LE)
  np.put_along_axis(count_LE, members_LE, count_Xe.reshape(sizes.layers, -1), -1)
  return expert_LI, rank_LI, count_LE


def _inverse(expert_LI: np.ndarray, rank_LI: np.ndarray, count_LE: np.ndarray) -> np.ndarray:
  """The slots of each expert, int64 [L, E, Y], -1 where it has fewer than the most."""
  layers, experts = count_LE.shape
  slot_LEY = np.full((layers, experts, count_LE.max()), -1)
  slot_LEY[np.arange(layers)[:, None], expert_LI, rank_LI] = np.arange(expert_LI.shape[1])
  return slot_LEY
