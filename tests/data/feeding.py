"""Run as a program: takes batches from worker processes while signals arrive.

    python -m tests.data.feeding WORKDIR

Says "ready", takes more batches after a line on stdin than were buffered, says "done" with the ids
of the workers, and waits. The corpus is the prepared one of WORKDIR.
"""

import json
import multiprocessing
import signal
import sys

from dsv3_jax import config
from dsv3_jax.data import pipeline


def main() -> None:
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)  # as the training loop: noted, not obeyed at once
  with open(f"{sys.argv[1]}/feeding.json") as f:
    data = config.from_dict(json.load(f), config.Data)
  batches = pipeline.prepare(data, 420, sys.argv[1]).train_iterator(lambda step: data.batch_size)
  next(batches)
  print("ready", flush=True)
  sys.stdin.readline()
  for _ in range(20):
    next(batches)
  print("done", *(p.pid for p in multiprocessing.active_children()), flush=True)
  sys.stdin.readline()


if __name__ == "__main__":
  main()
