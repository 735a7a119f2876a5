"""Pages of the latent cache: who has which, and which tokens they hold.

A full page whose entries are written may be shared: entries depend on a token and those before it
alone, so a page is known by a hash chained over its own tokens and all earlier pages. A page that
nobody uses any more stays known until its place is needed, the longest unused first.
"""

import collections
import hashlib
from collections.abc import Sequence

import numpy as np

from dsv3_jax.config import ConfigError

_ROOT = b""


class Pages:
  """Counts references to the pages of a pool.

  Args:
    count: pages in the pool.
    size: tokens a page.
    share: whether full pages are found again by their tokens.

  Raises:
    ConfigError: no page, or pages without room.
  """

  def __init__(self, count: int, size: int, share: bool = True):
    if count < 1 or size < 1:
      raise ConfigError(f"pages={count} of page_size={size} tokens: both must be at least 1")
    self.count, self.size = count, size
    self._share = share
    self._users = [0] * count
    self._blank = list(range(count - 1, -1, -1))  # hold nothing
    self._idle: collections.OrderedDict[int, None] = collections.OrderedDict()  # known, not used
    self._known: dict[bytes, int] = {}
    self._name: list[bytes | None] = [None] * count

  @property
  def free(self) -> int:
    """Pages that could be taken."""
    return len(self._blank) + len(self._idle)

  def names(self, tokens: Sequence[int]) -> list[bytes]:
    """The names of the full pages of a sequence."""
    ids, name, found = np.asarray(tokens, np.int32), _ROOT, []
    for start in range(0, len(ids) - self.size + 1, self.size):
      page = ids[start:start + self.size].tobytes()
      name = hashlib.blake2b(name + page, digest_size=16).digest()
      found.append(name)
    return found

  def known(self, names: Sequence[bytes]) -> int:
    """How many pages at the beginning of a sequence are known, given the names of its pages."""
    return next((i for i, name in enumerate(names) if name not in self._known), len(names))

  def find(self, names: Sequence[bytes]) -> list[int]:
    """Takes the known pages at the beginning of a sequence."""
    found = [self._known[name] for name in names[:self.known(names)]]
    for page in found:
      self._idle.pop(page, None)
      self._users[page] += 1
    return found

  def take(self, count: int) -> list[int] | None:
    """Pages to write in; None, and none taken, if fewer are free."""
    if count > self.free:
      return None
    taken = []
    for _ in range(count):
      if self._blank:
        page = self._blank.pop()
      else:
        page, _ = self._idle.popitem(last=False)
        self._forget(page)
      self._users[page] = 1
      taken.append(page)
    return taken

  def publish(self, page: int, name: bytes) -> None:
    """Makes a page that is full and written known under its name; one that is known stays."""
    if self._share and name not in self._known:
      self._known[name] = page
      self._name[page] = name

  def release(self, pages: Sequence[int]) -> None:
    """Gives up one use of each page. The last ones of a sequence are forgotten first."""
    for page in reversed(pages):
      self._users[page] -= 1
      if self._users[page] < 0:
        raise ValueError(f"page {page} was released more often than taken")
      if self._users[page] == 0:
        if self._name[page] is None:
          self._blank.append(page)
        else:
          self._idle[page] = None

  def _forget(self, page: int) -> None:
    name = self._name[page]
    if name is not None:
      del self._known[name]
      self._name[page] = None
