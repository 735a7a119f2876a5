"""Memory of one training step on each device, by component, and of the cache that inference keeps.

The numbers are counted, not fitted: parameters from their shapes and homes (`arrays.py`), residuals
from the code that keeps them (`kept.py`), the slots of a pipeline's buffers from its schedule. A
step's memory is what lives from step to step, and on top the fullest of a few moments:

    head         the last chunk of the loss: all residuals are alive, two arrays of logits besides
    layer        the backward pass of a layer: the same residuals, and what that layer works with
    update       all gradients, when the last layer is done

The reference is XLA's own buffer assignment, `memory_analysis()` of the compiled step: arguments +
results - those that share a buffer + temporaries. What it adds of its own on a CPU is in the model
where it is more than crumbs, as component "compiler":

    - A loop that fills an array starts from zeros, and XLA's scheduler makes zeros early. They are
      alive from the beginning of the step: gradients of stacked layers, of the head and of the
      embedding, and for each grouped matmul its result.
    - Layers outside a loop are merged with their own recomputation (`kept.py`).

On a GPU the scheduler does not hurry zeros, cuDNN's attention and FP8 kernels keep no operands in
fp32, and bf16 matmuls are not made of fp32 ones; there "compiler" and half of "working set" are an
upper bound. XLA for GPUs takes temporaries from one arena too, so the sum is to be compared in the
same way.
"""

import dataclasses
import functools
from collections.abc import Mapping

from dsv3_jax import config
from dsv3_jax.cost import arrays, kept, pipe, work
from dsv3_jax.cost.kept import FP32, Shape

MOMENTS = {"float32": 4, "bfloat16": 2}
COMPONENTS = ("master weights", "moments", "batch and counters", "compute weights", "gradients",
              "activations", "working set", "all-to-all buffers", "compiler")


@dataclasses.dataclass(frozen=True)
class Rank:
  """One device of a pipeline rank.

  Attributes:
    parts: component -> bytes at the fullest moment, in the order of COMPONENTS.
    moment: which that is: head, layer or update; for a pipeline "tick".
    kept: what -> bytes that are kept of one micro-batch for its backward pass (of a pipeline: by
      one stage).
    filled: bytes that this rank's own stages fill; the rest is room that other ranks need.
  """

  parts: Mapping[str, int]
  moment: str
  kept: Mapping[str, int]
  filled: int

  @property
  def total(self) -> int:
    return sum(self.parts.values())


@dataclasses.dataclass(frozen=True)
class Memory:
  """Memory of a training step.

  Attributes:
    ranks: of each pipeline rank, one device.
    host: bytes on the host for each process group as a whole: the EMA of the parameters.
    in_flight: micro-batches whose activations a rank holds at most.
  """

  ranks: tuple[Rank, ...]
  host: int
  in_flight: int

  @property
  def worst(self) -> Rank:
    return max(self.ranks, key=lambda rank: rank.total)

  @property
  def total(self) -> int:
    """Bytes on the fullest device."""
    return self.worst.total

  def to_dict(self) -> dict:
    return {"total": self.total, "host": self.host, "in_flight": self.in_flight,
            "ranks": [{"total": r.total, "moment": r.moment, "parts": dict(r.parts),
                       "kept": dict(r.kept), "filled": r.filled} for r in self.ranks]}


@functools.lru_cache(maxsize=1024)
def _homes(model: config.Model, mu: str, nu: str, mesh: config.Mesh, zero: int, words: bool
           ) -> tuple[int, int]:
  """Bytes of master weights and of both of Adam's moments on one device."""
  runtime = config.Runtime(mesh=mesh, zero=zero, shard_vocab=words)
  found = arrays.parameters(model)
  home = sum(arrays.at_home(a, runtime) for a in found)
  # float8: E4M3 and a scale for 128 values of a row; on a mesh every device has all of it.
  float8 = sum(a.size + FP32 * (a.size // a.shape[-1]) * -(-a.shape[-1] // 128) for a in found)
  return FP32 * home, sum(home * MOMENTS[d] if d in MOMENTS else float8 for d in (mu, nu))


def state_bytes(cfg: config.Config) -> dict[str, int]:
  """What lives from step to step, and the batch: exact."""
  found, masters, moments = arrays.parameters(cfg.model), *_homes(
      cfg.model, cfg.optim.mu_dtype, cfg.optim.nu_dtype, cfg.runtime.mesh, cfg.runtime.zero,
      cfg.runtime.shard_vocab)
  micro = cfg.data.micro_batch
  local = cfg.data.batch_size // micro * (micro // cfg.runtime.mesh.batch_shards)
  tokens = FP32 * local * (cfg.data.sequence_length + 1)
  history = 0
  texts = kept.operands(cfg.runtime)
  if kept.quantizes(cfg.runtime) and "delayed" in " ".join(map(str, vars(texts).values())):
    history = sum(FP32 * 2 * texts.history * max(a.depth, 1) for a in found if a.linear)
  return {"master weights": masters, "moments": moments,
          "batch and counters": tokens + FP32 * (arrays.biases(cfg.model) + 8) + history}


def cache_bytes(model: config.Model, tokens: int, batch: int = 1, dtype: str = "bfloat16") -> int:
  """Bytes of the inference cache of `batch` sequences of so many tokens.

  Per token and layer C + R numbers of latent and rotary key (70,272 bytes a token for v3 in bf16),
  or the keys and values of grouped-query attention. MTP's own layer is not counted.

  Raises:
    ConfigError: no such dtype.
  """
  sizes = {"float32": 4, "bfloat16": 2, "float8": 1}
  if dtype not in sizes:
    raise config.ConfigError(f"dtype={dtype!r} of the cache must be one of {', '.join(sizes)}")
  return model.layers * model.attention.cached * sizes[dtype] * tokens * batch


def estimate(cfg: config.Config, device: str = "cpu") -> Memory:
  """Memory of a training step of `cfg` on each rank of its pipeline.

  Args:
    cfg: model, runtime, optimizer and batch are read.
    device: "cpu", as XLA for CPUs compiles it; or "gpu", with FP8 kernels (see the top).

  Raises:
    ConfigError: sequences are cut over devices.
  """
  cpu = device == "cpu"
  arrays.check(cfg.runtime)
  host = FP32 * sum(a.size for a in arrays.parameters(cfg.model)) if cfg.optim.ema_decay else 0
  if cfg.runtime.schedule != "none":
    ranks, in_flight = pipe.ranks(cfg, state_bytes(cfg), cpu)
    return Memory(tuple(Rank(_ordered(r[0]), *r[1:]) for r in ranks), host, in_flight)
  return Memory((alone(cfg, cpu),), host, 1)


def alone(cfg: config.Config, cpu: bool, least: tuple[Shape, int] | None = None) -> Rank:
  """Without a pipeline.

  Args:
    cfg, cpu: as `estimate`'s.
    least: for `needed.py`, the shape of a layer in place of this program's, and bytes of weights
      besides the masters, where those are fewer. Gradients then go into their sums as they come.
  """
  runtime, model = cfg.runtime, cfg.model
  s = least[0] if least else kept.shape(cfg, cpu)
  found = arrays.parameters(model)
  grads = {a: FP32 * arrays.in_use(a, runtime) * max(a.depth, 1) for a in found}
  depths = {"dense": model.dense_layers, "moe": model.moe_layers, "mtp": model.mtp_depth}
  loops = {stack for stack, depth in depths.items() if kept.looped(runtime, depth)}
  residuals: dict[str, dict[str, int]] = {"ends": work.ends(cfg, s)}
  zeros = 0
  for stack, depth in depths.items():
    if depth:
      place = "loop" if stack in loops else "straight"
      of = kept.layer(cfg, s, stack != "dense", kept.policy(runtime, depth), place)
      residuals[stack] = {name: depth * n for name, n in of.items()}
      if cpu and stack not in loops:
        residuals[stack]["score tiles"] = depth * kept.scores(cfg, s)
      if cpu and stack != "dense":
        zeros += work.starts(cfg, s) if stack in loops else depth * work.late_starts(cfg, s)
  weights = work.weights(cfg, depths, cpu)
  weights = min(weights, least[1]) if least else weights
  micros = cfg.data.batch_size // cfg.data.micro_batch
  sums = sum(grads.values()) if micros > 1 else 0  # over micro-batches
  early = sum(n for a, n in grads.items() if a.name == "embedding_VD" or a.stack in loops
              or (cpu and a.experts))
  heads, last = work.head(cfg, s)
  all_residuals = sum(sum(r.values()) for r in residuals.values())
  moments = {"head": (early + heads, all_residuals, last)}
  # Backwards through the stacks: residuals of one go when it is done, those of a loop all at once.
  alive, made = all_residuals, early + grads[next(a for a in found if a.name == "head_DV")]
  for stack in ("mtp", "moe", "dense"):
    if depths[stack]:
      moments[stack] = (made, alive, work.backward(cfg, s, stack, stack in loops))
      alive -= sum(residuals[stack].values())
      made += sum(n for a, n in grads.items() if a.stack == stack and stack not in loops
                  and not (cpu and a.experts))
  moments["update"] = (sum(grads.values()), 0, 0)
  if least and sums:
    moments = {name: (0, *others) for name, (_, *others) in moments.items()}
  moment = max(moments, key=lambda m: sum(moments[m]))
  made, alive, working = moments[moment]
  during = moment != "update"
  parts = state_bytes(cfg) | {
      "compute weights": weights * during, "gradients": made + sums, "activations": alive,
      "working set": working,
      "all-to-all buffers": work.exchange(cfg, s) * (moment in ("mtp", "moe")),
      "compiler": zeros * during}
  names: dict[str, int] = {}
  for stack in residuals.values():
    for name, n in stack.items():
      names[name] = names.get(name, 0) + n
  return Rank(_ordered(parts), moment, names, sum(parts.values()))


def _ordered(parts: Mapping[str, int]) -> dict[str, int]:
  return {name: int(parts[name]) for name in COMPONENTS}
