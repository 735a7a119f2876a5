"""The host EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.train import ema


def _values(step: int) -> np.ndarray:
  return np.random.default_rng(step).normal(size=(3, 70_000)).astype(np.float32)


def _run(host: ema.HostEma, steps, bad=()) -> None:
  change = jax.jit(lambda x: x + 1, donate_argnums=0)
  change(jnp.asarray(_values(0)))  # compiled: nothing delays the donation below
  for step in steps:
    x = jnp.asarray(_values(step))
    host.submit(step, {"w_DD": x}, jnp.asarray(step in bad))
    change(x)  # donates what was submitted, as the next step does


@pytest.mark.parametrize("every", [1, 3])
def test_weights_of_the_bias_corrected_average(every):
  """Oracle: the weighted mean with weights decay^age, written as one sum in float64."""
  decay, steps = 0.8, range(1, 13)
  host = ema.HostEma(decay, every)
  _run(host, steps, bad={6})
  average, updates = host.result().result()
  host.close()
  used = [s for s in steps if s % every == 0 and s != 6]
  weights = np.array([(decay**every)**(len(used) - 1 - i) for i in range(len(used))])
  expected = sum(w * _values(s).astype(np.float64) for w, s in zip(weights, used, strict=True))
  assert updates == len(used)
  np.testing.assert_allclose(average["w_DD"], expected / weights.sum(), rtol=1e-4, atol=1e-6)


def test_going_on_is_exact():
  """Oracle: the same average without a break, bit for bit."""
  straight = ema.HostEma(0.9)
  _run(straight, range(1, 9))
  first = ema.HostEma(0.9)
  _run(first, range(1, 5))
  values, updates = first.result().result()
  _run(first, range(5, 7))  # the copy handed out does not move with the average
  first.result().result()
  second = ema.HostEma(0.9, values=jax.tree.map(jnp.asarray, values), updates=updates)
  _run(second, range(5, 9))
  a, b = straight.result().result(), second.result().result()
  assert a[1] == b[1] == 8
  np.testing.assert_array_equal(a[0]["w_DD"], b[0]["w_DD"])
  for host in (straight, first, second):
    host.close()


def test_an_error_of_the_thread_reaches_the_caller():
  """Oracle: a tree that does not fit the first one raises at the next call."""
  host = ema.HostEma(0.9)
  ok = jnp.asarray(False)
  host.submit(1, {"w_DD": jnp.ones(3)}, ok)
  host.submit(2, {"w_DD": jnp.ones(4)}, ok)
  with pytest.raises((RuntimeError, ValueError)):
    host.result().result(timeout=5)
    host.result()
  host.close()
