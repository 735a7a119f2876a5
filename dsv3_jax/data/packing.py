"""Packing: documents one after another into sequences of T + 1 tokens, none lost.

A sequence predicts its tokens 1 to T from the tokens before them, so consecutive sequences of one
stream share one token: the last of one is the first of the next. Thus every token of the stream
but its very first is predicted exactly once. With isolation (supervised fine-tuning) a document's
tokens see their own document alone; there the shared token is needed only where a document goes on
in the next sequence.

The position in a stream is two things: a cursor, which names a document, and an offset into it.
That is all of a packer's state, because a document is a pure function of its cursor.
"""

from collections.abc import Callable
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
