"""The host process: allocator settings that a CPU run depends on."""

import ctypes
import logging
import sys

_log = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's mallopt(3)


def keep_memory() -> bool:
  """Lets glibc reuse large freed blocks instead of returning them to the kernel.

  XLA on a CPU allocates a step's temporaries as one block and frees it after. By default glibc maps
  such a block afresh every time, and the kernel clears every page again: a third of the tiny
  model's step (measured: 143,000 page faults and 0.27 s of system time against none). Call it
  before any library starts its threads; it changes no result.

  Returns:
    Whether the settings took hold; False where the C library is not glibc.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):
    return False
  # One arena: only the main one can grow without bound, others map large blocks whatever is said.
  settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1))
  done = all([mallopt(option, value) == 1 for option, value in settings])
  _log.debug("keep_memory: %s", "on" if done else "refused by the C library")
  return done
