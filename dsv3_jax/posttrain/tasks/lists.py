"""Lists to be transformed: numbers to sort, letters that go through a program of steps.

Letters are written with spaces and numbers have two digits, so that each item is the same token or
two wherever it stands. A list to be sorted is known by its numbers whatever their order: no list of
the test split is a train list shuffled.
"""

from collections.abc import Sequence
from itertools import groupby

from dsv3_jax.posttrain.tasks.statements import Choices, Family, Solution

# Way to sort -> key of an item, in words and as a function.
ORDERS = {"ascending": lambda n: n, "descending": lambda n: -n, "by last digit": lambda n: n % 10}
_SORTS = ((4, 1), (6, 2), (8, 2), (10, 3), (12, 3), (16, 3))  # items, ways


def _draw_sort(level: int, choices: Choices) -> tuple[str, tuple[int, ...]]:
  items, ways = _SORTS[level]
  return choices.one(tuple(ORDERS)[:ways]), tuple(choices.some(range(10, 100), items))


def _sort(statement: tuple[str, tuple[int, ...]]) -> Solution:
  way, numbers = statement
  key = ORDERS[way]
  left, found, lines = list(numbers), [], []
  while left:  # takes the first of the smallest, so that equal keys keep their order
    next_one = min(left, key=key)
    lines.append(f"{_words(left)}: {next_one}")
    left.remove(next_one)
    found.append(next_one)
  sign = ">=" if way == "descending" else "<="
  shown = [n % 10 for n in found] if way == "by last digit" else found
  return Solution(
      f"Sort {way}: {_words(numbers)}", _words(found), lines,
      [f"Check: {sign.join(map(str, shown))}", f"{len(found)} of {len(numbers)} fits."])


def _words(items: Sequence[object]) -> str:
  return " ".join(map(str, items))


def _first_of_each(items: Sequence[str]) -> list[str]:
  return list(dict.fromkeys(items))


def _runs(items: Sequence[str]) -> list[str]:
  return [f"{letter}{len(list(run))}" for letter, run in groupby(items)]


def _tally(items: Sequence[str]) -> str:
  return _words(f"{letter}{items.count(letter)}" for letter in sorted(set(items)))


def _newness(before: Sequence[str]) -> str:
  return ", ".join(f"{letter} {'again' if letter in before[:i] else 'new'}"
                   for i, letter in enumerate(before))


# Step -> its result, and words that verify it, given what was before and after.
STEPS = {
    "reverse": (lambda x: x[::-1],
                lambda before, after: f"reversed back: {_words(after[::-1])}"),
    "drop repeats": (_first_of_each, lambda before, after: _newness(before)),
    "sort": (sorted, lambda before, after: f"{_tally(before)} and {_tally(after)}"),
    "move first to end": (lambda x: [*x[1:], *x[:1]],
                          lambda before, after:
                          f"moved back: {_words([*after[-1:], *after[:-1]])}"),
    "swap halves": (lambda x: [*x[len(x) // 2:], *x[:len(x) // 2]],
                    lambda before, after: f"{len(after) - len(before) // 2} were moved, "
                                          f"{len(before) // 2} followed"),
    # Its result has no letters: the last step of a program, if any.
    "count runs": (_runs, lambda before, after: "written out: "
                   + _words(c for item in after for c in item[0] * int(item[1:]))),
}
_PROGRAMS = ((1, 4), (1, 8), (2, 8), (3, 8), (3, 12), (4, 16))  # steps, letters
ALPHABET = "abcdefgh"  # few, so that letters repeat

Program = tuple[tuple[str, ...], tuple[str, ...]]


def _draw_program(level: int, choices: Choices) -> Program:
  length, letters = _PROGRAMS[level]
  steps: list[str] = []
  for i in range(length):
    free = [s for s in STEPS if s not in steps[-1:] and (s != "count runs" or i == length - 1)]
    steps.append(choices.one(free))
  items = [choices.one(ALPHABET)]
  while len(items) < letters:  # one letter in three is that before it, for runs
    items.append(items[-1] if choices.below(3) == 0 else choices.one(ALPHABET))
  return tuple(steps), tuple(items)


def _run(program: Program) -> Solution:
  steps, items = program
  state, lines, checks = list(items), [], []
  for step in steps:
    apply, verify = STEPS[step]
    after = apply(state)
    lines.append(f"{step}: {_words(after)}")
    checks.append(f"{step}: {verify(state, after)}")
    state = after
  question = ", then ".join(steps)
  return Solution(f"{question[0].upper()}{question[1:]}: {_words(items)}", _words(state), lines,
                  ["Check:", *checks, "All fits."])


FAMILIES = (
    Family("sort", tuple(f"{n} numbers, {w} {'orders' if w > 1 else 'order'}" for n, w in _SORTS),
           _draw_sort, lambda s: f"{s[0]}: {_words(sorted(s[1]))}", _sort),
    Family("program", tuple(f"{n} {'steps' if n > 1 else 'step'} on {k} letters"
                            for n, k in _PROGRAMS),
           _draw_program, lambda p: f"{', '.join(p[0])}: {_words(p[1])}", _run),
)
