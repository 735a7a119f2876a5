"""Schedules of the report's section 4.2: pure functions of the tokens seen so far.

Each constructor binds a config section and `train_tokens`, the length of the run, of which the
milestones are shares; it returns a function of `tokens_seen` (tokens consumed before the step).
Warm-up alone counts steps: `step` is the number of the step about to run, 1 for the first.
All of it is host arithmetic in float64 on Python numbers: the values enter the compiled step as
arguments, so a schedule never retraces it.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable

from dsv3_jax import config


def learning_rate(optim: config.Optim, train_tokens: float) -> Callable[[float, int], float]:
  """Linear warm-up, constant, cosine to `lr_final`, constant, then `lr_last`.

  The report: 0 -> 2.2e-4 over 2,000 steps; constant to 10T tokens; cosine to 2.2e-5 over the next
  4.3T; 2.2e-5 for 333B; 7.3e-6 for the last 167B.
  """
  constant_until = optim.lr_constant_until * train_tokens
  cosine_until = optim.lr_cosine_until * train_tokens
  last_from = optim.lr_last_from * train_tokens

  def schedule(tokens_seen: float, step: int) -> float:
    if tokens_seen >= last_from:
      value = optim.lr_last
    elif tokens_seen >= cosine_until:
      value = optim.lr_final
    elif tokens_seen > constant_until:
      share = (tokens_seen - constant_until) / (cosine_until - constant_until)
      value = optim.lr_final + (optim.lr - optim.lr_final) * (1 + math.cos(math.pi * share)) / 2
    else:
      value = optim.lr
    return value * min(1.0, step / optim.warmup_steps) if optim.warmup_steps else value

  return schedule


def bias_speed(loss: config.Loss, train_tokens: float) -> Callable[[float], float]:
  """gamma of the router-bias update: constant, then 0 (0.001 to 14.3T tokens in the report)."""
  until = loss.bias_until * train_tokens
  return lambda tokens_seen: loss.bias_speed if tokens_seen < until else 0.0


def mtp_weight(loss: config.Loss, train_tokens: float) -> Callable[[float], float]:
  """lambda of the MTP loss (0.3 to 10T tokens, 0.1 afterwards in the report)."""
  late_from = loss.mtp_late_from * train_tokens
  return lambda tokens_seen: loss.mtp_weight if tokens_seen < late_from else loss.mtp_weight_late


@dataclasses.dataclass(frozen=True)
class BatchSchedule:
  """The batch ramp by step number, so that any position is found without replaying the run.

  Attributes:
    first_steps: the step (counted from 0) at which each stage begins.
    first_sequences: sequences consumed before it.
    sizes: sequences a step in it.
    sequence_length: T.
    total_steps: steps of the whole run; the last one is the first to reach `train_tokens`.
  """

  first_steps: tuple[int, ...]
  first_sequences: tuple[int, ...]
  sizes: tuple[int, ...]
  sequence_length: int
  total_steps: int

  def _stage(self, step: int) -> int:
    return bisect.bisect_right(self.first_steps, step) - 1

  def __call__(self, step: int) -> int:
    """Sequences in the batch of `step` (the first step is 0)."""
    return self.sizes[self._stage(step)]

  def tokens_before(self, step: int) -> int:
    """Tokens consumed before `step`."""
    i = self._stage(step)
    sequences = self.first_sequences[i] + (step - self.first_steps[i]) * self.sizes[i]
    return sequences * self.sequence_length


def batch_schedule(data: config.Data, train_tokens: float) -> BatchSchedule:
  """Sequences a step: `batch_start`, rising in equal stages to `batch_size`."""
  length = data.sequence_length
  step, sequences = 0, 0
  first_steps, first_sequences, sizes = [], [], []
  stages = [s for s in data.ramp(train_tokens) if s[0] < train_tokens]
  ends = [first for first, _ in stages[1:]] + [math.ceil(train_tokens)]
  for (_, size), end in zip(stages, ends, strict=True):
    first_steps.append(step)
    first_sequences.append(sequences)
    sizes.append(size)
    steps = max(-((sequences * length - end) // (size * length)), 0)
    step, sequences = step + steps, sequences + steps * size
  return BatchSchedule(tuple(first_steps), tuple(first_sequences), tuple(sizes), length, step)
