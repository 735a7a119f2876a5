"""Data pipeline: tokens/s against what the tiny model consumes, and time of an exact restart.

The corpus is the default one, the standard library's source, with FIM and token cuts at their
default rates. The consumer is the trainer's compiled step at shape (a) of train_step; consumer and
pipeline take turns. Restarts are made at the beginning, middle and end of an epoch: a fresh
iterator takes the state and gives its next batch, which is compared with the batch that followed
when the state was taken. With a worker process that time holds the start of the process, which the
trainer can hide behind its compilation (`TrainIterator.start`) and which no position changes; by
default (`data.workers=0`) a thread of the training process reads ahead.

    python -m benchmarks.data_pipeline
"""

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Iterator

import numpy as np

from benchmarks import common
from dsv3_jax import config
from dsv3_jax.data import pipeline

DATA = config.Data(workers=0, prefetch=0)
TURN = 200  # batches the pipeline makes in one turn
VOCAB = 8192
TIMES_CONSUMED = 5.0
RESTART_S = 1.0
IN_PROCESS = "in process"


@contextlib.contextmanager
def batches(corpus: pipeline.Corpus) -> Iterator:
  iterator = corpus.train_iterator(lambda _: DATA.batch_size)
  try:
    yield iterator
  finally:
    iterator.close()


def throughput(corpus: pipeline.Corpus, processes: pipeline.Corpus, rounds: int
               ) -> list[common.Line]:
  """Tokens/s of the pipeline in the training process and in a worker process."""
  from benchmarks import train_step

  step, _ = train_step.ours("a")
  tokens = DATA.batch_size * DATA.sequence_length

  with batches(corpus) as inline, batches(processes) as worker:
    def pull(iterator) -> None:
      for _ in range(TURN):
        next(iterator)

    next(worker)
    times = common.alternate(
        {"step": step, "inline": lambda: pull(inline), "worker": lambda: pull(worker)}, rounds,
        warmup=2)
  consumed = [tokens / t for t in times["step"]]
  lines = []
  for name, label in (("inline", "in the training process"), ("worker", "one worker process")):
    made = [TURN * tokens / t for t in times[name]]
    ratio = common.paired(made, consumed)
    lines.append(common.Line(
        f"data pipeline, {label}", f"{statistics.median(consumed):,.0f} tok/s",
        f"{statistics.median(made):,.0f} tok/s", ratio, f"at least {TIMES_CONSUMED:g}x consumed",
        ratio >= TIMES_CONSUMED,
        {"consumed_tokens_per_s": consumed, "made_tokens_per_s": made}))
  return lines


def restarts(corpora: dict[str, pipeline.Corpus], rounds: int) -> list[common.Line]:
  """Seconds from a state to its exact next batch, at three positions of an epoch."""
  first = next(iter(corpora.values()))
  count = first.summary["train_tokens"] // (DATA.batch_size * DATA.sequence_length)
  wanted = {"beginning": 1, "middle": count // 2, "end": count - 1}
  kept = {}
  with batches(first) as iterator:
    for i in range(count):
      state = iterator.get_state()
      batch = next(iterator)
      if i in wanted.values():
        kept[i] = state, batch["tokens"]
  lines = []
  for label, corpus in corpora.items():
    starts_process = label != IN_PROCESS
    for name, position in wanted.items():
      state, expected = kept[position]
      times = []
      for _ in range(rounds):
        start = time.perf_counter()
        with batches(corpus) as fresh:
          fresh.set_state(state)
          tokens = next(fresh)["tokens"]
          times.append(time.perf_counter() - start)
        if not np.array_equal(tokens, expected):
          raise AssertionError(f"the restart at batch {position} gave another batch")
      lines.append(common.Line(
          f"restart at the {name} ({label})", "-", common.times_text(times), None,
          "exact; starts a process" if starts_process else f"exact, under {RESTART_S:g} s",
          None if starts_process else statistics.median(times) < RESTART_S,
          {"batch": position, "restart": common.summary(times)}))
  return lines


def main(argv: list[str] | None = None) -> None:
  parser = common.parser(__doc__, rounds=5)
  parser.add_argument("--workdir", help="keeps tokenizer and shards there for the next run")
  args = parser.parse_args(argv)
  with contextlib.ExitStack() as stack:
    workdir = args.workdir or stack.enter_context(tempfile.TemporaryDirectory())
    start, cpu = time.perf_counter(), time.process_time()
    corpus = pipeline.prepare(DATA, VOCAB, workdir)
    prepared, cpu = time.perf_counter() - start, time.process_time() - cpu
    processes = pipeline.prepare(dataclasses.replace(DATA, workers=1, prefetch=4), VOCAB, workdir)
    megabytes = corpus.summary["bytes"] / 1e6
    lines = [common.Line(
        f"tokenizer and {megabytes:.0f} MB tokenized", "-",
        f"{prepared:.1f} s ({cpu:.0f} CPU s)", None, "-",
        details={"seconds": prepared, "cpu_seconds": cpu, **corpus.summary})]
    lines += restarts({IN_PROCESS: corpus, "new worker": processes}, args.rounds)
    lines += throughput(corpus, processes, args.rounds)
  common.report("data_pipeline", lines, args.save)


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  main()
