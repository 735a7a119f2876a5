"""Pages of the cache: taken, shared, given back."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.infer.pages import Pages


def find(pages, tokens):
  """As the engine does: short of the last token, which must be run for what comes after it."""
  return pages.find(pages.names(tokens[:-1]))


def write(pages, tokens, held):
  """Takes what a sequence lacks and makes its full pages known."""
  more = pages.take(-(-len(tokens) // pages.size) - len(held))
  if more is None:
    return None
  held = [*held, *more]
  for page, name in zip(held, pages.names(tokens)):
    pages.publish(page, name)
  return held


def test_shared_beginning():
  """Printed example: two prompts of one beginning share its full pages, never their last token."""
  pages = Pages(6, 4)
  first = write(pages, list(range(9)), find(pages, list(range(9))))
  assert len(first) == 3 and pages.free == 3
  assert find(pages, list(range(8))) == first[:1]  # token 7 must be run
  assert find(pages, [*range(8), 99]) == first[:2]
  assert find(pages, [*range(4), 99, 5, 6, 7, 8]) == first[:1]
  assert find(pages, [99, *range(8)]) == []
  for _ in range(2):
    pages.release(first[:1])
  pages.release(first[:2])
  pages.release(first)
  assert pages.free == 6 and find(pages, list(range(9))) == first[:2]  # nobody's, still known
  pages.release(first[:2])
  assert len(pages.take(6)) == 6 and find(pages, list(range(9))) == []  # until the place is needed
  assert pages.take(1) is None


def test_the_end_is_forgotten_first():
  """Law: what is given up last-page-first keeps beginnings longest."""
  pages = Pages(4, 1)
  held = write(pages, [5, 6, 7, 8], [])
  pages.release(held)
  pages.take(2)
  assert find(pages, [5, 6, 7, 8]) == held[:2]


def test_not_shared():
  """Law: without sharing every page is someone's own."""
  pages = Pages(4, 1, share=False)
  write(pages, [5, 6], [])
  assert find(pages, [5, 6, 7]) == []


@hypothesis.given(st.lists(st.tuples(st.integers(0, 2**31), st.booleans()), max_size=60),
                  st.integers(1, 12), st.integers(1, 3))
@hypothesis.settings(max_examples=200, deadline=None)
def test_nothing_is_lost(moves, count, size):
  """Oracle: a dict of what every page holds: no page has two contents while in use, found pages
  hold what was asked for, and all are free when all were given back."""
  pages, live, content = Pages(count, size), [], {}
  for seed, ends in moves:
    if ends and live:
      pages.release(live.pop(seed % len(live))[0])
      continue
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 2, rng.integers(1, 3 * size + 2)).tolist()
    found = find(pages, tokens)
    assert len(found) * size < len(tokens)
    for i, page in enumerate(found):
      assert content[page] == tokens[:(i + 1) * size]
    held = write(pages, tokens, found)
    if held is None:
      pages.release(found)
      continue
    used = {page for other, _ in live for page in other}
    assert not used & set(held[len(found):])
    for i, page in enumerate(held[len(found):], len(found)):
      content[page] = tokens[:(i + 1) * size]
    live.append((held, tokens))
  for held, _ in live:
    pages.release(held)
  assert pages.free == count
  with pytest.raises(ValueError, match="more often than taken"):
    pages.release([0])


def test_errors():
  """Law: a pool has room."""
  with pytest.raises(ConfigError, match="pages=0"):
    Pages(0, 4)
