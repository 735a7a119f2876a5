"""Times operations on the device, cold caches and real power draw included.

An operation runs on several sets of random operands in turn, so that none finds its operands in the
L2 cache and the data toggles wires as data do (zeros run faster). All sets are one compiled
program, in which each call waits for the one before. Kernel durations come from CUPTI; where that
is refused (another profiler, a sandbox), from the wall clock over many launches, which counts the
gaps between kernels too.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import jax
from jax import lax
from jax.experimental.mosaic.gpu import profiler

CACHE_BYTES = 128 * 2**20  # twice the largest L2 cache of a Hopper GPU, and a little
LEAST_SETS, MOST_SETS = 4, 16


@dataclasses.dataclass(frozen=True)
class Time:
  """Microseconds a call.

  Attributes:
    median, least: over the repetitions.
    method: cupti, or wall.
  """

  median: float
  least: float
  method: str


def sets_for(size: float) -> int:
  """How many operand sets of `size` bytes keep one from lying in the cache."""
  return min(MOST_SETS, max(LEAST_SETS, -(-CACHE_BYTES // max(int(size), 1))))


def program(operation: Callable, sets: Sequence[tuple]) -> Callable:
  """A jitted function of `sets` that calls `operation` on each in turn; gives all results."""
  operation = jax.jit(operation)  # lowered once, not once a set

  def run(sets):
    results, last = [], None
    for args in sets:
      if last is not None:  # a dependence without work: two calls must not overlap
        args, results[-1] = lax.optimization_barrier((args, last))
      last = operation(*args)
      results.append(last)
    return results

  return jax.jit(run)


def measure(operation: Callable, sets: Sequence[tuple], *, repetitions: int = 8) -> Time:
  """Times `operation` on the default device.

  Args:
    operation: a traceable function of arrays.
    sets: operand sets, at least `LEAST_SETS` for a time that means something.
    repetitions: rounds over all sets.
  """
  compiled = program(operation, sets).lower(sets).compile()
  jax.block_until_ready(compiled(sets))
  try:
    _, found = profiler.measure(compiled, iterations=repetitions)(sets)
  except Exception:  # whatever keeps CUPTI from working, the clock still does
    found = None
  if found:
    times, method = [ms * 1e3 / len(sets) for ms in found], "cupti"
  else:
    times, method = [_wall(compiled, sets, repetitions) for _ in range(5)], "wall"
  return Time(statistics.median(times), min(times), method)


def _wall(compiled: Callable, sets: Sequence[tuple], repetitions: int) -> float:
  """Microseconds a call: what more launches cost more, so that start and end do not count."""
  def seconds(launches: int) -> float:
    start = time.perf_counter()
    for _ in range(launches):
      result = compiled(sets)
    jax.block_until_ready(result)
    return time.perf_counter() - start

  extra = 2 * repetitions
  return max(seconds(repetitions + extra) - seconds(repetitions), 0.0) * 1e6 / extra / len(sets)
