"""Preferences as a corpus of the training loop: both answers of a pair in the same row.

A pair is two segments, 2k and 2k + 1 of its row, which do not see each other; so wherever rows are
cut over devices and micro-batches a pair stays whole. "sign" is +1 at the chosen answer's end token
and -1 at the rejected one's, where scores are read, and "weight" at the former what the pair weighs
in the batch: one over the batch's pairs. "mask" has the text that is learned beside the scores:
thoughts, or without them the chosen answer.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import preferences
from dsv3_jax.posttrain.preferences import Preference
from dsv3_jax.posttrain.samples import SampleIterator, Samples


class Pair(NamedTuple):
  """Both answers to a question in tokens, each with the question before it and its end token.

  Attributes:
    tokens: int32 [n], the conversation with the chosen answer and that with the rejected one.
    mask: bool [n], text that is learned beside the scores.
    chosen: how many of the tokens are the chosen one's.
  """

  tokens: np.ndarray
  mask: np.ndarray
  chosen: int


def encode(preference: Preference, tokenizer: Tokenizer, thought: bool = False) -> Pair:
  """A preference in the chat template; with `thought` each answer is followed by the one on it."""
  tokens: list[int] = []
  mask: list[bool] = []
  ends = []
  for chosen in (True, False):
    parts = chat.parts(preferences.answered(preference, chosen, thought), tokenizer)
    for part in parts:
      tokens += part.tokens
      mask += [part is parts[-1] and (thought or chosen)] * len(part.tokens)
    ends.append(len(tokens))
  return Pair(np.array(tokens, np.int32), np.array(mask), ends[0])


def encode_all(found: Iterable[Preference], tokenizer: Tokenizer, thought: bool, longest: int
               ) -> tuple[list[Pair], int]:
  """Pairs of at most `longest` tokens, and how many were longer and are left out.

  Raises:
    ConfigError: thoughts are asked for, and one has none.
  """
  made: list[Pair] = []
  dropped = 0
  for number, preference in enumerate(found):
    if thought and not preference.chosen_thought:
      raise ConfigError(f"preference {number} has no thoughts (chosen_thought, rejected_thought); "
                        "give them, or set reward.thought=False")
    pair = encode(preference, tokenizer, thought)
    if len(pair.tokens) <= longest:
      made.append(pair)
    else:
      dropped += 1
  return made, dropped


class Pairs(Samples):
  """A corpus of pairs, as `train.run` takes one; arguments and errors as of `Samples`.

  The last place of a row is padding: the model reads T of its T + 1 tokens, and scores are read
  at ends.
  """

  def __init__(self, train: Sequence[Pair], validation: Sequence[Pair], tokenizer: Tokenizer,
               length: int, micro_batch: int, seed: int, what: str = ""):
    if not train:
      raise ConfigError("there is no preference to train on, or none fits data.sequence_length="
                        f"{length} with both its answers")
    super().__init__(train, validation, tokenizer, length - 1, micro_batch, seed, what)

  def describe(self) -> str:
    """The summary as one line."""
    return (f"{len(self._train):,} pairs in {self.rows:,} rows an epoch; "
            f"{len(self._validation):,} held out" + (f"; {self._what}" if self._what else ""))

  def train_iterator(self, batch_schedule: Callable[[int], int],
                     rows: Sequence[int] | None = None) -> "PairIterator":
    """Endless batches, epoch after epoch; `rows` of each micro-batch, all where None."""
    return PairIterator(self, batch_schedule, rows)

  def validation_batches(self, batch_size: int, limit: int = 0) -> list[dict[str, np.ndarray]]:
    """Held-out pairs as batches [B, S], in which each weighs 1."""
    return [batch | {"weight": (batch["sign"] > 0).astype(np.float32)}
            for batch in super().validation_batches(batch_size, limit)]

  def row(self, members: Sequence[int], samples: Sequence[Any]) -> dict[str, np.ndarray]:
    """Pairs side by side: "tokens", "segments" int32, "mask" and "sign" int8, [S] each."""
    made = {k: np.append(v, v.dtype.type(fill)) for (k, v), fill in zip(
        super().row(members, samples).items(), (self.tokenizer.pad, -1, 0), strict=True)}
    made["sign"] = np.zeros_like(made["mask"])
    at = 0
    for number, i in enumerate(members):
      pair = samples[i]
      middle, end = at + pair.chosen, at + len(pair.tokens)
      made["segments"][at:middle], made["segments"][middle:end] = 2 * number, 2 * number + 1
      made["sign"][middle - 1], made["sign"][end - 1] = 1, -1
      at = end
    return made


class PairIterator(SampleIterator):
  """Batches {"tokens", "segments", "mask", "sign", "weight"}, [A, b, S] each."""

  def __init__(self, pairs: Pairs, batch_schedule: Callable[[int], int],
               rows: Sequence[int] | None):
    super().__init__(pairs, batch_schedule, None)
    self._held = rows

  def __next__(self) -> dict[str, np.ndarray]:
    batch = super().__next__()  # of all processes: their pairs are counted
    chosen = batch["sign"] > 0
    batch["weight"] = chosen.astype(np.float32) / np.float32(max(chosen.sum(), 1))
    if self._held is None:
      return batch
    return {k: v[:, list(self._held)] for k, v in batch.items()}
