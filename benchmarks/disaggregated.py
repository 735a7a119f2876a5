"""Time between tokens while long prompts are read: two engines that do both, or one for each.

Two virtual devices, each computing with one thread. Together: on each device an engine that reads
and writes, with half of the requests. Apart: a reader on one device and a writer on the other
(`infer/disaggregated.py`). Requests write; then long prompts come all at once. Gaps between a
request's tokens are taken before that, and from then until the last prompt has its first token or a
request ends. The answers must be the same. The first turn of each side compiles and does not count.

    make train
    python -m benchmarks.disaggregated --workdir=runs/tiny
"""

import os

_FLAGS = "--xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import statistics  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import common  # noqa: E402
from dsv3_jax import trained  # noqa: E402
from dsv3_jax.infer import disaggregated  # noqa: E402
from dsv3_jax.infer.engine import Engine, Settings  # noqa: E402
from dsv3_jax.infer.request import Request  # noqa: E402
from dsv3_jax.serve.worker import Worker  # noqa: E402

WRITERS, NEW, BEFORE = 8, 300, 60  # requests that write, their tokens, those before the prompts
PROMPTS, LONG, CHUNK = 2, 2048, 256


class Asked:
  """A request's tokens and their times."""

  def __init__(self, engine, request: Request):
    self.tokens: list[int] = []
    self.times: list[float] = []
    self.end = threading.Event()
    self.start = time.perf_counter()
    engine.submit(request, self._on_event)

  def _on_event(self, event) -> None:
    self.tokens += [token.id for token in event.tokens]
    self.times += [time.perf_counter()] * len(event.tokens)
    if event.finish:
      self.end.set()

  def gaps(self, start: float, end: float) -> list[float]:
    """Seconds between tokens, of those gaps that lie in a span or begin in it."""
    return [b - a for a, b in zip(self.times, self.times[1:]) if start <= a < end]


def measure(engines: list, vocabulary: int, turn: int) -> dict:
  """Gaps before and while prompts are read, times to first token, and all tokens."""
  rng = np.random.default_rng(turn)
  prompt = lambda length: tuple(rng.integers(0, vocabulary, length).tolist())
  writers = [Asked(engines[i % len(engines)], Request(prompt(20), NEW)) for i in range(WRITERS)]
  while min(len(asked.times) for asked in writers) < BEFORE:
    time.sleep(0.001)
  start = time.perf_counter()
  long = [Asked(engines[i % len(engines)], Request(prompt(LONG), 2)) for i in range(PROMPTS)]
  for asked in (*long, *writers):
    assert asked.end.wait(600)
  read = min(max(asked.times[0] for asked in long), min(asked.times[-1] for asked in writers))
  begun = max(asked.times[0] for asked in writers)
  return {"before": [g for a in writers for g in a.gaps(begun, start)],
          "while": [g for a in writers for g in a.gaps(start, read)],
          "first": [a.times[0] - a.start for a in long],
          "tokens": [a.tokens for a in (*writers, *long)]}


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=3)
  p.add_argument("--workdir", default="runs/tiny", help="of a trained model")
  args = p.parse_args(argv)
  generator, tokenizer, _ = trained.load(args.workdir)
  settings = Settings(512, 64, LONG + NEW, WRITERS, CHUNK, run=1)
  weights = [jax.device_put(generator.weights, device) for device in jax.devices()]
  make = lambda kind, i: kind(generator.cfg, weights[i], settings, generator.runtime)
  apart = disaggregated.Disaggregated(make(disaggregated.Reader, 0), make(disaggregated.Writer, 1))
  sides = {"together": [make(Engine, 0), make(Engine, 1)], "apart": [apart]}
  for engine in (*sides["together"], apart):
    Worker(engine).start()
  found: dict[str, dict[str, list]] = {side: {} for side in sides}
  for turn in range(args.rounds + 1):
    for side, engines in sides.items():
      for name, values in measure(engines, tokenizer.vocab_size, turn).items():
        found[side].setdefault(name, []).extend(values if turn else ())
  assert found["together"].pop("tokens") == found["apart"].pop("tokens")
  lines = []
  for title, name, cut in (
      ("between tokens, nothing read: median", "before", 50), ("the same, 99 of 100", "before", 99),
      ("between tokens, prompts read: median", "while", 50), ("the same, 99 of 100", "while", 99),
      (f"first token of {PROMPTS} prompts of {LONG}: median", "first", 50)):
    values = [float(np.percentile(found[side][name], cut)) for side in sides]
    lines.append(common.Line(
        title, *map(common.seconds, values), values[0] / values[1], "-", None,
        {side: {"seconds": value, "count": len(found[side][name])}
         for side, value in zip(sides, values)}))
  growth = {side: statistics.median(f["while"]) / statistics.median(f["before"])
            for side, f in found.items()}
  lines.append(common.Line(
      "growth of the median while prompts are read", f"{growth['together']:.2f}x",
      f"{growth['apart']:.2f}x", growth["together"] / growth["apart"], "-", None,
      growth))
  print(f"handed over: {apart.totals['handed'] / 1e6:.1f} MB")
  common.report("disaggregated", lines, args.save)


if __name__ == "__main__":
  main()
