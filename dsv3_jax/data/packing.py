"""Packing: documents one after another into sequences of T + 1 tokens, none lost.

A sequence predicts its tokens 1 to T from the tokens before them, so consecutive sequences of one
stream share one token: the last of one is the first of the next. Thus every token of the stream
but its very first is predicted exactly once. With isolation (supervised fine-tuning) a document's
tokens see their own document alone; there the shared token is needed only where a document goes on
in the next sequence.

The position in a stream is two things: a cursor, which names a document, and an offset into it.
That is all of a packer's state, because a document is a pure function of its cursor.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np


class Position(NamedTuple):
  """The next token that a packer takes; `offset` may equal the document's length."""

  cursor: Any
  offset: int


class Packer:
  """Cuts one endless stream of documents into sequences."""

  def __init__(self, document: Callable[[Any], np.ndarray], advance: Callable[[Any], Any],
               length: int, isolate: bool, position: Position):
    """Args:
      document: cursor -> int32 [n], n >= 1; called again with the same cursor after a restore.
      advance: cursor -> cursor of the following document. StopIteration ends the stream.
      length: S = T + 1, tokens of a sequence.
      isolate: whether attention will be limited to a document.
      position: where to begin.
    """
    self._document, self._advance = document, advance
    self._length, self._isolate = length, isolate
    self.position = position
    self._tokens: np.ndarray | None = None

  def next(self) -> tuple[np.ndarray, np.ndarray]:
    """The next sequence: tokens int32 [S] and, counted from 0, their document int32 [S].

    At the end of a finite stream the rest of the last sequence has document -1 (and token 0);
    StopIteration is raised when no target is left.
    """
    cursor, offset = self.position
    tokens_S = np.zeros(self._length, np.int32)
    segments_S = np.full(self._length, -1, np.int32)
    filled = segment = 0
    while filled < self._length:
      if self._tokens is None:
        self._tokens = self._document(cursor)
      if offset >= len(self._tokens):
        try:
          cursor = self._advance(cursor)
        except StopIteration:
          if filled < 2:  # the shared token alone predicts nothing
            raise
          break
        offset, self._tokens = 0, self._document(cursor)
      n = min(self._length - filled, len(self._tokens) - offset)
      tokens_S[filled:filled + n] = self._tokens[offset:offset + n]
      segments_S[filled:filled + n] = segment
      filled, offset, segment = filled + n, offset + n, segment + 1
    if not self._isolate or offset < len(self._tokens):
      offset -= 1
    self.position = Position(cursor, offset)
    return tokens_S, segments_S


def fixed_batches(document: Callable[[int], np.ndarray], count: int, *, length: int, isolate: bool,
                  pad: int, batch_size: int, limit: int = 0) -> list[dict[str, np.ndarray]]:
  """Batches of a finite stream in which each token is a target once, for evaluation.

  Args:
    document: number -> int32 [n], n >= 1.
    count: of documents.
    length: S = T + 1, tokens of a sequence.
    isolate: whether attention will be limited to a document.
    pad: token that fills up the last sequences.
    batch_size: B, sequences of a batch.
    limit: batches at most; 0 for all.

  Returns:
    A list of {"tokens": int32 [B, S], "mask": int8 [B, S], and with isolation "segments": int32
    [B, S], otherwise "valid": int8 [B, S]}. mask is 1 where a token is a target that counts; what
    fills up has mask 0, segment -1 and valid 0.
  """
  rows = []
  for tokens_S, segments_S in _rows(document, count, length, isolate):
    if limit and len(rows) == limit * batch_size:
      break
    padding = segments_S < 0
    mask_S = ~padding
    mask_S[0] = False
    if isolate:
      mask_S[1:] &= segments_S[1:] == segments_S[:-1]
    rows.append((np.where(padding, pad, tokens_S).astype(np.int32), mask_S.astype(np.int8),
                 segments_S))
  empty = (np.full(length, pad, np.int32), np.zeros(length, np.int8),
           np.full(length, -1, np.int32))
  rows += [empty] * (-len(rows) % batch_size)
  batches = []
  for i in range(0, len(rows), batch_size):
    tokens, mask, segments = (np.stack(x) for x in zip(*rows[i:i + batch_size], strict=True))
    apart = {"segments": segments} if isolate else {"valid": (segments >= 0).astype(np.int8)}
    batches.append({"tokens": tokens, "mask": mask, **apart})
  return batches


def _rows(document: Callable[[int], np.ndarray], count: int, length: int, isolate: bool
          ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  def advance(i: int) -> int:
    if i + 1 == count:
      raise StopIteration
    return i + 1

  if count:
    packer = Packer(document, advance, length, isolate, Position(0, 0))
    while True:
      try:
        yield packer.next()
      except StopIteration:
        return
