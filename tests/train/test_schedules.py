"""Schedules against the report's absolute numbers (section 4.2) and against arithmetic."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dsv3_jax import config
from dsv3_jax.train import schedules

T = 1e12
LENGTH = 14.8 * T


@pytest.mark.parametrize("tokens, step, expected", [
    (0, 0, 0.0), (0, 1000, 1.1e-4), (0, 2000, 2.2e-4), (5 * T, 9000, 2.2e-4),
    (10 * T, 10**6, 2.2e-4), (12.15 * T, 10**6, (2.2e-4 + 2.2e-5) / 2), (14.3 * T, 10**6, 2.2e-5),
    (14.632 * T, 10**6, 2.2e-5), (14.634 * T, 10**6, 7.3e-6), (14.8 * T, 10**6, 7.3e-6)])
def test_learning_rate(tokens, step, expected):
  """Oracle: the report's table: 0 -> 2.2e-4 in 2K steps, 10T, 14.3T, 333B, 167B."""
  assert schedules.learning_rate(config.Optim(), LENGTH)(tokens, step) == pytest.approx(
      expected, rel=1e-12, abs=1e-18)


def test_learning_rate_cosine_quarter():
  """Oracle: the cosine written out at a quarter of its way."""
  lr = schedules.learning_rate(config.Optim(), LENGTH)
  expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi / 4))
  assert lr(10 * T + 4.3 * T / 4, 10**6) == pytest.approx(expected, rel=1e-9)


def test_bias_speed_and_mtp_weight():
  """Oracle: the report: gamma 0.001 to 14.3T then 0; lambda 0.3 to 10T then 0.1."""
  gamma = schedules.bias_speed(config.Loss(), LENGTH)
  assert [gamma(t * T) for t in (0, 14.299, 14.301, 14.8)] == [1e-3, 1e-3, 0, 0]
  weight = schedules.mtp_weight(config.Loss(), LENGTH)
  assert [weight(t * T) for t in (0, 9.999, 10.001, 14.8)] == [0.3, 0.3, 0.1, 0.1]


def _size(data, tokens):
  """The ramp itself: sequences of a step that begins after so many tokens."""
  stages = data.ramp(tokens)
  return lambda seen: max((first, size) for first, size in stages if first <= seen)[1]


def test_batch_ramp_of_the_report():
  """Oracle: the report: 3,072 at the start, 15,360 from 469B tokens on, 12.58M to 62.91M a step."""
  data = config.Data(sequence_length=4096, batch_size=15360, batch_start=3072, microbatch=512)
  size = _size(data, LENGTH)
  assert size(0) == 3072 and size(468e9) < 15360 and size(469.1e9) == 15360
  sizes = [size(469e9 * i / 5 + 1e6) for i in range(6)]
  assert sizes == sorted(set(sizes)) and all(s % 512 == 0 for s in sizes)
  schedule = schedules.batch_schedule(data, LENGTH)
  assert schedule.tokens_before(1) == 12_582_912
  last = schedule.total_steps - 1
  assert schedule.tokens_before(last) < LENGTH <= schedule.tokens_before(last + 1)
  assert schedule.tokens_before(last + 1) - schedule.tokens_before(last) == 62_914_560


@example(5, 5, 4, 5e-324, 300)  # a ramp shorter than one token
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 6), st.floats(0, 1),
       st.integers(300, 20_000))
def test_batch_schedule_is_a_replay(start, more, stages, until, tokens):
  """Oracle: stepping through the run and asking the ramp at each step."""
  data = config.Data(sequence_length=16, batch_size=2 * (start + more - 1), batch_start=2 * start,
                     microbatch=2, batch_ramp_until=until, batch_ramp_stages=stages)
  size = _size(data, tokens)
  schedule = schedules.batch_schedule(data, tokens)
  seen, step = 0, 0
  while seen < tokens:
    assert schedule(step) == size(seen) and schedule.tokens_before(step) == seen
    seen += size(seen) * 16
    step += 1
  assert schedule.total_steps == step and schedule.tokens_before(step) == seen
