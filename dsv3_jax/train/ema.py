"""Exponential moving average of the parameters, kept in host memory (report 3.2.3).

The step's parameters are copied on the device (the originals are donated to the next step) and a
background thread folds the copy into float32 host arrays while the device computes, so nothing
waits. The average is the bias-corrected one,

    e_j = e_{j-1} + w_j (p_j - e_{j-1}),   w_j = (1 - d) / (1 - d^j),   d = decay ** every,

for which the first value is the parameters themselves and no start value leaks into short runs.

Where processes share the devices, each averages what its own hold (`parallel.hosts.parts`).
"""

import concurrent.futures
import queue
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.parallel import hosts

_BLOCK = 1 << 16  # elements at a time: the three passes of one block stay in cache


@jax.jit
def snapshot(tree: Any) -> Any:
  """Copies of arrays that survive the donation of the originals; dispatched asynchronously."""
  return jax.tree.map(jnp.copy, tree)


def fold(average: np.ndarray, value: np.ndarray, weight: float) -> None:
  """average += weight * (value - average) in place, float32, exact in block order."""
  average, value = average.reshape(-1), value.reshape(-1)
  scratch = np.empty(min(_BLOCK, average.size), np.float32)
  weight = np.float32(weight)
  for i in range(0, average.size, _BLOCK):
    part = average[i:i + _BLOCK]
    delta = scratch[:part.size]
    np.subtract(value[i:i + _BLOCK], part, out=delta)
    np.multiply(delta, weight, out=delta)
    np.add(part, delta, out=part)


def _copy(tree: Any) -> Any:
  """What this process has of a tree's arrays, float32, its own."""
  return jax.tree.map(lambda x: np.array(x, np.float32), jax.tree.map(hosts.parts, tree))


class HostEma:
  """The average and its thread.

  Args:
    decay: per optimizer step.
    every: steps between updates.
    values: the average to go on from (a tree of arrays), or None.
    updates: updates that `values` holds.
  """

  def __init__(self, decay: float, every: int = 1, values: Any = None, updates: int = 0):
    self._decay = decay**every
    self._every = every
    self._values = None if values is None else _copy(values)
    self._updates = updates
    self._error: BaseException | None = None
    self._queue: queue.Queue = queue.Queue(maxsize=2)
    self._thread = threading.Thread(target=self._work, name="ema", daemon=True)
    self._thread.start()

  def submit(self, step: int, params: Any, bad: jax.Array) -> None:
    """Takes the parameters after `step` (1 for the first), unless that step was `bad`."""
    self._raise()
    if step % self._every == 0:
      self._queue.put((snapshot(params), bad))

  def result(self) -> concurrent.futures.Future:
    """A future of (copy of the average, updates in it), as of everything submitted so far.

    The average is None while no update was made, otherwise a tree of `hosts.parts`.
    """
    self._raise()
    future: concurrent.futures.Future = concurrent.futures.Future()
    self._queue.put(future)
    return future

  def close(self) -> None:
    """Ends the thread after what was submitted."""
    if self._thread.is_alive():
      self._queue.put(None)
      self._thread.join()

  def _raise(self) -> None:
    if self._error is not None:
      raise RuntimeError("the EMA thread failed") from self._error

  def _work(self) -> None:
    while (item := self._queue.get()) is not None:
      try:
        if self._error is not None:
          if isinstance(item, concurrent.futures.Future):
            item.set_exception(self._error)
        elif isinstance(item, concurrent.futures.Future):
          copy = None if self._values is None else jax.tree.map(np.copy, self._values)
          item.set_result((copy, self._updates))
        else:
          self._update(*item)
      except BaseException as error:  # the training thread raises it at its next call
        self._error = error
      del item  # frees the copied parameters while the thread waits

  def _update(self, params: Any, bad: jax.Array) -> None:
    if bool(np.asarray(bad)):
      return
    self._updates += 1
    if self._values is None:
      self._values = _copy(params)
      return
    host = jax.tree.map(hosts.parts, params)
    weight = (1 - self._decay) / (1 - self._decay**self._updates)
    jax.tree.map(lambda average, value: fold(average, value, weight), self._values, host)
