"""The published balancer, line by line and layer by layer: an oracle for `dsv3_jax.infer.eplb`.

A transcription of the authors' algorithm (facts 6.7) into plain Python on fp32 scalars; nothing of
ours is used.
"""

import numpy as np

ZERO = np.float32(0)


def balanced_packing(weights, packs):
  """(pack, rank in pack) of each item: heaviest first, to the lightest pack that has room."""
  room = len(weights) // packs
  if room == 1:
    return [(i, 0) for i in range(packs)]
  heaviest_first = sorted(range(len(weights)), key=lambda i: -weights[i])  # stable
  loads, sizes, placed = [ZERO] * packs, [0] * packs, [None] * len(weights)
  for item in heaviest_first:
    best = None
    for p in range(packs):
      if sizes[p] < room and (best is None or loads[p] < loads[best]):
        best = p
    placed[item] = (best, sizes[best])
    loads[best] = loads[best] + weights[item]
    sizes[best] += 1
  return placed


def replicate_experts(weights, slots):
  """(expert, rank) of each slot, and counts: one each, then whichever has most load a replica."""
  counts = [1] * len(weights)
  made = [(e, 0) for e in range(len(weights))]
  while len(made) < slots:
    shares = [w / np.float32(c) for w, c in zip(weights, counts)]
    e = shares.index(max(shares))
    made.append((e, counts[e]))
    counts[e] += 1
  return made, counts


def one_layer(weights, slots, groups, nodes, gpus):
  """(expert, rank) of each slot, and each expert's count."""
  group_size = len(weights) // groups
  totals = [np.sum(weights[g * group_size:(g + 1) * group_size]) for g in range(groups)]
  placed = balanced_packing(totals, nodes)
  out, all_counts = [], {}
  for node in range(nodes):
    mine = sorted((rank, g) for g, (n, rank) in enumerate(placed) if n == node)
    experts = [g * group_size + i for _, g in mine for i in range(group_size)]
    made, counts = replicate_experts([weights[e] for e in experts], slots // nodes)
    shares = [weights[experts[e]] / np.float32(counts[e]) for e, _ in made]
    table = [[None] * (slots // gpus) for _ in range(gpus // nodes)]
    for (e, rank), (gpu, place) in zip(made, balanced_packing(shares, gpus // nodes)):
      table[gpu][place] = (experts[e], rank)
    out += [entry for row in table for entry in row]
    all_counts.update((experts[e], c) for e, c in enumerate(counts))
  return out, [all_counts[e] for e in range(len(weights))]


def rebalance_experts(weight, num_replicas, num_groups, num_nodes, num_gpus):
  if num_groups % num_nodes:
    num_groups = num_nodes = 1
  layers = [one_layer(list(row), num_replicas, num_groups, num_nodes, num_gpus)
            for row in np.asarray(weight, np.float32)]
  counts = np.array([c for _, c in layers])
  log2phy = np.full((*counts.shape, counts.max()), -1)
  for l, (slots, _) in enumerate(layers):
    for p, (e, rank) in enumerate(slots):
      log2phy[l, e, rank] = p
  return np.array([[e for e, _ in slots] for slots, _ in layers]), log2phy, counts


def gpu_loads(weight, phy2log, counts, gpus):
  """Load of each GPU, float64 [layers, gpus]."""
  shares = np.array([[weight[l, e] / counts[l, e] for e in row] for l, row in enumerate(phy2log)])
  return shares.reshape(len(weight), gpus, -1).sum(-1)
