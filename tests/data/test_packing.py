import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.packing import Packer, Position

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
WIDTH = st.integers(2, 17)
START = Position(0, 0)


def documents(lengths):
  """Documents whose tokens are all different, so that a token names its place."""
  ends = np.cumsum(lengths)
  return [np.arange(e - n, e, dtype=np.int32) + 1 for n, e in zip(lengths, ends, strict=True)]


def packer(docs, width, isolate, position=START):
  def advance(i):
    if i + 1 == len(docs):
      raise StopIteration
    return i + 1

  return Packer(lambda i: docs[i], advance, width, isolate, position)


def drain(p):
  rows, positions = [], [p.position]
  try:
    while True:
      rows.append(p.next())
      positions.append(p.position)
  except StopIteration:
    return rows, positions


@settings(deadline=None)
@given(LENGTHS, WIDTH)
def test_plain_packing_is_the_stream_cut_with_one_token_shared(lengths, width):
  """Oracle: numpy concatenation; each token but the first is the target of exactly one row."""
  docs = documents(lengths)
  rows, _ = drain(packer(docs, width, False))
  stream = np.concatenate(docs)
  targets = [t for tokens, segments in rows for t in tokens[1:][segments[1:] >= 0].tolist()]
  assert targets == stream[1:].tolist()
  for tokens, segments in rows:
    real = tokens[segments >= 0]
    assert np.all(np.diff(real) == 1) and np.all(tokens[segments < 0] == 0)
  assert all((segments >= 0).all() for _, segments in rows[:-1])


@settings(deadline=None)
@given(LENGTHS, WIDTH)
def test_isolated_packing_predicts_each_token_of_a_document_but_its_first(lengths, width):
  """Oracle: a list of (token before, token) pairs within documents; each occurs exactly once."""
  docs = documents(lengths)
  rows, _ = drain(packer(docs, width, True))
  wanted = [(a, b) for d in docs for a, b in zip(d[:-1].tolist(), d[1:].tolist(), strict=True)]
  pairs = []
  for tokens, segments in rows:
    inside = (segments[1:] == segments[:-1]) & (segments[1:] >= 0)
    pairs += zip(tokens[:-1][inside].tolist(), tokens[1:][inside].tolist(), strict=True)
  assert pairs == wanted
  assert {t for tokens, s in rows for t in tokens[s >= 0].tolist()} >= {
      t for d in docs if len(d) > 1 for t in d.tolist()}
  shared = [b[0] for (a, _), (b, _) in itertools.pairwise(rows) if a[-1] == b[0]]
  assert not set(shared) & {d[-1] for d in docs}  # only where a document goes on


@settings(deadline=None)
@given(LENGTHS, WIDTH, st.booleans(), st.data())
def test_a_packer_restarted_at_a_position_goes_on_exactly(lengths, width, isolate, data):
  """Oracle: the packer that was not interrupted."""
  docs = documents(lengths)
  rows, positions = drain(packer(docs, width, isolate))
  at = data.draw(st.integers(0, len(rows)))
  again, _ = drain(packer(docs, width, isolate, positions[at]))
  assert len(again) == len(rows) - at
  for (a, b), (c, d) in zip(rows[at:], again, strict=True):
    np.testing.assert_array_equal(a, c)
    np.testing.assert_array_equal(b, d)
