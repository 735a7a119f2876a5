"""Conversations as a corpus of the training loop: whole, packed, answers alone as targets.

Unlike text (`data/packing.py`) a conversation is never cut: those of an epoch, in its order, go to
rows of T + 1 tokens, each into the first of the open rows that has room. Conversations in a row are
segments, which see themselves alone (report 5.1), so where one lies changes nothing about it. What
is left of a row is padding.

Each epoch has an order of its own and has each conversation once. All is a function of the seed,
so that a position is an epoch and a row.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain.messages import Sample

_OPEN = 64  # rows that are looked at for room


def pack(lengths: Sequence[int], room: int, order: Sequence[int]) -> list[list[int]]:
  """Rows of conversations' numbers, none over `room` tokens, in the order of their first ones."""
  rows: list[list[int]] = []
  free: list[tuple[int, int]] = []  # room left in open rows, and which
  for i in order:
    for place, (left, row) in enumerate(free):
      if lengths[i] <= left:
        rows[row].append(i)
        free[place] = (left - lengths[i], row)
        break
    else:
      free = [*free[-_OPEN + 1:], (room - lengths[i], len(rows))]
      rows.append([i])
  return rows


def split(samples: Iterable[Any], fraction: float) -> tuple[list[Any], list[Any]]:
  """Samples to train on, and held out: those whose tokens' hash falls into `fraction`.

  So which are held out does not depend on the others.
  """
  held, kept = [], []
  for sample in samples:
    number = int.from_bytes(hashlib.blake2b(sample.tokens.tobytes(), digest_size=8).digest(), "big")
    (held if number < fraction * 2**64 else kept).append(sample)
  return kept, held


class Samples:
  """A corpus of conversations, as `train.run` takes one.

  Args:
    train, validation: conversations.
    tokenizer: the model's.
    length: T.
    micro_batch: rows of a micro-batch.
    seed: of the order.
    what: for a person: where they come from, what was left out.

  Raises:
    ConfigError: none to train on, none with an answer, or one longer than a row.
  """

  folders: tuple[str, ...] = ()

  def __init__(self, train: Sequence[Sample], validation: Sequence[Sample], tokenizer: Tokenizer,
               length: int, micro_batch: int, seed: int, what: str = ""):
    if not train:
      raise ConfigError("there is no conversation to train on" + (f": {what}" if what else ""))
    longest = max(len(s.tokens) for s in (*train, *validation))
    if longest > length + 1:
      raise ConfigError(f"a conversation has {longest} tokens, and data.sequence_length={length} "
                        f"has room for {length + 1}; raise it")
    if not any(s.mask.any() for s in train):
      raise ConfigError("no conversation has an answer to learn")
    self.tokenizer, self._length, self._seed = tokenizer, length, seed
    self.micro_batch = micro_batch
    self._train, self._validation, self._what = tuple(train), tuple(validation), what
    digest = hashlib.sha256(tokenizer.hash.encode())
    for sample in (*train, *validation):
      digest.update(sample.tokens.tobytes() + sample.mask.tobytes())
    self.fingerprint = digest.hexdigest()[:16]
    self.rows = len(self._packed(0))
    count = lambda samples: int(sum(s.mask.sum() for s in samples))
    self.summary = {"documents": len(train) + len(validation), "train_tokens": count(train),
                    "validation_tokens": count(validation), "rows": self.rows,
                    "tokens": sum(len(s.tokens) for s in (*train, *validation)), "note": what}

  def describe(self) -> str:
    """The summary as one line."""
    s = self.summary
    return (f"{len(self._train):,} conversations in {self.rows:,} rows an epoch, "
            f"{s['train_tokens']:,} tokens of answers; {len(self._validation):,} held out"
            + (f"; {self._what}" if self._what else ""))

  def train_iterator(self, batch_schedule: Callable[[int], int],
                     rows: Sequence[int] | None = None) -> "SampleIterator":
    """Endless batches, epoch after epoch; `rows` of each micro-batch, all where None."""
    return SampleIterator(self, batch_schedule, rows)

  def validation_batches(self, batch_size: int, limit: int = 0) -> list[dict[str, np.ndarray]]:
    """Held-out conversations as batches [B, S]; the last is filled up with padding."""
    packed = pack([len(s.tokens) for s in self._validation], self._length + 1,
                  range(len(self._validation)))
    made = [self.row(row, self._validation) for row in packed]
    made = made[:limit * batch_size] if limit else made
    made += [self.row((), self._validation)] * (-len(made) % batch_size)
    return [{k: np.stack([row[k] for row in made[at:at + batch_size]]) for k in made[0]}
            for at in range(0, len(made), batch_size)]

  def validation_text(self, limit_bytes: int = 0) -> bytes:
    """Answers of held-out conversations."""
    text = b"".join(self.tokenizer.decode_bytes(s.tokens[s.mask > 0]) for s in self._validation)
    return text[:limit_bytes or None]

  def epoch(self, number: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows of an epoch."""
    for row in self._packed(number):
      yield self.row(row, self._train)

  def _packed(self, epoch: int) -> list[list[int]]:
    order = np.random.default_rng([self._seed, epoch]).permutation(len(self._train))
    return pack([len(s.tokens) for s in self._train], self._length + 1, order.tolist())

  def row(self, members: Sequence[int], samples: Sequence[Sample]) -> dict[str, np.ndarray]:
    """Conversations side by side: "tokens", "segments" int32 and "mask" int8, [S] each."""
    S = self._length + 1
    made = {"tokens": np.full(S, self.tokenizer.pad, np.int32),
            "segments": np.full(S, -1, np.int32), "mask": np.zeros(S, np.int8)}
    at = 0
    for number, i in enumerate(members):
      end = at + len(samples[i].tokens)
      made["tokens"][at:end], made["mask"][at:end] = samples[i].tokens, samples[i].mask
      made["segments"][at:end] = number
      at = end
    return made


class SampleIterator:
  """Batches {"tokens", "segments", "mask"}, [A, b, S] each."""

  def __init__(self, samples: Samples, batch_schedule: Callable[[int], int],
               rows: Sequence[int] | None):
    self._samples, self._schedule, self._rows = samples, batch_schedule, rows
    self._step = self._epoch = self._row = 0
    self._packed: list[dict[str, np.ndarray]] = []

  def start(self) -> None:
    """Packs the first epoch."""
    self._packed = self._packed or list(self._samples.epoch(self._epoch))

  def follow(self, state: Any) -> None:
    """Conversations do not depend on the parameters."""

  def said(self) -> dict[str, Any]:
    """Which epoch the last batch ended in."""
    return {"epoch": self._epoch}

  def __next__(self) -> dict[str, np.ndarray]:
    self.start()
    wanted, found = self._schedule(self._step), []
    while len(found) < wanted:
      if self._row == len(self._packed):
        self._epoch, self._row = self._epoch + 1, 0
        self._packed = list(self._samples.epoch(self._epoch))
      found.append(self._packed[self._row])
      self._row += 1
    self._step += 1
    micro = self._samples.micro_batch
    batch = {k: np.stack([row[k] for row in found]).reshape(
        wanted // micro, micro, *found[0][k].shape) for k in found[0]}
    return batch if self._rows is None else {k: v[:, list(self._rows)] for k, v in batch.items()}

  def get_state(self) -> dict[str, Any]:
    """Where the next batch begins; the same in all processes."""
    return {"version": 1, "corpus": self._samples.fingerprint, "rows": self._samples.micro_batch,
            "step": self._step, "lanes": {}, "epoch": self._epoch, "row": self._row}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to the batch that followed when the state was taken.

    Raises:
      ValueError: it is of other conversations.
    """
    if state["corpus"] != self._samples.fingerprint:
      raise ValueError(f"the checkpoint was trained on conversations {state['corpus']}, this run's "
                       f"data give {self._samples.fingerprint}: files or the tokenizer changed; "
                       "bring them back, or begin a new workdir")
    self._step, self._epoch, self._row = (int(state[k]) for k in ("step", "epoch", "row"))
    self._packed = []

  def close(self) -> None:
    """Nothing to end."""
