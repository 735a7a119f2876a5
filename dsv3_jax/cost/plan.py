"""The fastest plans for a number of devices that fit their memory, and why the others lose.

A search in three steps, none of which knows what the report chose. Every choice of `space.py` gets
a lower bound of its step's time: the work of its busiest rank. In the order of the bounds they are
given their memory (`needed.py`), and what fits a simulated step (`step.py`), until no bound is
below the worst of the best. So the best are the best of all, not of a sample.

Why the rest lose is asked value by value: the best plan with, say, 8 pipeline ranks is looked for
in the same way, and compared with the best of all.
"""

import collections
import dataclasses
import heapq
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from dsv3_jax import config
from dsv3_jax.cost import memory, needed, space, step
from dsv3_jax.cost.hardware import Hardware
from dsv3_jax.cost.space import Choice, Illegal
from dsv3_jax.readable import duration

RESERVE = 0.05  # of a device's memory: the driver, the communication library, fragmentation
AXES = types.MappingProxyType({  # of a choice: what it is called
    "pipe": "pipeline ranks", "experts": "devices that share the experts",
    "schedule": "schedule", "sequences": "sequences a micro-batch and device", "remat": "remat",
    "zero": "ZeRO stage"})


@dataclasses.dataclass(frozen=True)
class Plan:
  """A plan that fits.

  Attributes:
    choice: what was chosen, layers: of each stage ((): evenly).
    config: with the choice in it.
    memory: needed of each rank.
    time: of a step.
  """

  choice: Choice
  layers: tuple[int, ...]
  config: config.Config
  memory: memory.Memory
  time: step.Estimate

  @property
  def step(self) -> float:
    """Seconds."""
    return self.time.step

  @property
  def compute(self) -> float:
    """Mean seconds of kernels of a rank."""
    work = sum(s.forward + s.inputs + s.weights for s in self.time.stages)
    return work * self.time.microbatches / self.time.ranks

  @property
  def exposed(self) -> float:
    """Mean seconds that a rank is busy and no kernel runs: all-to-alls that nothing hides."""
    spent = self.time.breakdown
    return sum(spent[k] for k in ("1F", "1B", "1W", "1F1B")) - self.compute

  def overrides(self, base: config.Config) -> list[str]:
    """`--config.KEY=VALUE` for what differs from `base`."""
    return _changes(config.to_dict(base), config.to_dict(self.config), "--config")

  def notes(self, base: config.Config) -> list[str]:
    """What to know before the plan is run."""
    found = []
    before, after = base.data.batch_start, self.config.data.batch_start
    if before != after:
      found.append(
          f"batches begin at {after or self.config.data.batch_size} sequences, not at {before}: "
          f"{self.choice.schedule} on {self.choice.pipe} rank(s) has no order for "
          f"{before / self.config.data.microbatch:g} micro-batches")
    old, new = base.runtime, self.config.runtime
    if old.dispatch.factor != new.dispatch.factor:
      found.append(f"runtime.dispatch.factor={new.dispatch.factor:g}, over the mean share: buffers "
                   f"for the worst case ({old.dispatch.factor:g}) would be larger and slower")
    if old.shard_vocab and not new.shard_vocab:
      found.append(f"runtime.shard_vocab=false: {self.choice.experts} devices do not divide "
                   f"model.vocab_size={base.model.vocab_size}")
    return found

  def to_dict(self, base: config.Config) -> dict[str, Any]:
    return {"choice": self.choice._asdict(), "layers": list(self.layers), "step_s": self.step,
            "breakdown_s": self.time.breakdown, "compute_s": self.compute,
            "exposed_all_to_all_s": self.exposed, "mfu": self.time.mfu(),
            "tokens_per_second_per_device": self.time.tokens_per_second,
            "microbatches": self.time.microbatches,
            "memory": {"needed": self.memory.total, "in_flight": self.memory.in_flight,
                       "parts": dict(self.memory.worst.parts)},
            "overrides": self.overrides(base), "notes": self.notes(base)}


def _changes(old: Any, new: Any, path: str) -> list[str]:
  if isinstance(old, dict):
    return [text for name in old for text in _changes(old[name], new[name], f"{path}.{name}")]
  if old == new:
    return []
  if isinstance(new, tuple):
    return [f"{path}={','.join(map(str, new)) or '()'}"]
  return [f"{path}={str(new).lower() if isinstance(new, bool) else new}"]


def held(cfg: config.Config) -> str:
  """What the search leaves as the config has it, and a step's time depends on."""
  r, o = cfg.runtime, cfg.optim
  sent = f"dispatch {r.dispatch.form}, {r.dispatch.transport}"
  if not cfg.model.moe_layers + cfg.model.mtp_depth:
    sent = "no experts"
  elif r.dispatch.transport == "dense":
    sent += f" (whole buffers, factor {r.dispatch.factor or space.ROOM:g})"
  return (f"recipe {r.recipe}, {r.compute_dtype}; {sent}; vocabulary "
          f"{'cut over node and gpu' if r.shard_vocab else 'whole'}; moments "
          f"{o.mu_dtype}, {o.nu_dtype}")


class Loser(NamedTuple):
  """A family of plans that share one value: its best plan, or none, and why it loses."""

  axis: str
  value: Any
  best: Plan | None
  reason: str


class Found(NamedTuple):
  """What a search found.

  Attributes:
    best: fastest first.
    losers: families, by axis.
    counted: how many choices there were ("choices"), were illegal, did not fit and were simulated.
  """

  best: list[Plan]
  losers: list[Loser]
  counted: dict[str, int]


class Search:
  """Plans of `cfg` on so many devices.

  Args:
    cfg: model, numerics and batch; its mesh and schedule do not matter.
    devices: how many.
    hw: of what kind.
    reserve: share of the memory that a plan must leave.
    program: whether the memory of this code's own program (`memory.estimate`) has to fit, in place
      of what the plan needs.
    keep: only choices for which it is true are looked at.

  Raises:
    ConfigError: there is no choice at all.
  """

  def __init__(self, cfg: config.Config, devices: int, hw: Hardware, reserve: float = RESERVE,
               program: bool = False, keep: Callable[[Choice], bool] = lambda choice: True):
    self.cfg, self.hw, self.program = cfg, hw, program
    self.room = int(hw.memory * (1 - reserve))
    self._times = space.Times(cfg, hw)
    self._layers: dict[Choice, tuple[int, ...]] = {}
    self._memory: dict[Choice, memory.Memory] = {}
    self._plans: dict[Choice, Plan] = {}
    self.illegal: dict[Choice, str] = {}
    self._bounds: dict[Choice, float] = {}
    for choice in space.choices(cfg, devices, hw):
      if not keep(choice):
        continue
      try:
        space.check(cfg, choice)
        self._layers[choice] = space.layers(cfg, choice, self._times)
        self._bounds[choice] = space.bound(cfg, choice, self._layers[choice], self._times)
      except (Illegal, config.ConfigError) as e:
        self.illegal[choice] = str(e)
    if not self._bounds:
      reasons = collections.Counter(self.illegal.values())
      why = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
      raise config.ConfigError(f"--gpus={devices}: no plan is legal for data.batch_size="
                               f"{cfg.data.batch_size}{why}; choose another number or batch")

  def memory(self, choice: Choice) -> memory.Memory:
    """Of the plan with the choice; each is computed once."""
    if choice not in self._memory:
      cfg = self._config(choice)
      self._memory[choice] = memory.estimate(cfg, "gpu") if self.program else needed.estimate(cfg)
    return self._memory[choice]

  def _config(self, choice: Choice) -> config.Config:
    return space.configured(self.cfg, choice, self._layers[choice])

  def plan(self, choice: Choice) -> Plan | None:
    """The plan, its step simulated; None where it does not fit."""
    if self.memory(choice).total > self.room:
      return None
    if choice not in self._plans and choice not in self.illegal:
      cfg = self._config(choice)
      try:
        time = step.estimate(cfg, self.hw)
      except ValueError as e:  # a ConfigError too: a link between ranks that the hardware lacks
        self.illegal[choice] = str(e)
      else:
        self._plans[choice] = Plan(choice, self._layers[choice], cfg, self.memory(choice), time)
    return self._plans.get(choice)

  def best(self, count: int, among: Iterable[Choice] | None = None) -> list[Plan]:
    """The fastest plans that fit, fastest first; ties go to the one that needs less memory."""
    order = sorted(self._bounds if among is None else among, key=self._bounds.__getitem__)
    found: list[tuple[float, int, int, Plan]] = []  # a heap, slowest first
    for number, choice in enumerate(order):
      if len(found) == count and self._bounds[choice] >= -found[0][0]:
        break
      plan = self.plan(choice)
      if plan is not None:
        push = heapq.heappush if len(found) < count else heapq.heappushpop
        push(found, (-plan.step, -plan.memory.total, number, plan))
    return [plan for *_, plan in sorted(found, key=lambda f: (-f[0], -f[1]))]

  def losers(self, winner: Plan) -> list[Loser]:
    """For each value of each axis that the winner has not: its best plan, and why it loses."""
    found = []
    for axis in AXES:
      values = sorted({getattr(c, axis) for c in (*self._bounds, *self.illegal)},
                      key=lambda v: (str(type(v)), v))
      for value in values:
        if value != getattr(winner.choice, axis):
          found.append(self._loser(axis, value, winner))
    return found

  def _loser(self, axis: str, value: Any, winner: Plan) -> Loser:
    family = [c for c in self._bounds if getattr(c, axis) == value]
    best = self.best(1, family)
    if best:
      return Loser(axis, value, best[0], self._instead(axis, value, winner, best[0])
                   + slower(best[0], winner))
    family = [c for c in family if c not in self.illegal]
    if not family:
      reasons = collections.Counter(text for c, text in self.illegal.items()
                                    if getattr(c, axis) == value)
      return Loser(axis, value, None, f"not possible: {reasons.most_common(1)[0][0]}")
    least = min((self.memory(c) for c in family), key=lambda m: m.total)
    parts = sorted(least.worst.parts.items(), key=lambda p: -p[1])[:2]
    return Loser(axis, value, None,
                 f"does not fit: needs {least.total / 1e9:.1f} GB at least, "
                 f"{(least.total - self.room) / 1e9:.1f} too many ("
                 + ", ".join(f"{name} {n / 1e9:.1f}" for name, n in parts) + ")")

  def _instead(self, axis: str, value: Any, winner: Plan, best: Plan) -> str:
    """What a family's best plan is, where the winner with that value alone would not fit."""
    alike = winner.choice._replace(**{axis: value}) if axis in Choice._fields else None
    if alike not in self._bounds or self.memory(alike).total <= self.room:
      return ""
    both = {name: (getattr(best.choice, name), getattr(winner.choice, name)) for name in AXES}
    other = ", ".join(f"{name} {its}" for name, (its, first) in both.items()
                      if name != axis and its != first)
    return f"the first would need {self.memory(alike).total / 1e9:.1f} GB; with {other}, "

  def run(self, count: int = 8) -> Found:
    """Best plans and losers.

    Raises:
      ConfigError: nothing fits; the message says by how much.
    """
    best = self.best(count)
    if not best:
      raise config.ConfigError(self._nothing())
    losers = self.losers(best[0])
    counted = {"choices": len(self._bounds) + len(self.illegal), "illegal": len(self.illegal),
               "too_large": sum(m.total > self.room for m in self._memory.values()),
               "simulated": len(self._plans)}
    return Found(best, losers, counted)

  def _nothing(self) -> str:
    """Why there is no plan: too little memory, and what kept other choices out."""
    legal = [c for c in self._bounds if c not in self.illegal]
    reasons = collections.Counter(self.illegal.values()).most_common(1)
    if not legal:
      return (f"no plan is possible on {self.hw.name}; of {len(self.illegal)} choices most are not "
              f"since: {reasons[0][0]}")
    rest = (f" ({len(self.illegal)} more choices are not possible, most of them since: "
            f"{reasons[0][0]})" if reasons else "")
    least = min((self.memory(c) for c in legal), key=lambda m: m.total)
    runtime, optim = self.cfg.runtime, self.cfg.optim
    ways = ["more devices (--gpus)"]
    if runtime.recipe == "none":
      ways.append("a recipe (runtime.recipe)")
    if "float32" in (optim.mu_dtype, optim.nu_dtype):
      ways.append("bfloat16 moments (optim.mu_dtype, nu_dtype)")
    if not runtime.shard_vocab:
      ways.append("runtime.shard_vocab")
    return (f"nothing fits: {self.hw.name} has {self.room / 1e9:.1f} GB to give and the smallest "
            f"of {len(legal)} plans needs {least.total / 1e9:.1f}; take {', or '.join(ways)}{rest}")


def slower(plan: Plan, winner: Plan) -> str:
  """Why a plan that fits is behind: the parts of its step that take longer, largest first."""
  behind = plan.step - winner.step
  mine, its = plan.time.breakdown, winner.time.breakdown
  again = " (recomputation)" if plan.time.recomputed > winner.time.recomputed else ""
  parts = {"bubble": mine["bubble"] - its["bubble"],
           "all-to-alls that nothing hides": plan.exposed - winner.exposed,
           f"kernels{again}": plan.compute - winner.compute,
           "optimizer": mine["optimizer"] - its["optimizer"]}
  if behind < 0.002 * winner.step:
    return "no slower to speak of"
  longer = sorted(((n, s) for n, s in parts.items() if s > 0.05 * behind), key=lambda p: -p[1])
  return f"+{duration(behind)}: " + ", ".join(f"{name} +{duration(s)}" for name, s in longer[:3])
