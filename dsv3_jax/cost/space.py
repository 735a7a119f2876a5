"""What `plan.py` chooses from: meshes, schedules, micro-batches, remat, ZeRO; and quick bounds.

A choice leaves the model, the numerics and the batch alone. Layers are dealt out to stages so that
the slowest stage takes as little as possible; the head and MTP make the last one heavy.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

from dsv3_jax import config
from dsv3_jax.cost import step
from dsv3_jax.cost.hardware import Hardware
from dsv3_jax.model.cut import Kind, cut
from dsv3_jax.parallel import schedules

SEQUENCES = (1, 2, 4, 8)  # of a micro-batch on one device
ROOM = 1.5  # of dispatch's buffers, over the mean share
REMATS = ("none", "report", "layer")


class Choice(NamedTuple):
  """A point of the search. `sequences`: of a micro-batch on each device."""

  pipe: int
  data: int
  node: int
  gpu: int
  schedule: str
  sequences: int
  remat: str
  zero: int

  @property
  def experts(self) -> int:
    """Devices that cut the experts."""
    return self.node * self.gpu

  @property
  def shards(self) -> int:
    return self.data * self.node * self.gpu


class Illegal(ValueError):
  """A choice that the model, the batch or the schedule does not allow: (family's reason)."""


def divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def choices(cfg: config.Config, devices: int, hw: Hardware) -> Iterator[Choice]:
  """All choices for so many devices, legal or not.

  A `gpu` axis is no longer than the hardware's fast domain, and is filled before `node` is used:
  as many devices elsewhere would only be slower.
  """
  layers = cfg.model.layers + cfg.model.mtp_depth
  moe = cfg.model.moe_layers + cfg.model.mtp_depth
  fast = min(hw.fast_devices, devices)
  for ranks in divisors(devices):
    if ranks > layers:
      break
    names = config.SCHEDULES[2:] if ranks > 1 else ("none", "dualpipe_v")
    # node and gpu cut experts and words; a model with neither to cut uses data alone.
    for experts in divisors(devices // ranks) if moe or cfg.runtime.shard_vocab else (1,):
      if moe and cfg.model.moe.experts % experts:
        continue
      gpu = max(d for d in divisors(experts) if d <= fast)
      if experts > fast and gpu < fast and fast % gpu == 0:
        continue
      for schedule in names:
        for sequences in SEQUENCES:
          for remat in REMATS:
            for zero in (1, 0) if devices > 1 else (0,):
              yield Choice(ranks, devices // ranks // experts, experts // gpu, gpu, schedule,
                           sequences, remat, zero)


def microbatches(cfg: config.Config, choice: Choice) -> int:
  """Of a step.

  Raises:
    Illegal: the batch does not divide.
  """
  micro = choice.sequences * choice.shards
  count, rest = divmod(cfg.data.batch_size, micro)
  if rest or not count:
    raise Illegal(f"a micro-batch of {micro} sequences does not divide the batch of "
                  f"{cfg.data.batch_size}")
  return count


def check(cfg: config.Config, choice: Choice) -> int:
  """Micro-batches of a step, if the choice is legal.

  Raises:
    Illegal: why it is not.
  """
  count = microbatches(cfg, choice)
  R, name = choice.pipe, choice.schedule
  if name.startswith("dualpipe") and count < 2 * R:
    raise Illegal(f"{count} micro-batches; {name} on {R} ranks wants {2 * R}")
  if name == "dualpipe" and (R % 2 or count % 2):
    raise Illegal("dualpipe wants even numbers of ranks and micro-batches")
  stages = 2 * R if name == "dualpipe_v" else R
  if stages > cfg.model.layers + cfg.model.mtp_depth:
    raise Illegal(f"{stages} stages, and {cfg.model.layers} layers")
  if choice.zero and "float8" in (cfg.optim.mu_dtype, cfg.optim.nu_dtype):
    raise Illegal("float8 moments are not cut by ZeRO-1")
  return count


def configured(cfg: config.Config, choice: Choice, layers: tuple[int, ...] = (),
               batch: int | None = None) -> config.Config:
  """The config of a choice; `batch`: with another batch.

  A ramp begins with whole micro-batches, and as many as the schedule wants (data.batch_start). A
  cut of the vocabulary that does not come out even is left out. Buffers of dispatch that have room
  for the worst case (factor 0), which no memory has, get ROOM times the mean share.
  """
  r, micro = cfg.runtime, choice.sequences * choice.shards
  runtime = dataclasses.replace(
      r, mesh=config.Mesh(choice.pipe, choice.data, choice.node, choice.gpu),
      pipeline=config.Pipeline(choice.schedule, layers), remat=choice.remat, zero=choice.zero,
      shard_vocab=r.shard_vocab and cfg.model.vocab_size % choice.experts == 0,
      dispatch=dataclasses.replace(r.dispatch, factor=ROOM) if choice.experts > 1 and (
          not r.dispatch.factor) else r.dispatch)
  least = 2 * choice.pipe if choice.schedule.startswith("dualpipe") else 1
  start = max(-(-cfg.data.batch_start // micro), least) * micro
  if batch or not cfg.data.batch_start or start >= cfg.data.batch_size:
    start = 0
  data = dataclasses.replace(cfg.data, microbatch=micro, batch_start=start,
                             batch_size=batch or cfg.data.batch_size)
  return dataclasses.replace(cfg, runtime=runtime, data=data)


class Times:
  """Seconds of one dense layer, one MoE layer and the end, by choice; each is computed once."""

  def __init__(self, cfg: config.Config, hw: Hardware):
    self._cfg, self.hw = cfg, hw
    self._known: dict[tuple, tuple[step.Stage, ...]] = {}
    self._stages: dict[tuple, step.Stage] = {}

  def of(self, choice: Choice) -> tuple[step.Stage, ...]:
    """ConfigError where the hardware lacks a link."""
    key = choice.node, choice.gpu, choice.sequences, choice.remat
    if key not in self._known:
      alone = choice._replace(pipe=1, data=1, schedule="none", zero=0)
      self._known[key] = step.stages(
          configured(self._cfg, alone, batch=alone.sequences * alone.shards),
          (Kind(1, 0, False), Kind(0, 1, False), Kind(0, 0, True)), self.hw)
    return self._known[key]

  def stage(self, choice: Choice, kind: Kind) -> step.Stage:
    key = choice.node, choice.gpu, choice.sequences, choice.remat, kind
    if key not in self._stages:
      dense, moe, end = map(_numbers, self.of(choice))
      self._stages[key] = step.Stage(*(kind.dense * d + kind.moe * m + kind.last * e
                                       for d, m, e in zip(dense, moe, end, strict=True)))
    return self._stages[key]


def _numbers(s: step.Stage) -> tuple[float, ...]:
  return s.forward, s.inputs, s.weights, s.send_forward, s.send_backward


@functools.lru_cache(maxsize=4096)
def _deal(layers: int, dense: int, stages: int, costs: tuple[float, float, float]
          ) -> tuple[int, ...]:
  """Layers of each stage such that the slowest takes least: smallest limit that still fits."""
  a, b, end = costs
  cost = [a] * dense + [b] * (layers - dense)

  def fill(limit: float) -> list[int] | None:
    counts, at = [], 0
    for s in range(stages):
      room, n = limit - (end if s == stages - 1 else 0), 0
      while at + n < layers and room >= cost[at + n] - 1e-12:
        room -= cost[at + n]
        n += 1
      counts.append(n)
      at += n
    return counts if at == layers else None

  low, high = max(max(cost), end), sum(cost) + end
  for _ in range(40):
    middle = (low + high) / 2
    low, high = (low, middle) if fill(middle) else (middle, high)
  return tuple(fill(high))


def layers(cfg: config.Config, choice: Choice, times: Times) -> tuple[int, ...]:
  """Of each stage, dealt out by time; empty where that is no quicker than the even cut."""
  if choice.schedule == "none":
    return ()
  stages = choice.pipe * (2 if choice.schedule == "dualpipe_v" else 1)
  costs = tuple(_work(s, choice.schedule) for s in times.of(choice))
  found = _deal(cfg.model.layers, cfg.model.dense_layers, stages, costs)
  worst = [max(_work(times.stage(choice, k), choice.schedule) for k in _cut(cfg.model, stages, of))
           for of in (found, ())]
  return found if worst[0] < worst[1] * (1 - 1e-9) else ()


@functools.lru_cache(maxsize=1024)
def _cut(model: config.Model, stages: int, counts: tuple[int, ...]) -> tuple[Kind, ...]:
  return cut(model, stages, counts or None)


def _work(s: step.Stage, schedule: str) -> float:
  """Least seconds that one unit of a stage takes of its rank."""
  compute, sent = s.forward + s.inputs + s.weights, s.send_forward + s.send_backward
  return max(compute, sent) if schedule.startswith("dualpipe") else compute + sent


class _Ops(NamedTuple):
  """How often each rank does which op: (kind, forward's stage, backward's stage) -> number.

  `more`: how many more for two micro-batches more, once the pipeline is full.
  """

  counts: tuple[dict[tuple, int], ...]
  more: tuple[dict[tuple, int], ...]
  microbatches: int
  first: tuple[int, ...]  # of each rank, its earliest stage on any route


def _counted(made: schedules.Schedule) -> tuple[collections.Counter, ...]:
  return tuple(collections.Counter(
      (op.kind, op.forward and op.forward.stage, op.backward and op.backward.stage)
      for op in order) for order in made.orders)


@functools.lru_cache(maxsize=256)
def _ops(name: str, ranks: int, microbatches: int) -> _Ops:
  few = microbatches if name == "gpipe" else min(microbatches, 4 * ranks + microbatches % 2)
  made = schedules.make(name, ranks, few)
  counts = more = _counted(made)
  if few < microbatches:
    after = _counted(schedules.make(name, ranks, few + 2))
    more = tuple(a - b for a, b in zip(after, counts, strict=True))
  first = tuple(min(stage for route in made.routes for stage, (r, _) in enumerate(route)
                    if r == rank) for rank in range(ranks))
  return _Ops(counts, more, few, first)


def bound(cfg: config.Config, choice: Choice, counts: tuple[int, ...], times: Times) -> float:
  """Seconds that a step cannot be shorter than.

  Its busiest rank does all of its ops, and none before the first micro-batch has come to it.
  """
  micros = microbatches(cfg, choice)
  if choice.schedule == "none":
    whole = Kind(cfg.model.dense_layers, cfg.model.moe_layers, True)
    return micros * _work(times.stage(choice, whole), "none")
  ops = _ops(choice.schedule, choice.pipe, micros)
  stages = [times.stage(choice, k) for k in _cut(
      cfg.model, choice.pipe * (2 if choice.schedule == "dualpipe_v" else 1), counts)]
  arrives = list(itertools.accumulate((s.seconds("F") for s in stages), initial=0.0))
  pairs = (micros - ops.microbatches) // 2

  def seconds(op: tuple) -> float:
    kind, ahead, back = op
    if kind == "FB":
      return step.pair(stages[ahead], stages[back], times.hw)
    return stages[back if ahead is None else ahead].seconds(kind)

  longest = 0.0
  for few, more, first in zip(ops.counts, ops.more, ops.first, strict=True):
    busy = sum(n * seconds(op) for op, n in few.items())
    busy += pairs and pairs * sum(n * seconds(op) for op, n in more.items())
    longest = max(longest, arrives[first] + busy)
  return longest
