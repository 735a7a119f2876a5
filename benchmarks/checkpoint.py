"""How long a checkpoint keeps training waiting, as a share of the time its writing takes.

The state of experiments/tiny.py (parameters, both moments, EMA), saved again and again. After each
save a program takes the state over, as the next step does (it is donated); waiting is how much
later than without a save that program ends. So it holds the call of `Checkpoints.save`, the copy of
the state, and what the two take from each other. Writing lasts until the checkpoint stands under
its final name, flushed and summed up.

    python -m benchmarks.checkpoint
"""

import concurrent.futures
import os
import statistics
import tempfile
import time

from benchmarks import common

TARGET = 0.05


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=7)
  p.add_argument("--workdir", help="where to write (default: the system's temporary folder)")
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  import jax
  import numpy as np

  from dsv3_jax.config import Model, Optim
  from dsv3_jax.train import checkpoint, optim, state

  _, _, init = state.initializer(lambda: state.build_model(Model(), 0),
                                 optim.make_optimizer(Optim()))
  current = jax.block_until_ready(init())
  average: concurrent.futures.Future = concurrent.futures.Future()
  average.set_result((jax.tree.map(np.asarray, current.params), 1))
  size = sum(x.nbytes for x in jax.tree.leaves((current, current.params)))
  # In place, as the optimizer is: every array is read and written once.
  take_over = jax.jit(lambda s: jax.tree.map(lambda x: x + x.dtype.type(1), s), donate_argnums=0)
  current = jax.block_until_ready(take_over(current))
  waits, totals = [], []
  with tempfile.TemporaryDirectory(dir=args.workdir) as folder:
    store = checkpoint.Checkpoints(folder, keep_last=1, keep_best=0)
    for i in range(args.rounds + 1):
      start = time.perf_counter()
      current = jax.block_until_ready(take_over(current))
      usual = time.perf_counter() - start
      start = time.perf_counter()
      store.save(current, {"step": i + 1, "val_loss": None}, average)
      current = jax.block_until_ready(take_over(current))
      taken = time.perf_counter()
      store.wait()
      done = time.perf_counter()
      if i:  # the first one compiles the copy
        waits.append(max(taken - start - usual, 0.0))
        totals.append(done - start)
      time.sleep(0.2)
    store.close()
  share = statistics.median(w / t for w, t in zip(waits, totals, strict=True))
  line = common.Line(
      f"checkpoint of {size / 1e6:.0f} MB: training waits / writing", common.times_text(totals),
      common.times_text(waits), share, f"under {TARGET:.0%} of writing", share < TARGET,
      {"bytes": size, "writing": common.summary(totals), "waiting": common.summary(waits)})
  common.report("checkpoint", [line], args.save)


if __name__ == "__main__":
  main()
