"""Allocator settings of the host process."""

import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from dsv3_jax import host
if sys.argv[1] == "on": assert host.keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
def use():
  block = libc.malloc(64 << 20)
  ctypes.memset(block, 1, 64 << 20)
  libc.free(block)
use(); use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_freed_block_is_used_again():
  """Oracle: the kernel's count of page faults; 64 MiB are 16,384 pages."""
  def faults(mode):
    out = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return int(out.stdout)

  assert faults("on") < 100 < 10_000 < faults("off")
