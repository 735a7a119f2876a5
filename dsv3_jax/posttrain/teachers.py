"""Experts' probabilities of what is learnt, in blocks on disk (`distill.mode="logits"`)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import arrays as arrays_lib
from dsv3_jax.posttrain import experts, messages, rejection, samples, soft
from dsv3_jax.posttrain.draw import Stopped
from dsv3_jax.posttrain.experts import Expert
from dsv3_jax.posttrain.rejection import Taught
from dsv3_jax.train import checkpoint, metrics

BLOCK = 512  # conversations whose logits are one file

Kept = tuple[np.ndarray, np.ndarray, np.ndarray]  # top, top_logprob, rest_logprob of n tokens


def blocks(taught: Sequence[Taught]) -> list[list[int]]:
  """Numbers of the conversations that an expert knows, block by block."""
  known = [i for i, t in enumerate(taught) if t.expert >= 0]
  return [known[start:start + BLOCK] for start in range(0, len(known), BLOCK)]


def missing(taught: Sequence[Taught], folder: Path) -> bool:
  """Whether a block is not there yet."""
  return not all(_path(folder, n).is_file() for n in range(len(blocks(taught))))


def keep(taught: Sequence[Taught], asked: Sequence[Expert], cfg: config.Config,
         tokenizer: Tokenizer, folder: Path, ui: metrics.Silent,
         stop: Callable[[], bool]) -> None:
  """Writes the blocks that are missing, by the forward pass of training.

  Args:
    taught: all that is learnt.
    asked: the experts.
    cfg: the run.
    tokenizer: the student's.
    folder: of the files.
    ui: hears how far it is.
    stop: asked between two batches.

  Raises:
    ConfigError: an expert has another vocabulary, or is no run.
    Stopped: `stop` said so.
  """
  parts, teachers = blocks(taught), _Teachers(asked, cfg, tokenizer)
  for number, part in enumerate(parts):
    if not _path(folder, number).is_file():
      ui.progress(f"experts' probabilities, part {number + 1} of {len(parts)}",
                  number / len(parts))
      found = teachers([taught[i] for i in part], stop)
      joined = [np.concatenate(x) for x in zip(*found, strict=True)]
      lengths = np.array([len(f[2]) for f in found], np.int32)
      arrays_lib.write(_path(folder, number), soft.narrowed(*joined) | {"lengths": lengths})


def load(taught: Sequence[Taught], folder: Path) -> list[Kept | None]:
  """What was kept of each conversation; None where no expert knows it."""
  found: list[Kept | None] = [None] * len(taught)
  for number, part in enumerate(blocks(taught)):
    with np.load(_path(folder, number)) as held:
      kept = dict(held)
    ends = np.cumsum(kept["lengths"])[:-1]
    for i, *arrays in zip(part, *(np.split(x, ends) for x in soft.widened(kept)), strict=True):
      found[i] = tuple(arrays)
  return found


def _path(folder: Path, number: int) -> Path:
  return folder / f"logits-{number:05}.npz"


def check(asked: Sequence[Expert], cfg: config.Config, tokenizer: Tokenizer) -> None:
  """Raises ConfigError for experts whose probabilities are not of this run's tokens."""
  for source in (expert.source for expert in asked):
    if experts.version(source) < 0:
      raise ConfigError(f"distill.mode='logits' needs runs as experts, and {source} is a Hugging "
                        "Face folder; make one of it with dsv3 convert")
    theirs = config.from_dict(checkpoint.load_meta(source)["config"]).model
    own = Tokenizer.load(str(Path(source) / "tokenizer.json"), theirs.vocab_size)
    if own.hash != tokenizer.hash or theirs.vocab_size != cfg.model.vocab_size:
      raise ConfigError(f"distill.mode='logits': the expert {source} has another tokenizer or "
                        "model.vocab_size than this run, so its probabilities are of other tokens; "
                        "set mode='answers'")


class _Teachers:
  """Experts' probabilities of conversations; one expert's weights are held at a time."""

  def __init__(self, asked: Sequence[Expert], cfg: config.Config, tokenizer: Tokenizer):
    self._asked, self._cfg, self._tokenizer = asked, cfg, tokenizer
    self._current, self._run, self._weights = -1, None, None

  def __call__(self, taught: Sequence[Taught], stop: Callable[[], bool]) -> list[Kept]:
    """(top, top_logprob, rest_logprob) of each conversation's answer tokens."""
    found: list[Any] = [None] * len(taught)
    for number in sorted({t.expert for t in taught}):
      self._load(number)
      mine = [i for i, t in enumerate(taught) if t.expert == number]
      for i, kept in zip(mine, self._of([taught[i] for i in mine], stop), strict=True):
        found[i] = kept
    return found

  def _load(self, number: int) -> None:
    if number == self._current:
      return
    source, self._weights = self._asked[number].source, None
    params, buffers, meta = checkpoint.load_params(source)
    theirs = config.from_dict(meta["config"]).model
    self._run = soft.teacher(theirs, self._cfg.runtime, self._cfg.distill.top)
    self._weights, self._current = (params, buffers), number

  def _of(self, taught: Sequence[Taught], stop: Callable[[], bool]) -> list[Kept]:
    reflect = self._cfg.distill.reflect
    asked = [messages.encode(rejection.as_asked(t, reflect), self._tokenizer) for t in taught]
    data = self._cfg.data
    # A question with the request for reflection may be longer than what the student sees.
    length = max(data.sequence_length + 1, -(-max(len(s.tokens) for s in asked) // 64) * 64 + 1)
    packer = samples.Samples(asked, (), self._tokenizer, length - 1, data.micro_batch, 0)
    rows = samples.pack([len(s.tokens) for s in asked], length, range(len(asked)))
    found: list[Any] = [None] * len(asked)
    for start in range(0, len(rows), data.micro_batch):
      if stop():
        raise Stopped
      some = rows[start:start + data.micro_batch]
      made = [packer.row(row, asked) for row in some]
      made += [packer.row((), asked)] * (data.micro_batch - len(some))
      batch = {k: np.stack([row[k] for row in made]) for k in ("tokens", "segments")}
      kept = jax.device_get(self._run(*self._weights, batch))
      for b, row in enumerate(some):
        at = 0
        for i in row:
          where = at + np.flatnonzero(asked[i].mask) - 1  # the place before each
          found[i] = tuple(x[b, where] for x in kept)
          at += len(asked[i].tokens)
    return found
