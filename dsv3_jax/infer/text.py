"""Text of a completion while its tokens come."""

import codecs
from collections.abc import Callable, Iterable, Sequence

from dsv3_jax.config import ConfigError


class Stream:
  """Turns tokens into text as far as it is settled.

  A character may be cut into several tokens, and a stop string into several pieces of text: what
  may yet turn out to be one is held back.

  Args:
    decode_bytes: tokens to the bytes that they stand for.
    stop: strings that end the text, which ends before the one that is whole first (the longer of
      two that are whole at once), however the text was cut into tokens.

  Attributes:
    text: all that was settled so far.
    ended: whether a stop string was met.

  Raises:
    ConfigError: an empty stop string.
  """

  def __init__(self, decode_bytes: Callable[[Iterable[int]], bytes], stop: Sequence[str] = ()):
    if "" in stop:
      raise ConfigError("a stop string is empty; leave it out, or give some text")
    self.text, self.ended = "", False
    self._decode_bytes, self._stop = decode_bytes, tuple(stop)
    self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
    self._held = ""

  def push(self, tokens: Iterable[int]) -> str:
    """Takes the next tokens; returns the text that they settle."""
    return self._settle(self._decoder.decode(self._decode_bytes(tokens)), final=False)

  def close(self) -> str:
    """The rest, when no more tokens come: half a character becomes U+FFFD."""
    return self._settle(self._decoder.decode(b"", final=True), final=True)

  def _settle(self, new: str, final: bool) -> str:
    if self.ended:
      return ""
    whole = self._held + new
    found = [(at + len(s), at) for s in self._stop if (at := whole.find(s)) >= 0]
    if found:
      whole, self._held, self.ended = whole[:min(found)[1]], "", True
    else:
      keep = 0 if final else max((_overlap(whole, s) for s in self._stop), default=0)
      whole, self._held = whole[:len(whole) - keep], whole[len(whole) - keep:]
    self.text += whole
    return whole


def _overlap(text: str, stop: str) -> int:
  """Length of the longest end of `text` with which `stop` begins."""
  return next((n for n in range(min(len(text), len(stop) - 1), 0, -1)
               if text.endswith(stop[:n])), 0)
