"""Compiles one serialized module: `python worker.py PLUGIN MODULE`. It needs no package.

A process of its own, because the compiler reads its settings from the environment, leaves large
files behind, and takes the process down where something is amiss. `build.run` sets the environment.
"""

import ctypes
import pathlib
import sys


def main() -> int:
  plugin, module = sys.argv[1], pathlib.Path(sys.argv[2]).read_bytes()
  compiler = ctypes.CDLL(plugin).MosaicGpuCompile
  compiler.argtypes = [ctypes.c_char_p, ctypes.c_int]
  compiler.restype = ctypes.c_void_p
  return 0 if compiler(module, len(module)) else 3


if __name__ == "__main__":
  sys.exit(main())
