"""Recall: a value told once among many, asked for at the end. Difficulty is length.

Each line is a key and its value, 8 characters with the line break. The line that asks begins as the
line that tells does, so that a model which copies what followed last time answers.
"""

import string

from dsv3_jax.posttrain.tasks.statements import Choices, Family, Solution

PAIRS = tuple(8 * 2**level for level in range(11))
LINE = 8  # characters

Pairs = tuple[tuple[tuple[str, int], ...], int]  # keys with their values; which is asked for


def _draw(level: int, choices: Choices) -> Pairs:
  keys: dict[str, int] = {}
  while len(keys) < PAIRS[level]:
    keys["".join(choices.one(string.ascii_lowercase) for _ in range(3))] = choices.between(100, 999)
  return tuple(keys.items()), choices.below(len(keys))


def _solve(statement: Pairs) -> Solution:
  pairs, asked = statement
  key, value = pairs[asked]
  lines = [f"{k} {v}" for k, v in pairs]
  around = [f"{word} {lines[i]}" for word, i in (("after", asked - 1), ("before", asked + 1))
            if 0 <= i < len(pairs)]
  return Solution("\n".join(["Which value has the last key?", *lines, f"{key}?"]), str(value),
                  [lines[asked]], [f"Check: {', '.join(around)}: {lines[asked]} fits."])


FAMILIES = (
    Family("recall", tuple(f"{n:,} pairs, {LINE * n:,} characters" for n in PAIRS), _draw,
           lambda s: repr(s), _solve),
)
