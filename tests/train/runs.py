"""Whole runs in tests: terminals that listen or interrupt, and what two equal runs share."""

import json
import os
import signal

import jax
import numpy as np

from dsv3_jax import train
from dsv3_jax.train import checkpoint, metrics
from tests.train import fakes


class Notes(metrics.Silent):
  """Keeps what is said."""

  def __init__(self):
    self.notes = []

  def note(self, text: str) -> None:
    self.notes.append(text)


class Interrupt(Notes):
  """Sends this process a signal while it shows the numbers of a step, as a terminal would be
  interrupted: a second write into it then fails."""

  def __init__(self, step: int, number: int = signal.SIGTERM):
    super().__init__()
    self._step, self._number, self._writing = step, number, False

  def note(self, text: str) -> None:
    if self._writing:
      raise RuntimeError("reentrant call")
    super().note(text)

  def progress(self, line: str, done: float) -> None:
    if line.startswith(f"step {self._step}/"):
      self._writing = True
      os.kill(os.getpid(), self._number)
      self._writing = False


def run(config, folder, ui=None) -> train.RunResult:
  """A run on the corpus that costs nothing."""
  return train.run(config, str(folder), ui=ui or metrics.Silent(), corpus=fakes.FakeCorpus(config))


def records(folder) -> list[dict]:
  """metrics.jsonl without wall-clock times."""
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def assert_same(a, b) -> None:
  """The same metrics (wall-clock apart) and the same final state, bit for bit."""
  assert records(a) == records(b)
  stores = [checkpoint.load_params(str(f)) + checkpoint.load_params(str(f), ema=True)[:1]
            for f in (a, b)]
  (params_a, buffers_a, meta_a, ema_a), (params_b, buffers_b, meta_b, ema_b) = stores
  assert (meta_a["step"], meta_a["tokens"], meta_a["iterator"]) == (
      meta_b["step"], meta_b["tokens"], meta_b["iterator"])
  for x, y in zip(jax.tree.leaves((params_a, buffers_a, ema_a)),
                  jax.tree.leaves((params_b, buffers_b, ema_b)), strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
