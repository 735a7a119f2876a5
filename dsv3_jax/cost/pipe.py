"""Memory of a rank of a pipeline: its stages' weights and sums, and its schedule's slots.

One program runs on all ranks (`parallel/pipeline.py`), so that each makes room for what the fullest
needs: slots for the layers of the largest stage, and residuals of the type of stage that keeps most
of each shape. `ranks` gives that, and beside it what each rank's own stages fill.

    weights       layers of its stages collected from home, and what all ranks have (embedding,
                  head, last norm, MTP); dualpipe has each stage on two ranks
    gradients     sums for these layers and for those shared arrays, and the whole stacks at home,
                  which the sums go to when the last micro-batch is done
    activations   what a stage keeps for one micro-batch, times the slots of the schedule's tables:
                  as many as micro-batches are alive at once, and what I hands to W. Each op takes
                  what it reads out of its slot first
"""

import functools
from collections.abc import Sequence

from dsv3_jax import config
from dsv3_jax.cost import arrays, kept, work
from dsv3_jax.cost.kept import FP32, Shape
from dsv3_jax.model.cut import Kind, cut
from dsv3_jax.parallel import schedules
from dsv3_jax.parallel.schedules.simulate import peak_activations


def plan(name: str, ranks: int, microbatches: int
         ) -> tuple[schedules.Schedule, tuple[int, ...]]:
  """A schedule of at most so many micro-batches, and the most that are alive on each rank.

  These, and the slots of its buffers, do not grow with the number of micro-batches once the
  pipeline is full, but for gpipe; so that a schedule of few micro-batches is enough.

  Raises:
    ValueError: there is no such order.
  """
  few = microbatches if name == "gpipe" else min(microbatches, 4 * ranks + microbatches % 2)
  return _plan(name, ranks, few)


@functools.lru_cache(maxsize=256)
def _plan(name, ranks, microbatches):
  made = schedules.make(name, ranks, microbatches)
  return made, tuple(peak_activations(order) for order in made.orders)


@functools.lru_cache(maxsize=64)
def slots(name: str, ranks: int, microbatches: int) -> dict[str, int]:
  """Buffer -> slots of a rank (`parallel/schedules/tables.py`)."""
  made, _ = plan(name, ranks, microbatches)
  return made.ticks(not name.startswith("dualpipe")).tables().slots


def ranks(cfg: config.Config, state: dict[str, int], cpu: bool
          ) -> tuple[list[tuple[dict[str, int], str, dict[str, int], int]], int]:
  """For each rank (parts, moment, residuals of one micro-batch, bytes its own stages fill).

  Also the most micro-batches in flight.

  Raises:
    ValueError: the schedule has no order for the ranks and micro-batches, or the layers do not fit.
  """
  micros = cfg.data.batch_size // cfg.data.micro_batch
  mesh, s = cfg.runtime.mesh, kept.shape(cfg, cpu)
  schedule, peaks = plan(cfg.runtime.schedule, mesh.pipe, micros)
  room = slots(cfg.runtime.schedule, mesh.pipe, micros)
  kinds = cut(cfg.model, schedule.stages, cfg.runtime.pipeline.layers or None)
  largest = {"dense": max(k.dense for k in kinds), "moe": max(k.moe for k in kinds)}
  rows = {stack: n * schedule.chunks for stack, n in largest.items()}
  parts, residuals = _parts(cfg, s, kinds, rows, room, max(room["i"], room["w"]))
  found = []
  for rank in range(schedule.ranks):
    own = [kinds[stage] for route in schedule.routes for stage, (r, _) in enumerate(route)
           if r == rank]
    layers = {"dense": sum(k.dense for k in own), "moe": sum(k.moe for k in own)}
    fills, _ = _parts(cfg, s, own, layers, room, peaks[rank], share=True)
    found.append((state | parts, "tick", residuals, sum((state | fills).values())))
  return found, max(peaks)


def _parts(cfg: config.Config, s: Shape, kinds: Sequence[Kind], rows: dict[str, int],
           room: dict[str, int], in_flight: int, share: bool = False
           ) -> tuple[dict[str, int], dict[str, int]]:
  """Components besides the state, and residuals of one micro-batch in one stage.

  Args:
    kinds: of the stages that room is made for.
    rows: layers of each stack whose weights and sums are held.
    room: slots of the schedule's buffers.
    in_flight: micro-batches alive.
    share: the stages' own mean in place of the union of all types.
  """
  runtime, model, item = cfg.runtime, cfg.model, kept.itemsize(cfg.runtime)
  own = {a: arrays.in_use(a, runtime) * rows.get(a.stack, max(a.depth, 1))
         for a in arrays.parameters(model)}
  residuals = _residuals(cfg, s, kinds, share)
  weights = sum(n for a, n in own.items() if a.stack in rows or arrays.zero_shards(a, runtime) > 1)
  weights *= FP32
  if kept.quantizes(runtime):
    linear = sum(n for a, n in own.items() if a.linear)
    weights += linear * (2 if kept.operands(runtime).fprop_w.startswith("e") else 2 * item)
  home = sum(arrays.in_use(a, runtime) * a.depth // (
      runtime.mesh.pipe if arrays.zero_shards(a, runtime) % runtime.mesh.pipe == 0 else 1)
             for a in own if a.stack in rows)
  passing = (room["x"] + room["g"] + 2) * s.tokens * model.dim * item
  # One slot more: what an op reads is taken out of its slot in front of the branches.
  activations = ((in_flight + 1) * sum(residuals.values()) + passing
                 + (room["c"] + (room["c"] > 0)) * _crossing(cfg, s, kinds))
  return {"compute weights": weights, "gradients": FP32 * (sum(own.values()) + home),
          "activations": activations, "working set": _working(cfg, s, kinds),
          "all-to-all buffers": 2 * work.exchange(cfg, s), "compiler": 0}, residuals


def _most(kinds: Sequence[Kind], depth: int, share: bool) -> dict[str, float]:
  """Layers of each sort in one stage: the most of any, or the mean."""
  over = (lambda counts: sum(counts) / len(counts)) if share else max
  moe = [k.moe + depth * k.last for k in kinds]
  return {"dense": over([k.dense for k in kinds]), "moe": over(moe),
          "all": over([k.dense + m for k, m in zip(kinds, moe, strict=True)]),
          "last": over([int(k.last) for k in kinds])}


def _residuals(cfg: config.Config, s: Shape, kinds: Sequence[Kind], share: bool
               ) -> dict[str, int]:
  """What a stage keeps of one micro-batch; arrays of one shape serve all types of stages."""
  remat, depth = cfg.runtime.remat, cfg.model.mtp_depth
  counts = _most(kinds, depth, share)
  dense = kept.layer(cfg, s, False, remat, "stage")
  moe = kept.layer(cfg, s, True, remat, "stage")
  found = {}
  for name in dense | moe:
    both = name in dense and name in moe
    count = counts["all" if both else "moe" if name in moe else "dense"]
    found[name] = round(count * (moe if name in moe else dense)[name])
  if counts["last"]:
    found["last stage"] = round(counts["last"] * sum(work.ends(cfg, s).values()))
  return found


def _crossing(cfg: config.Config, s: Shape, kinds: Sequence[Kind]) -> int:
  """What I hands to W: gradients of the linear layers' outputs; under remat their inputs too."""
  model, runtime, P = cfg.model, cfg.runtime, s.tokens
  a, m, D = model.attention, model.moe, model.dim
  item = kept.itemsize(runtime)
  if kept.quantizes(runtime):
    item = FP32 if s.cpu else 1
  counts = _most(kinds, model.mtp_depth, False)
  H, K, N, U = a.heads, a.qk_dim, a.nope_dim, a.v_dim
  attention = H * (K + N + U) + D + (0 if a.kind == "gqa" else a.q_rank + a.kv_rank + a.rope_dim)
  dense, shared = 2 * model.dense_ffn_dim + D, 2 * m.shared * m.ffn_dim + D
  routed = 3 * m.ffn_dim + D
  if runtime.remat != "none":
    attention += 2 * D + H * U + a.q_rank + a.kv_rank
    dense, shared = dense + D + model.dense_ffn_dim, shared + D + m.shared * m.ffn_dim
    routed += D
  return round(item * (P * (counts["all"] * attention + counts["dense"] * dense
                            + counts["moe"] * shared) + counts["moe"] * s.rows * routed))


def _working(cfg: config.Config, s: Shape, kinds: Sequence[Kind]) -> int:
  """A backward pass beside a forward one, or the head."""
  model, runtime, item = cfg.model, cfg.runtime, kept.itemsize(cfg.runtime)
  moe = any(k.moe or (k.last and model.mtp_depth) for k in kinds)
  backward = work.backward(cfg, s, "moe" if moe else "dense", True)
  layers = _most(kinds, model.mtp_depth, False)["all"]
  one = {a: arrays.in_use(a, runtime) for a in arrays.parameters(model)
         if a.stack == ("moe" if moe else "dense")}
  # Gradients of a stage's weights before they are added to the sums, and weights as they multiply.
  products = round(layers * FP32 * sum(one.values()))
  casts = sum(one.values()) * (item if item < FP32 else FP32)
  last = 0
  if any(k.last for k in kinds):
    heads, chunk = work.head(cfg, s)
    last = heads + chunk
  return max(backward + products, last) + casts
