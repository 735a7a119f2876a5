"""From a step's time to GPU-hours and dollars of a whole training (report table 1)."""

import dataclasses
import math
from collections.abc import Callable

from dsv3_jax import config
from dsv3_jax.cost import step
from dsv3_jax.cost.hardware import Hardware

# Report 4.3: (length, sequences a step, steps) of the two phases of context extension.
EXTENSION = ((32_768, 1920, 1000), (131_072, 480, 1000))
REPORT_POST_TRAINING = 5e3  # GPU-hours; the report does not say what they were spent on


@dataclasses.dataclass(frozen=True)
class Phase:
  """A part of training.

  Attributes:
    name: what it is.
    tokens, steps, seconds: of all steps together.
    gpu_hours: device-hours.
    dollars: None where the hardware states no price.
    note: what was assumed.
    given: taken from the report, not computed.
  """

  name: str
  tokens: float
  steps: float
  seconds: float
  gpu_hours: float
  dollars: float | None
  note: str = ""
  given: bool = False


def _phase(name: str, tokens: float, steps: float, seconds: float, devices: int, hw: Hardware,
           note: str = "") -> Phase:
  hours = seconds * devices / 3600
  return Phase(name, tokens, steps, seconds, hours, hours * hw.price if hw.price else None, note)


def pretraining(cfg: config.Config, hw: Hardware) -> Phase:
  """All of train.tokens, the batch ramp included.

  A step's time is a straight line in its micro-batches: what a schedule loses at its ends, and so
  much for each. The line goes through the full batch and one nearby, so that a ramp that begins
  with fewer micro-batches than the schedule takes has a cost too.
  """
  seconds_of, note = _line(cfg, hw)
  length, total = cfg.data.sequence_length, cfg.train.tokens
  micro = cfg.data.micro_batch
  stages = [s for s in cfg.data.ramp(total) if s[0] < total]
  seconds = steps = 0.0
  for (first, size), end in zip(stages, [s[0] for s in stages[1:]] + [total], strict=True):
    times = (end - first) / (size * length)
    steps += times
    seconds += times * seconds_of(size // micro)
  return _phase("pre-training", total, math.ceil(steps), seconds, cfg.runtime.mesh.devices, hw,
                note)


def _line(cfg: config.Config, hw: Hardware) -> tuple[Callable[[int], float], str]:
  """Seconds of a step by its micro-batches, and a note where that is extrapolated."""
  micro = cfg.data.micro_batch
  full = cfg.data.batch_size // micro
  start = (cfg.data.batch_start or cfg.data.batch_size) // micro
  whole = step.estimate(cfg, hw).step
  if start == full:
    return (lambda number: whole), ""
  ranks, name = cfg.runtime.mesh.pipe, cfg.runtime.schedule
  least = 2 * ranks if name.startswith("dualpipe") else 1
  near = max(least, start)
  near += near % 2 if name == "dualpipe" else 0
  if near >= full:
    return (lambda number: whole * number / full), ""
  # The ramp's start goes: it need not divide into the smaller batch.
  smaller = config.replace(cfg, **{"data.batch_size": near * micro, "data.batch_start": 0})
  lower = step.estimate(smaller, hw).step
  slope = (whole - lower) / (full - near)
  note = (f"the ramp's first {start} micro-batches are fewer than {name}'s {least}; extrapolated"
          if start < least else "")
  return (lambda number: whole - (full - number) * slope), note


def extension(cfg: config.Config, hw: Hardware) -> list[Phase]:
  """The report's context extension with this model and mesh.

  Sequences are cut among devices so that each holds as many tokens as in pre-training: whole ones
  would leave a pipeline almost empty (15 and 3.75 micro-batches on 16 ranks). Only attention then
  costs more, and its FLOPs alone are counted: neither what the devices exchange for it nor unequal
  shares of the causal triangle. How the report did it is not published.
  """
  phases = []
  for length, sequences, steps in EXTENSION:
    tokens = length * sequences
    found = step.estimate(cfg, hw, attended=length)
    seconds = steps * found.step * tokens / found.tokens
    phases.append(_phase(f"context to {length // 1024}K", steps * tokens, steps, seconds,
                         cfg.runtime.mesh.devices, hw, "sequences cut among devices"))
  return phases


def post_training(cfg: config.Config, hw: Hardware) -> Phase:
  """The report's 5K GPU-hours, and how many tokens of pre-training they would buy.

  They cannot be derived: lengths, batches and the number of RL steps are not published.
  """
  found = step.estimate(cfg, hw)
  tokens = REPORT_POST_TRAINING * 3600 * found.tokens_per_second
  note = (f"the report's figure, not derived; as much as {tokens / 1e9:.1f}B tokens of "
          "pre-training")
  dollars = REPORT_POST_TRAINING * hw.price if hw.price else None
  return Phase("post-training", 0.0, 0.0, REPORT_POST_TRAINING * 3600 / cfg.runtime.mesh.devices,
               REPORT_POST_TRAINING, dollars, note, given=True)


def training(cfg: config.Config, hw: Hardware, extended: bool) -> list[Phase]:
  """Pre-training; with `extended` the report's other phases too."""
  phases = [pretraining(cfg, hw)]
  return phases + ([*extension(cfg, hw), post_training(cfg, hw)] if extended else [])
