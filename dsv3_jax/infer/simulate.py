"""Placement policies driven over time by loads, recorded or made up: what each would have cost.

Time is a row of steps, each with the tokens that every layer's experts got. A policy sees the last
`window` steps, every `every` steps, and places the experts; what counts is the load of the steps
that come after, which it does not see. So a policy loses twice: by what its placement leaves
unbalanced, and by what has changed since. Policies:

    none     no redundant experts: they lie on the GPUs in order, some slots are empty.
    static   the published placement for the first window, for ever.
    eplb     the published placement, anew each time.
    ours     `placement.rebalance_experts`, each time; GPUs keep what they can.
    steady   the same, near the placement before: 1 % of balance for fewer experts fetched.
    limited  the same, with at most so many experts fetched in each layer each time.

numpy alone. Letters as in `eplb`; S steps.
"""

import dataclasses
import time
from collections.abc import Sequence

import numpy as np

from dsv3_jax.infer import eplb, moves, placement

POLICIES = ("none", "static", "eplb", "ours", "steady", "limited")
SLACK = 0.01  # of "steady"


@dataclasses.dataclass(frozen=True)
class Cluster:
  """What experts are placed on; see `eplb.rebalance_experts`."""

  slots: int
  groups: int
  nodes: int
  gpus: int

  @property
  def hierarchical(self) -> bool:
    return self.nodes > 1 and self.groups % self.nodes == 0


def cluster(gpus: int, experts: int, groups: int = 8, per_node: int = 8, redundant: int = 32
            ) -> Cluster:
  """A cluster for so many experts, with the least slots that are at least experts + redundant.

  Raises:
    ValueError: sizes below 1, or GPUs that do not fill nodes.
  """
  for name, value, least in (("ranks", gpus, 1), ("gpus_per_node", per_node, 1),
                             ("groups", groups, 1), ("redundant", redundant, 0)):
    if value < least:
      raise ValueError(f"{name}={value}; give at least {least}")
  nodes = max(gpus // per_node, 1)
  if gpus % nodes or gpus > per_node * nodes:
    raise ValueError(f"ranks={gpus} do not fill nodes of {per_node} GPUs; give a multiple of it")
  return Cluster(-(-(experts + redundant) // gpus) * gpus, groups, nodes, gpus)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a policy did.

  Attributes:
    policy: its name.
    ratio_S: max / mean load of the GPUs at each step after the first window, float64: the busiest
      GPU's load, summed over the layers, over the mean GPU's. A step of all layers takes this many
      times what it would take if balanced.
    worst: the largest max / mean load of any layer at any step.
    moved: experts that GPUs fetched at each rebalancing, over all layers; the first is no change.
    seconds: of computing each rebalancing, the first one too, in CPU time.
  """

  policy: str
  ratio_S: np.ndarray
  worst: float
  moved: tuple[int, ...]
  seconds: tuple[float, ...]


def run(load_SLE: np.ndarray, on: Cluster, policies: Sequence[str], window: int, every: int,
        max_moves: int = 8) -> list[Outcome]:
  """Drives each policy over the loads.

  Args:
    load_SLE: tokens of each step, layer and expert.
    on: the cluster.
    policies: of POLICIES.
    window: steps that a policy sees, and that pass before the first counts.
    every: steps from one rebalancing to the next.
    max_moves: of "limited", experts fetched in each layer.

  Raises:
    ValueError: an unknown policy, too few steps, sizes that do not fit (see `eplb`).
  """
  for name in policies:
    if name not in POLICIES:
      raise ValueError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
  for name, value in (("window", window), ("every", every)):
    if value < 1:
      raise ValueError(f"{name}={value}; give at least 1 step")
  if len(load_SLE) <= window:
    raise ValueError(f"window={window} leaves none of the {len(load_SLE)} steps to measure; give "
                     "fewer")
  return [_drive(load_SLE, on, name, window, every, max_moves) for name in policies]


def _drive(load_SLE: np.ndarray, on: Cluster, policy: str, window: int, every: int, max_moves: int
           ) -> Outcome:
  ratios, worst, moved, seconds, slots_LI = [], 1.0, [], [], None
  for step in range(window, len(load_SLE), every):
    before_LI = slots_LI
    if slots_LI is None or policy not in ("none", "static"):
      start = time.thread_time()
      slots_LI = _place(policy, load_SLE[step - window:step].sum(0, dtype=np.float64), on,
                        slots_LI, max_moves)
      seconds.append(time.thread_time() - start)
    if before_LI is not None and slots_LI is not before_LI:
      moved.append(int(moves.moved(before_LI, slots_LI, on.gpus).sum()))
    now_SLE = load_SLE[step:step + every]
    load_SLO = np.stack([placement.gpu_load(now_LE, slots_LI, on.gpus) for now_LE in now_SLE])
    most_SL, mean_SL = load_SLO.max(-1), load_SLO.mean(-1)
    ratios.append(_ratio(most_SL.sum(-1), mean_SL.sum(-1)))
    worst = max(worst, float(_ratio(most_SL, mean_SL).max()))
  return Outcome(policy, np.concatenate(ratios), worst, tuple(moved), tuple(seconds))


def _ratio(most: np.ndarray, mean: np.ndarray) -> np.ndarray:
  return np.where(mean > 0, most / np.where(mean > 0, mean, 1), 1.0)


def _place(policy: str, weight_LE: np.ndarray, on: Cluster, previous: np.ndarray | None,
           max_moves: int) -> np.ndarray:
  """physical_to_logical of a policy; -1 where a slot is empty."""
  sizes = on.slots, on.groups, on.nodes, on.gpus
  if policy == "none":
    layers, experts = weight_LE.shape
    size = on.slots // on.gpus
    gpu_E = np.arange(experts) * on.gpus // experts
    slots_I = np.full(on.slots, -1)
    slots_I[gpu_E * size + np.arange(experts) - np.searchsorted(gpu_E, gpu_E)] = np.arange(experts)
    return np.tile(slots_I, (layers, 1))
  if policy in ("static", "eplb"):
    return eplb.rebalance_experts(weight_LE, *sizes)[0]
  extra = {"steady": {"slack": SLACK}, "limited": {"max_moves": max_moves}}.get(policy, {})
  if previous is None:
    extra = {}
  return placement.rebalance_experts(weight_LE, *sizes, previous=previous, **extra)[0]


def synthetic(steps: int, layers: int, experts: int, *, tokens: int = 16384, active: int = 8,
              skew: float = 0.6, drift: float = 0.02, domains: int = 4, shift: int = 100,
              seed: int = 0) -> np.ndarray:
  """Made-up loads, float64 [S, L, E]: domains of Zipf's popularity that drift, and traffic of them.

  Each domain of text has its own order of experts in each layer; the expert of rank r is as popular
  as r^-skew. The logarithm of popularity wanders, as a random walk that is drawn back, so that its
  spread stays what it was. The mixture of domains changes every `shift` steps: one of them, another
  each time, brings half the tokens, the rest share the other half. Tokens are then drawn (Poisson).

  Args:
    steps, layers, experts: sizes.
    tokens: of a step, each routed to `active` experts of every layer.
    skew: Zipf's exponent; 0 is balanced.
    drift: standard deviation of a step of the walk of log popularity.
    domains: of text; 1 has no shifts.
    shift: steps between two shifts.
    seed: of the random numbers.

  Raises:
    ValueError: a size or number out of range.
  """
  for name, value, least in (("steps", steps, 1), ("layers", layers, 1), ("experts", experts, 1),
                             ("tokens", tokens, 1), ("active", active, 1), ("skew", skew, 0),
                             ("drift", drift, 0), ("domains", domains, 1), ("shift", shift, 1)):
    if not value >= least or value == np.inf:
      raise ValueError(f"{name}={value}; give a number from {least} on")
  rng = np.random.default_rng(seed)
  log_E = -skew * np.log(np.arange(1, experts + 1))
  log_XLE = rng.permuted(np.tile(log_E - log_E.mean(), (domains, layers, 1)), axis=-1)
  pull = drift**2 / (drift**2 + 2 * log_E.var()) if drift else 0.0  # keeps the variance
  leading_N = rng.permutation(domains)
  load_SLE = np.empty((steps, layers, experts))
  for step in range(steps):
    popular_XLE = np.exp(log_XLE)
    popular_XLE /= popular_XLE.sum(-1, keepdims=True)
    share_X = np.full(domains, 0.5 / max(domains - 1, 1))
    share_X[leading_N[step // shift % domains]] = 0.5 if domains > 1 else 1.0
    mean_LE = np.tensordot(share_X, popular_XLE, 1)
    load_SLE[step] = rng.poisson(tokens * active * mean_LE)
    if drift:
      log_XLE = log_XLE * (1 - pull) + drift * rng.standard_normal(log_XLE.shape)
  return load_SLE
