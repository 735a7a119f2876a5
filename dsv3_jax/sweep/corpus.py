"""Text that arms share: it is tokenized once a pool and not once an arm.

What a run's tokenizer and shards depend on is its key: the sources, how documents are read, what is
held out (no tokenizer sees it), the vocabulary. Arms of one key have one folder,
POOL/corpora/<key>, whose tokenizer.json they get a copy of and to whose data/ they point; arms with
another tokenizer have another. The shards' own names hash the files they were made from, so text
that changed since is tokenized anew beside the old.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from dsv3_jax import files
from dsv3_jax.config import Config
from dsv3_jax.sweep import job
from dsv3_jax.sweep.pool import SweepError

Progress = Callable[[str, int, int], None]


def key(config: Config) -> str:
  """16 hex digits: equal for configs whose tokenizer and shards are equal."""
  data = config.data
  given = data.tokenizer and hashlib.sha256(Path(data.tokenizer).read_bytes()).hexdigest()
  sources = [os.path.abspath(s) if os.path.exists(s) else s for s in data.sources]
  parts = [sources, data.text_key, data.max_document_bytes, data.validation_fraction, given,
           config.model.vocab_size]
  return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  with open(path, "a") as file:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(file, fcntl.LOCK_EX)
    yield


def prepare(folder: Path, config: Config, progress: Progress | None = None) -> Path:
  """Tokenizes a config's text, in a process of its own, unless that is done.

  Args:
    folder: of the corpora.
    config: an arm's.
    progress: called with (stage, bytes done, bytes in all or 0).

  Returns:
    The corpus: a folder with tokenizer.json and data/.

  Raises:
    SweepError: it cannot be had, with what the process said.
  """
  found = folder / key(config)
  found.mkdir(parents=True, exist_ok=True)
  task = json.dumps([dataclasses.asdict(config.data), config.model.vocab_size, str(found)])
  with _locked(found / ".lock"), tempfile.TemporaryFile("w+") as errors:
    child = subprocess.Popen([sys.executable, "-m", "dsv3_jax.data.apart"], text=True,
                             env=job.environment(), stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, stderr=errors)
    try:
      with contextlib.suppress(BrokenPipeError):
        child.stdin.write(task)
        child.stdin.close()
      for line in child.stdout:
        if progress:
          progress(*json.loads(line))
      code = child.wait()
    finally:  # also where a signal ended the waiting
      child.kill()
      child.wait()
    errors.seek(0)
    lines = errors.read().strip().splitlines() or [f"exit code {code}"]
  if code:
    raise SweepError("the corpus cannot be prepared: " +
                     lines[-1].removeprefix("dsv3_jax.config.ConfigError: "))
  return found


def share(corpus: Path, arm: Path) -> None:
  """Gives an arm that has no text of its own the corpus'."""
  if not (arm / "tokenizer.json").exists():
    files.write_atomic(arm / "tokenizer.json", (corpus / "tokenizer.json").read_bytes())
  if not os.path.lexists(arm / "data"):
    target = os.path.relpath(corpus / "data", os.path.realpath(arm))
    (arm / "data").symlink_to(target, target_is_directory=True)
