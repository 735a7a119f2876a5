"""Prepares a large corpus in a process of its own, for the sake of speed alone.

A training process has one memory arena (`host.keep_memory`), for which the tokenizer's threads wait
in turn: the standard library's source took 33 s to prepare there and 10 s here (2 cores). What the
child leaves in the workdir is what `pipeline.prepare` looks for, so it is called afterwards in any
case, and does what is left to do: all of it if the child came to nothing, errors included.
"""

import dataclasses
import json
import os
import subprocess
import sys

from dsv3_jax import config
from dsv3_jax.data import pipeline, sources, tokenize

LARGE = 2**23  # bytes of text from which a process pays


def prepare(data: config.Data, vocab_size: int, workdir: str,
            progress: tokenize.Progress | None = None) -> pipeline.Corpus:
  """`pipeline.prepare`; arguments and errors as there."""
  new = not os.path.exists(os.path.join(workdir, "tokenizer.json"))
  if new and sum(sources.resolve(s, data.max_document_bytes).size for s in data.sources) >= LARGE:
    _in_child(data, vocab_size, workdir, progress)
  return pipeline.prepare(data, vocab_size, workdir, progress)


def _in_child(data, vocab_size, workdir, progress) -> None:
  job = json.dumps([dataclasses.asdict(data), vocab_size, os.path.abspath(workdir)])
  environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  child = subprocess.Popen([sys.executable, "-m", "dsv3_jax.data.apart"], env=environment,
                           text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL)
  try:
    child.stdin.write(job)
    child.stdin.close()
    for line in child.stdout:
      if progress:
        progress(*json.loads(line))
    child.wait()
  except (OSError, ValueError):  # it ended early, or said something else: the caller goes on alone
    pass
  finally:  # also where a signal ended the waiting
    child.kill()
    child.wait()


def _main() -> None:
  data, vocab_size, workdir = json.load(sys.stdin)
  data = config.Data(**{k: tuple(v) if isinstance(v, list) else v for k, v in data.items()})
  last = None

  def say(stage: str, done: int, total: int) -> None:
    nonlocal last
    if (stage, done * 50 // (total or 1)) != last:  # every fiftieth is enough to look at
      last = (stage, done * 50 // (total or 1))
      print(json.dumps([stage, done, total]), flush=True)

  pipeline.prepare(data, vocab_size, workdir, say)


if __name__ == "__main__":
  _main()
