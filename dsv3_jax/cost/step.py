"""Time of a training step: kernels and all-to-alls of each stage, put into the schedule.

A stage's forward F, backward for the input I and backward for the weights W take their kernels'
time and, where nothing overlaps them, their all-to-alls'. An overlapped pair FB takes the longer of
the two, over the share of it that the compute stream is busy (`Shares.overlap`). Stages differ:
dense layers send nothing, the last stage has the head and MTP. `parallel.schedules` says which rank
does what in which order; the simulation gives the step, each rank's work and its idling.
"""

import collections
import dataclasses
import functools
import statistics
from typing import Any

from dsv3_jax import config, counts
from dsv3_jax.cost import arrays, communication, operations, timing
from dsv3_jax.cost.hardware import Hardware
from dsv3_jax.model import cut
from dsv3_jax.parallel import schedules
from dsv3_jax.parallel.schedules import formulas, simulate
from dsv3_jax.parallel.schedules.ops import Op

KINDS = {"F": "1F", "I": "1B", "B": "1B", "W": "1W", "FB": "1F1B"}  # as the authors' table 4


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage's seconds for one micro-batch: computing, and all-to-alls by direction."""

  forward: float
  inputs: float
  weights: float
  send_forward: float
  send_backward: float

  def seconds(self, kind: str) -> float:
    """Of an op that is not FB, with nothing to hide all-to-alls behind."""
    parts = {"F": self.forward + self.send_forward, "I": self.inputs + self.send_backward,
             "W": self.weights}
    return parts["I"] + parts["W"] if kind == "B" else parts[kind]


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a step costs; seconds, bytes, FLOPs.

  Attributes:
    config, hardware: of the run.
    length: of the sequences that attention sees.
    devices, ranks, microbatches: D, pipeline ranks R, micro-batches M of a data-parallel part.
    schedule: its name.
    layers: of each stage, MTP not counted.
    tokens: of a step, all devices.
    breakdown: "1F", "1B", "1W", "1F1B", "bubble", "optimizer": mean seconds over ranks; they add up
      to the step.
    optimizer: its parts: "reduce", "gather", "update".
    formula_bubble: table 2's, from the mean stage; 0 where W is longer than it is made for.
    compute: seconds of one MoE layer's kernels by class.
    exchange: one MoE layer's all-to-alls.
    stages: their times.
    flops: useful FLOPs a token by component, causal, MTP included.
    recomputed: FLOPs a token of recomputation.
  """

  config: config.Config
  hardware: Hardware
  length: int
  devices: int
  ranks: int
  microbatches: int
  schedule: str
  layers: tuple[int, ...]
  tokens: int
  breakdown: dict[str, float]
  optimizer: dict[str, float]
  formula_bubble: float
  compute: dict[str, float]
  exchange: dict[str, communication.Exchange]
  stages: tuple[Stage, ...]
  flops: dict[str, float]
  recomputed: float

  @property
  def step(self) -> float:
    """Seconds."""
    return sum(self.breakdown.values())

  @property
  def tokens_per_second(self) -> float:
    """Of one device."""
    return self.tokens / self.step / self.devices

  def flops_per_token(self, causal: bool = True, mtp: bool = False) -> float:
    """As `counts.flops_per_token`; without MTP, as the report counts, unless asked for."""
    model = self.config.model if mtp else dataclasses.replace(self.config.model, mtp_depth=0)
    return counts.flops_per_token(model, self.length, causal)

  def achieved(self, causal: bool = True, mtp: bool = False) -> float:
    """FLOP/s of one device."""
    return self.tokens_per_second * self.flops_per_token(causal, mtp)

  def mfu(self, causal: bool = True, mtp: bool = False) -> float:
    """Share of the peak in the compute dtype: bf16 under FP8 recipes too, as the report counts."""
    precision = "fp32" if self.config.runtime.compute_dtype == "float32" else "bf16"
    return self.achieved(causal, mtp) / self.hardware.peak(precision)

  def to_dict(self) -> dict[str, Any]:
    """For JSON, without the config."""
    return {
        "hardware": dataclasses.asdict(self.hardware), "devices": self.devices,
        "pipeline": {"ranks": self.ranks, "microbatches": self.microbatches,
                     "schedule": self.schedule, "layers": list(self.layers),
                     "formula_bubble_s": self.formula_bubble,
                     "stages_s": [dataclasses.asdict(s) for s in self.stages]},
        "tokens_per_step": self.tokens, "step_s": self.step, "breakdown_s": self.breakdown,
        "optimizer_s": self.optimizer, "tokens_per_second_per_device": self.tokens_per_second,
        "layer_compute_s": self.compute,
        "layer_all_to_all": {k: dataclasses.asdict(v) for k, v in self.exchange.items()},
        "flops_per_token": {
            "causal": self.flops_per_token(), "noncausal": self.flops_per_token(False),
            "causal_with_mtp": self.flops_per_token(mtp=True),
            "noncausal_with_mtp": self.flops_per_token(False, True),
            "by_component_causal_with_mtp": self.flops, "recomputed": self.recomputed},
        "mfu": {"causal": self.mfu(), "noncausal": self.mfu(False),
                "causal_with_mtp": self.mfu(mtp=True)},
        "flops_per_second_per_device": {"causal": self.achieved(),
                                        "noncausal": self.achieved(False)}}


def estimate(cfg: config.Config, hw: Hardware, attended: int = 0) -> Estimate:
  """A step of the full batch on `cfg.runtime.mesh`.

  Args:
    cfg: the run.
    hw: the devices.
    attended: length of the sequences that attention sees, where those are cut among devices so that
      each holds data.sequence_length tokens of one; 0: data.sequence_length. What they send each
      other for that is not counted.

  Raises:
    ConfigError: the hardware lacks a link that the mesh needs, or sequences are cut over devices.
    ValueError: the schedule has no order for so many ranks and micro-batches, or the layers do not
      fit the stages.
  """
  mesh, model = cfg.runtime.mesh, cfg.model
  arrays.check(cfg.runtime)
  micro = cfg.data.micro_batch
  plan = _plan(cfg.runtime.schedule, mesh.pipe, cfg.data.batch_size // micro)
  kinds = cut.cut(model, plan.stages, cfg.runtime.pipeline.layers or None)
  n = operations.numerics(cfg.runtime)
  length = cfg.data.sequence_length
  tokens = micro * length / mesh.batch_shards
  blocks, exchange, stages = _stages(cfg, kinds, tokens, attended or length, n, hw)
  found = simulate.run(plan, functools.partial(_seconds, stages, hw),
                       communication.hop(model, tokens, n, mesh, hw))
  spent = dict.fromkeys(("1F", "1B", "1W", "1F1B"), 0.0)
  for order, starts, ends in zip(plan.orders, found.starts, found.ends, strict=True):
    for op, start, end in zip(order, starts, ends, strict=True):
      spent[KINDS[op.kind]] += (end - start) / plan.ranks
  optimizer = _optimizer(cfg, kinds, plan, n, hw)
  useful, again = collections.Counter(), 0.0
  for name, kernels in blocks.items():
    times = {"dense": model.dense_layers, "moe": model.moe_layers + model.mtp_depth,
             "head": 1 + model.mtp_depth, "mtp": model.mtp_depth}[name]
    for component, flops in timing.flops(kernels).items():
      useful[component] += times * flops / tokens
    again += times * sum(timing.flops(kernels, recomputed=True).values()) / tokens
  mean = lambda name: statistics.fmean(getattr(s, name) for s in stages)
  formula = formulas.row(
      plan.name, plan.ranks, plan.microbatches,
      mean("forward") + mean("send_forward"), mean("inputs") + mean("send_backward"),
      mean("weights"), statistics.fmean(pair(s, s, hw) for s in stages))
  return Estimate(
      cfg, hw, attended or length, mesh.devices, plan.ranks, plan.microbatches,
      cfg.runtime.schedule, tuple(k.dense + k.moe for k in kinds), cfg.data.batch_size * length,
      spent | {"bubble": statistics.fmean(found.bubble), "optimizer": sum(optimizer.values())},
      optimizer, max(formula.bubble, 0.0), timing.by_class(blocks["moe"], hw), exchange, stages,
      dict(useful), again)


def stages(cfg: config.Config, kinds: tuple[cut.Kind, ...], hw: Hardware) -> tuple[Stage, ...]:
  """The stages' times for one micro-batch alone; errors as `estimate`'s.

  They bound a step from below without a simulation: no rank is done before its own work is.
  """
  micro, length = cfg.data.micro_batch, cfg.data.sequence_length
  tokens = micro * length / cfg.runtime.mesh.batch_shards
  return _stages(cfg, kinds, tokens, length, operations.numerics(cfg.runtime), hw)[2]


def _stages(cfg, kinds, tokens, attended, n, hw):
  """Kernels of blocks, all-to-alls, and the stages' times."""
  blocks = _blocks(cfg, tokens, attended, n, hw)
  exchange = communication.exchanges(cfg.model, cfg.runtime, tokens, n, hw)
  return blocks, exchange, tuple(_stage(cfg, kind, blocks, exchange, tokens, n, hw)
                                 for kind in kinds)


@functools.lru_cache(maxsize=64)
def _plan(name: str, ranks: int, microbatches: int) -> schedules.Schedule:
  """The schedule; without one, all micro-batches after another on a pipeline of one rank."""
  return schedules.make("1f1b" if name == "none" else name, ranks, microbatches)


def _blocks(cfg: config.Config, tokens: float, length: int, n: operations.Numerics, hw: Hardware
            ) -> dict[str, list[operations.Kernel]]:
  """Kernels of a dense layer, an MoE layer, the head and an MTP module's input."""
  model, mesh = cfg.model, cfg.runtime.mesh
  devices = mesh.node * mesh.gpu
  arrive = communication.rows(model.moe, mesh).arrive if devices > 1 and (
      model.moe_layers + model.mtp_depth) else 0.0
  block = functools.partial(operations.block, model, tokens, length, n=n,
                            fused=hw.fused_attention)
  return {"dense": block(moe=False, experts=0),
          "moe": block(moe=True, experts=model.moe.experts / devices, rows_in=arrive),
          "head": operations.head(model, tokens, n),
          "mtp": operations.mtp_input(model, tokens, n)}


def _stage(cfg: config.Config, kind: cut.Kind, blocks: dict[str, list[operations.Kernel]],
           exchange: dict[str, communication.Exchange], tokens: float, n: operations.Numerics,
           hw: Hardware) -> Stage:
  depth = cfg.model.mtp_depth if kind.last else 0
  times = {"dense": kind.dense, "moe": kind.moe + depth, "head": kind.last * (1 + depth),
           "mtp": depth}
  seconds = dict.fromkeys(timing.PHASES, 0.0)
  for name, number in times.items():
    if number:
      for phase, value in timing.by_phase(blocks[name], hw).items():
        seconds[phase] += number * value
  forward = times["moe"] * (exchange["dispatch"].seconds + exchange["combine"].seconds)
  backward = times["moe"] * (exchange["combine_back"].seconds + exchange["dispatch_back"].seconds)
  if cfg.runtime.remat == "layer":  # the rows were not kept, and are sent again
    backward += times["moe"] * exchange["dispatch"].seconds
  if cfg.runtime.shard_vocab:  # representations go to all who hold words, gradients come back
    mesh, near = cfg.runtime.mesh, communication.near(cfg.runtime.mesh, hw)
    group = communication.Group(mesh.node * mesh.gpu, near.node * near.gpu)
    gathered = times["head"] * communication.ring(
        group.size * tokens * cfg.model.dim * n.activation, group, hw)
    forward, backward = forward + gathered, backward + gathered
  return Stage(seconds["F"], seconds["I"], seconds["W"], forward, backward)


def pair(ahead: Stage, back: Stage, hw: Hardware) -> float:
  """Seconds of one stage's forward beside another's backward."""
  compute = ahead.forward + back.inputs + back.weights
  return max(compute, ahead.send_forward + back.send_backward) / hw.shares.overlap


def _seconds(stages: tuple[Stage, ...], hw: Hardware, op: Op) -> float:
  if op.kind == "FB":
    return pair(stages[op.forward.stage], stages[op.backward.stage], hw)
  return stages[(op.forward or op.backward).stage].seconds(op.kind)


def _optimizer(cfg: config.Config, kinds: tuple[cut.Kind, ...], plan: schedules.Schedule,
               n: operations.Numerics, hw: Hardware) -> dict[str, float]:
  """Seconds after the last micro-batch, of the rank that has most: reduce, gather, update.

  Gradients are summed in fp32, as they were accumulated; with ZeRO-1 each device updates its part
  and gathers what the others updated in the compute dtype. A rank of dualpipe holds two stages that
  another rank holds too, so that both take part. The clip's norm is one more pass over the
  gradients.
  """
  mesh, zero = cfg.runtime.mesh, cfg.runtime.zero
  copies = len(plan.routes)
  near = communication.near(mesh, hw)
  beside = copies if near.pipe == mesh.pipe else 1  # the ranks that hold the same stage
  experts = communication.Group(mesh.data * copies, near.data * beside)
  rest = communication.Group(mesh.batch_shards * copies, near.batch_shards * beside)
  moments = sum({"float32": 4, "bfloat16": 2, "float8": 1}[d]
                for d in (cfg.optim.mu_dtype, cfg.optim.nu_dtype))
  worst: dict[str, float] = {}
  for rank in range(plan.ranks):
    own = [stage for route in plan.routes for stage, (r, _) in enumerate(route) if r == rank]
    held = [_parameters(cfg, kinds[stage], stage == 0) for stage in own]
    parts = [(sum(e for e, _ in held), experts), (sum(o for _, o in held), rest)]
    width = n.activation if zero else 4.0  # an all-reduce ends by gathering the sums
    seconds = {
        "reduce": sum(communication.ring(4.0 * p, g, hw) for p, g in parts),
        "gather": sum(communication.ring(width * p, g, hw) for p, g in parts)}
    updated = sum(p / (g.size if zero else copies) for p, g in parts)
    # Gradient twice (norm, update); master and moments in and out; weights for use out.
    touched = updated * (2 * 4 + 2 * 4 + 2 * moments + n.activation)
    seconds["update"] = touched / (hw.bandwidth * hw.shares.stream)
    if not worst or sum(seconds.values()) > sum(worst.values()):
      worst = seconds
  return worst


def _parameters(cfg: config.Config, kind: cut.Kind, first: bool) -> tuple[float, float]:
  """(routed experts', all other) parameters of a stage on one device."""
  model, mesh = cfg.model, cfg.runtime.mesh
  depth, devices = (model.mtp_depth if kind.last else 0), mesh.node * mesh.gpu
  one = counts.layers(model)
  experts = (kind.moe + depth) * one["experts"] / devices
  rest = kind.dense * one["dense"] + (kind.moe + depth) * one["moe"] + depth * one["mtp"]
  words = (first + kind.last) * model.vocab_size * model.dim
  if cfg.runtime.shard_vocab:
    return experts + words / devices, rest
  return experts, rest + words
