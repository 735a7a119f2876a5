"""Every schedule on every mesh with every kind of model, against one device (fifty compilations).

    python -m tests.train.pipeline_matrix [NAME ...]    # all, or the schedules named

Too long for the test suite, which runs a part of it (test_pipelined.py). Prints a line for each:
the largest deviation of a gradient or statistic relative to its array, and seconds.
"""

import sys
import time

import jax

jax.config.update("jax_num_cpu_devices", 8)

from dsv3_jax.parallel.schedules import NAMES  # noqa: E402
from tests.train import test_pipelined  # noqa: E402

MESHES = {"4x1": dict(pipe=4), "8x1": dict(pipe=8), "4x2": dict(pipe=4, gpu=2),
          "2x4": dict(pipe=2, gpu=4), "2x2x2": dict(pipe=2, node=2, gpu=2)}


def microbatches(name: str, ranks: int) -> int:
  """No multiple of the ranks, where the schedule allows."""
  if name == "dualpipe":
    return 2 * ranks + 2
  return 2 * ranks + 1 if name == "dualpipe_v" else ranks + 1


def main(names: list[str]) -> int:
  failed = 0
  for name in names or NAMES:
    for label, mesh in MESHES.items():
      for model in test_pipelined.MODELS:
        M, start = microbatches(name, mesh["pipe"]), time.time()
        zero = int("gpu" in mesh)
        try:
          worst = test_pipelined.check(model, name, mesh, M, runtime={"runtime.zero": zero})
          line = f"worst {worst:.1e}"
        except Exception as e:
          failed += 1
          line = f"FAILED {type(e).__name__}: {str(e)[:300]}"
        print(f"{name:10} {label:6} {model:6} M={M:2} zero={zero}  {line}  "
              f"{time.time() - start:.0f} s", flush=True)
        jax.clear_caches()
  return failed


if __name__ == "__main__":
  sys.exit(bool(main(sys.argv[1:])))
