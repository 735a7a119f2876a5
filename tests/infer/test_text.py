"""Text while its tokens come."""

import hypothesis
import pytest
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.infer.text import Stream


def as_bytes(tokens):
  return bytes(tokens)


@hypothesis.given(st.text(max_size=30), st.lists(st.integers(1, 4), max_size=20),
                  st.lists(st.text("ab\né", min_size=1, max_size=4), max_size=3))
@hypothesis.settings(max_examples=200, deadline=None)
def test_pieces_make_the_whole(text, sizes, stop):
  """Oracle: str.find on the whole text; however it is cut, also inside characters and stops."""
  stream, data, pieces = Stream(as_bytes, stop), text.encode(), []
  for size in [*sizes, len(data)]:
    pieces.append(stream.push(data[:size]))
    data = data[size:]
  pieces.append(stream.close())
  found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
  end = min(found, default=(0, len(text)))[1]  # where the stop that is whole first begins
  assert "".join(pieces) == stream.text == text[:end]
  assert stream.ended == bool(found)


def test_what_is_held_back():
  """Printed example: a stop's beginning waits, half a character waits."""
  stream = Stream(as_bytes, ["\n\n"])
  assert stream.push(b"a\n") == "a"
  assert stream.push("\xe9".encode()[:1]) == ""
  assert stream.push("\xe9".encode()[1:] + b"\n") == "\n\xe9"  # no second line break came
  assert stream.push(b"\nmore") == "" and stream.ended
  assert stream.push(b"x") == stream.close() == ""
  half = Stream(as_bytes)
  assert half.push("\xe9".encode()[:1]) == "" and half.close() == "\ufffd"


def test_errors():
  """Law: an empty stop string would end every text."""
  with pytest.raises(ConfigError, match="stop string is empty"):
    Stream(as_bytes, ["a", ""])
