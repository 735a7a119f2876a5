"""What a family of generated problems is, and who is held out.

A family draws statements (plain tuples) by asking for choices, and solves them. A problem is known
by its key: the statement in a canonical form, in which what does not change the question (the
order of summands, the order in which a list to be sorted was written) is gone. The split is a hash
of family and key alone. So a problem is in train or in test for ever, whatever the seed, the level
and the number of problems drawn, and training on one split can never show a problem of the other.

Draws go through `Choices`, which a random stream answers, or `every`, which answers in all ways
there are and so counts a level's problems exactly.
"""

import dataclasses
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

TEST_SHARE = 1 / 8  # of all problems
SPLITS = ("train", "test")
# The answer alone, exactly. Equality as mathematics would pay for a box with the question in it.
EXACT = (("exact", 1.0), ("format", 0.1))

T = TypeVar("T")


class Solution(NamedTuple):
  """A statement in words, with its answer.

  Attributes:
    prompt: of the user.
    answer: the right one, as it stands in the box.
    steps: lines of a worked solution.
    check: lines that verify the result in another way.
  """

  prompt: str
  answer: str
  steps: list[str]
  check: list[str]

  @property
  def short(self) -> str:
    """The steps and the boxed answer."""
    return "\n".join([*self.steps, boxed(self.answer)])

  @property
  def long(self) -> str:
    """The steps, their verification, and the boxed answer."""
    return "\n".join([*self.steps, *self.check, boxed(self.answer)])


def boxed(answer: str) -> str:
  """The format that an answer must have."""
  return f"\\boxed{{{answer}}}"


class Choices:
  """Where a draw's choices come from."""

  def below(self, n: int) -> int:
    """One of 0 ... n - 1."""
    raise NotImplementedError

  def between(self, low: int, high: int) -> int:
    """One of low ... high, both included."""
    return low + self.below(high - low + 1)

  def one(self, options: Sequence[T]) -> T:
    return options[self.below(len(options))]

  def some(self, options: Sequence[T], n: int) -> list[T]:
    """n different ones, in a chosen order."""
    left = list(options)
    return [left.pop(self.below(len(left))) for _ in range(n)]


class Random(Choices):
  """Even choices; the same for one seed in every process and Python."""

  def __init__(self, seed: str):
    self._random = random.Random(seed)  # hashes text by SHA-512, whatever PYTHONHASHSEED is

  def below(self, n: int) -> int:
    # Of the methods, random() alone is promised not to change from Python to Python.
    return int(self._random.random() * n)


class _Path(Choices):
  """Given choices, then 0; remembers what was taken, and of how many."""

  def __init__(self, given: Sequence[int]):
    self._given = given
    self.taken: list[tuple[int, int]] = []

  def below(self, n: int) -> int:
    at = len(self.taken)
    choice = self._given[at] if at < len(self._given) else 0
    self.taken.append((choice, n))
    return choice


@dataclasses.dataclass(frozen=True)
class Family:
  """A kind of problem.

  Attributes:
    name: of it.
    levels: what each level is, in words; each is harder than the one before.
    draw: of level and choices, a statement; None where the choices make none.
    key: a statement's canonical form.
    solve: a statement in words, with its answer.
    reward: as in `problems.Problem`.
  """

  name: str
  levels: tuple[str, ...]
  draw: Callable[[int, Choices], Any]
  key: Callable[[Any], str]
  solve: Callable[[Any], Solution]
  reward: tuple[tuple[str, float], ...] = EXACT

  def digest(self, statement: Any) -> str:
    """Names a problem: 16 hexadecimal digits."""
    text = f"{self.name}\n{self.key(statement)}"
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def split_of(digest: str) -> str:
  """train or test."""
  return SPLITS[int(digest, 16) < TEST_SHARE * 16**16]


def every(draw: Callable[[Choices], T | None]) -> Iterator[T | None]:
  """What a draw gives for each series of choices; a statement comes as often as it has series."""
  path: list[tuple[int, int]] = []
  while True:
    choices = _Path([choice for choice, _ in path])
    yield draw(choices)
    path = choices.taken
    while path and path[-1][0] + 1 == path[-1][1]:
      path.pop()
    if not path:
      return
    path[-1] = (path[-1][0] + 1, path[-1][1])
