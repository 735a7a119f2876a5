"""The least memory that a plan needs, whoever runs it: for `plan.py`, which compares plans.

`memory.py` counts what this code's one program for all ranks holds. A plan needs less. Here a rank
holds only what its own stages keep, masters and moments of theirs without ZeRO-1 too; weights in
the form in which they multiply, and not collected masters besides; dispatched rows as many as the
router sends in the mean, not as many as fixed buffers have room for. Residuals, remat and the
schedule's micro-batches in flight are the same.
"""

import collections
import functools
from collections.abc import Sequence

from dsv3_jax import config
from dsv3_jax.cost import arrays, kept, memory, pipe, work
from dsv3_jax.cost.kept import FP32, Shape
from dsv3_jax.model.cut import Kind, cut
from dsv3_jax.parallel import odds

_MOMENTS = memory.MOMENTS | {"float8": 1 + FP32 / 128}  # bytes a value, with its share of a scale


def shape(cfg: config.Config) -> Shape:
  """As `kept.shape` on a GPU, with the mean number of rows that arrive, in whole blocks."""
  s, mesh, m = kept.shape(cfg, False), cfg.runtime.mesh, cfg.model.moe
  devices = mesh.node * mesh.gpu
  block = 128 if kept.quantizes(cfg.runtime) else 64
  rows = -(-(s.tokens * m.active + s.experts * block // 2) // block) * block
  if devices == 1:
    return s._replace(rows=rows, arrived=s.tokens)
  groups = (m.groups, m.active_groups) if m.groups % mesh.node == 0 else (1, 1)
  return s._replace(rows=rows, arrived=round(
      s.tokens * odds.expected_units(m.experts, m.active, *groups, devices)))


def estimate(cfg: config.Config) -> memory.Memory:
  """Needed memory of a step on each rank.

  Raises:
    ValueError: the schedule has no order for the ranks and micro-batches, or the layers do not fit
      the stages.
  """
  model, mesh = cfg.model, cfg.runtime.mesh
  state, s = memory.state_bytes(cfg), shape(cfg)
  host = FP32 * sum(a.size for a in arrays.parameters(model)) if cfg.optim.ema_decay else 0
  if cfg.runtime.schedule == "none":
    weights, _ = _weights(cfg, _layers(model, [Kind(model.dense_layers, model.moe_layers, True)],
                                       True))
    return memory.Memory((memory.alone(cfg, False, (s, weights)),), host, 1)
  micros = cfg.data.batch_size // cfg.data.micro_batch
  schedule, peaks = pipe.plan(cfg.runtime.schedule, mesh.pipe, micros)
  kinds = cut(model, schedule.stages, cfg.runtime.pipeline.layers or None)
  own = [[stage for route in schedule.routes for stage, (r, _) in enumerate(route) if r == rank]
         for rank in range(schedule.ranks)]
  stages = [[kinds[stage] for stage in of] for of in own]
  firsts = [0 in of for of in own]
  alike: dict[tuple, memory.Rank] = {}
  ranks = []
  for key in zip(map(tuple, stages), firsts, peaks, strict=True):
    if key not in alike:
      parts, residuals = _rank(cfg, s, *key)
      parts = {name: int((state | parts).get(name, 0)) for name in memory.COMPONENTS}
      alike[key] = memory.Rank(parts, "tick", residuals, sum(parts.values()))
    ranks.append(alike[key])
  return memory.Memory(tuple(ranks), host, max(peaks))


def _layers(model: config.Model, kinds: Sequence[Kind], first: bool) -> dict[str, int]:
  """How many layers of each stack, and which of the other arrays, stages of these kinds have."""
  last = any(k.last for k in kinds)
  return {"dense": sum(k.dense for k in kinds), "moe": sum(k.moe for k in kinds),
          "mtp": model.mtp_depth * last, "embedding_VD": first, "head_DV": last,
          "final_norm_D": last}


def _weights(cfg: config.Config, layers: dict[str, int]) -> tuple[int, int]:
  """Bytes of the weights as they multiply, besides the masters; and how many values there are."""
  runtime, model, item = cfg.runtime, cfg.model, kept.itemsize(cfg.runtime)
  fp8 = kept.quantizes(runtime) and kept.operands(runtime).fprop_w.startswith("e")
  weights = values = 0
  for stack, (linear, others) in _sizes(model, runtime.mesh.node * runtime.mesh.gpu,
                                        runtime.shard_vocab).items():
    # FP8 in both forms, a byte each; in fp32 without ZeRO-1 the masters themselves multiply.
    plain = item if item < FP32 or runtime.zero else 0
    values += (linear + others) * layers[stack]
    weights += (linear * (2 if fp8 else plain) + others * plain) * layers[stack]
  return weights, values


def _rank(cfg: config.Config, s: Shape, kinds: Sequence[Kind], first: bool, in_flight: int
          ) -> tuple[dict[str, int], dict[str, int]]:
  """Components, and the mean residuals of a micro-batch in one of the stages.

  Of the state the masters and moments without ZeRO-1 alone, which then are its own stages'.
  """
  runtime, model, item = cfg.runtime, cfg.model, kept.itemsize(cfg.runtime)
  last, layers = any(k.last for k in kinds), _layers(model, kinds, first)
  fp8 = kept.quantizes(runtime) and kept.operands(runtime).fprop_w.startswith("e")
  weights, values = _weights(cfg, layers)
  state = {} if runtime.zero else {
      "master weights": FP32 * values,
      "moments": sum(round(values * _MOMENTS[d]) for d in (cfg.optim.mu_dtype,
                                                           cfg.optim.nu_dtype))}
  totals: collections.Counter = collections.Counter()
  for k in kinds:
    for moe, n in ((False, k.dense), (True, k.moe + model.mtp_depth * k.last)):
      if n:
        totals.update({name: n * size for name, size in _kept(cfg, s, moe).items()})
    if k.last:
      totals.update({"last stage": sum(work.ends(cfg, s).values())})
  residuals = {name: round(n / len(kinds)) for name, n in totals.items()}
  moe = bool(layers["moe"] + layers["mtp"])
  working = work.backward(cfg, s, "moe" if moe else "dense", True)
  if runtime.schedule.startswith("dualpipe"):  # beside a forward
    working *= 2
  if last:
    working = max(working, sum(work.head(cfg, s)))
  exchange = 2 * s.arrived * model.dim * (item + (1 if fp8 else item)) if s.room and moe else 0
  return state | {"compute weights": weights, "gradients": FP32 * values,
          "activations": in_flight * sum(residuals.values()), "working set": working,
          "all-to-all buffers": exchange}, residuals


@functools.lru_cache(maxsize=64)
def _sizes(model: config.Model, devices: int, words: bool) -> dict[str, tuple[int, int]]:
  """Stack -> values of one of its layers in use: those of linear layers, and all others."""
  runtime = config.Runtime(mesh=config.Mesh(gpu=devices), shard_vocab=words)
  found: dict[str, tuple[int, int]] = {}
  for a in arrays.parameters(model):
    linear, others = found.get(a.stack, (0, 0))
    n = arrays.in_use(a, runtime)
    found[a.stack] = (linear + n, others) if a.linear else (linear, others + n)
  return found


_residuals: dict[tuple, dict[str, int]] = {}


def _kept(cfg: config.Config, s: Shape, moe: bool) -> dict[str, int]:
  """`kept.layer`, once for all plans that agree on what it reads."""
  r = cfg.runtime
  key = cfg.model, r.compute_dtype, r.recipe, r.fp8, r.remat, s, moe
  if key not in _residuals:
    _residuals[key] = kept.layer(cfg, s, moe, r.remat, "stage")
  return _residuals[key]
