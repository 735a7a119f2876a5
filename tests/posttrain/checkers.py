"""Other means to judge generated problems: from their text alone, by Python's own evaluation.

A checker takes a question and a worked solution apart with regular expressions and raises
AssertionError where a line is false or does not belong there. It shares no code with the generator.
"""

import functools
import math
import re
from collections import Counter
from fractions import Fraction
from itertools import groupby


def check(problem, worked):
  """Every line of a worked solution, its end, and the answer."""
  *lines, last = worked.split("\n")
  assert last == f"\\boxed{{{problem.answer}}}"
  at = next((i for i, line in enumerate(lines) if line.startswith("Check")), len(lines))
  _CHECKERS[problem.family](problem.prompt, problem.answer, lines[:at], lines[at:])


def same(name, prompt):
  """A text that two questions have in common which differ in order alone."""
  if name in ("add", "subtract", "multiply"):
    return name, tuple(sorted(re.findall(r"\d+", prompt)))
  if name == "sort":
    way, _, items = prompt.partition(": ")
    return way, tuple(sorted(items.split()))
  if name == "fraction":
    return tuple(sorted(re.findall(r"[+-]?\d+/\d+", "+" + prompt.replace(" ", ""))))
  if name == "polynomial":
    products = re.findall(r"[+-]?(?:\([^)]*\)|[^()+-]+)+", prompt.partition(": ")[2])
    terms = lambda factor: tuple(sorted(re.findall(r"[+-]?[^()+-]+", re.sub(r"^(?=[^-+])", "+",
                                                                          factor.strip("()")))))
    return tuple(sorted(tuple(sorted(terms(f) for f in re.findall(r"\([^)]*\)|[^()]+", p)
                                     if f not in "+-")) for p in products))
  return prompt


def _numbers(text):
  """Spaced digits as numbers, without zeros in front."""
  text = re.sub(r"(?<=\d) (?=\d)", "", text)
  return re.sub(r"(?<!\d)0+(?=\d)", "", text)


def _column_sum(lines, sign):
  """A sum or difference by columns; returns its two numbers and its result."""
  head, *steps, result = lines
  digits = [n.split() for n in head.split(sign)]
  width = max(map(len, digits))
  assert len(digits) == 2 and len(steps) == width
  carry, found = 0, ""
  for i, step in enumerate(steps, 1):
    x, y = digits[0][-i], digits[1][-i]
    if sign == "+":
      match = re.fullmatch(rf"{x}\+{y}\+{carry}=(\d) (\d)", step)
      assert match and int(x) + int(y) + carry == 10 * int(match[1]) + int(match[2])
      carry, found = int(match[1]), match[2] + found
    else:
      match = re.fullmatch(rf"([01]) {x}-{y}-{carry}=(\d)", step)
      assert match and 10 * int(match[1]) + int(x) - int(y) - carry == int(match[2])
      carry, found = int(match[1]), match[2] + found
  found = int(found) + (carry * 10**width if sign == "+" else 0)
  assert sign == "+" or carry == 0
  assert result == " ".join(str(found))
  a, b = (int("".join(d)) for d in digits)
  assert found == (a + b if sign == "+" else a - b)
  return a, b, found


def _columns(sign):
  def run(prompt, answer, steps, check):
    a, b = map(int, re.fullmatch(rf"(\d+) \{sign} (\d+) = \?", prompt).groups())
    c = int(answer)
    assert _column_sum(steps, sign) == (a, b, c)
    if check:
      check = [check[0].removeprefix("Check: "), *check[1:-1], check[-1].removesuffix(" fits.")]
      back = _column_sum(check, "-" if sign == "+" else "+")
      assert back == (c, b, a)
  return run


def _multiply(prompt, answer, steps, check):
  a, b = re.fullmatch(r"(\d+) \* (\d+) = \?", prompt).groups()
  assert int(answer) == int(a) * int(b)
  lines = iter(steps)
  assert next(lines) == f"{' '.join(a)}*{' '.join(b)}"
  total = 0
  for place, y in enumerate(reversed(b)):
    if len(b) > 1:
      assert next(lines) == f"{' '.join(a)}*{y}"
    carry = 0
    for x in reversed(a):
      match = re.fullmatch(rf"{x}\*{y}\+{carry}=(\d) (\d)", next(lines))
      assert match and int(x) * int(y) + carry == int(match[1] + match[2])
      carry = int(match[1])
    assert next(lines) == " ".join(str(int(a) * int(y)))
    part = int(a) * int(y) * 10**place
    if place:
      count = 2 + max(len(str(total)), len(str(part)))
      assert _column_sum([next(lines) for _ in range(count)], "+") == (total, part, total + part)
    total += part
  assert next(lines, None) is None and total == int(answer)
  if not check:
    return
  head, first, second, product, result, end = check
  roots = []
  for line, number in ((first, a), (second, b), (result, answer)):
    name, sums = line.split(": ")
    assert name == " ".join(number)
    roots.append(_root(int(number), sums))
  left, sums = product.split(": ")
  assert left == f"{roots[0]}*{roots[1]}={' '.join(str(roots[0] * roots[1]))}"
  assert _root(roots[0] * roots[1], sums) == roots[2] and end == f"{roots[2]} fits."


def _root(number, sums):
  """The repeated sum of digits, as written."""
  for part in sums.split(", ") if "=" in sums else ():
    left, right = part.split("=")
    assert left == "+".join(str(number))
    number = int(right.replace(" ", ""))
    assert number == eval(left)
  if "=" not in sums:
    assert sums == str(number)
  assert number < 10 and (number or sums == "0")
  return number


@functools.cache
def _function(expr):
  """Of x, from an expression as in mathematics; numbers are exact."""
  expr = re.sub(r"(?<=[\dx)])(?=[x(])", "*", expr).replace("^", "**")
  return eval(f"lambda x: {expr}") if "/" not in expr else lambda x: _plain(
      expr.replace("x", f"({x})"))


def _at(expr, x):
  return _function(expr)(x)


def _equal(a, b):
  return all(_at(a, x) == _at(b, x) for x in (-3, 0, 1, 5))


def _plain(expr):
  """The value of numbers and signs; fractions stay exact."""
  return eval(re.sub(r"(?<!\*)(?<!\d)(\d+)", r"Fraction(\1)", expr), {"Fraction": Fraction})


def _polynomial(prompt, answer, steps, check):
  question = prompt.removeprefix("Expand and simplify: ")
  assert _equal(question, answer)
  powers = [term.partition("^")[2] or ("1" if "x" in term else "0")
            for term in re.findall(r"[^+-]+", answer)]
  assert powers == sorted(set(powers), reverse=True) and "1x" not in re.findall(r"\b1x", answer)
  products = {}
  for line in steps:
    if ": " in line:
      numbers, total = line.split(": ")[1].split("=")
      assert _plain(numbers) == int(total)
      products[line.split(": ")[0]] = int(total)
    elif "=" in line:
      assert _equal(*line.split("="))
      products = {}
    else:
      assert _equal(line, question)
  assert steps[-1] == answer
  for power, total in products.items():  # those that were collected last are in the result
    match = re.search(rf"(^|[+-])(\d*){re.escape(power) if power != '1' else ''}(?=$|[+-])",
                      answer) if power != "1" else re.search(r"(^|[+-])(\d+)$", answer)
    written = f"{match[1]}{match[2] or 1}" if match else "0"
    assert int(written) == total
  if check:
    first, second = check
    for line, expr in ((first.removeprefix("Check x=2: "), question),
                       (second.removesuffix(" fits."), answer)):
      left, right = line.split("=")
      assert _plain(left) == int(right) == _at(expr, 2)
      assert left == re.sub(r"(?<=[\dx)])(?=[x(])", "*", expr).replace("x", "2").replace("^", "**")


def _equation(prompt, answer, steps, check):
  question = prompt.removeprefix("Solve for x: ")
  x = Fraction(answer)
  assert str(x) == answer
  left, right = question.split("=")
  assert _at(left, x) == _at(right, x)
  slopes = [_at(side, 1) - _at(side, 0) for side in (left, right)]
  assert slopes[0] != slopes[1]
  for line in steps:
    a, b = line.split("=")
    if _equal(a, b):  # a product, multiplied out
      assert a in question
    else:
      assert _at(a, x) == _at(b, x) and (_at(a, x + 1) != _at(b, x + 1))
  assert steps[-1] == f"x={answer}"
  if check:
    for line, side in ((check[0].removeprefix("Check: "), left),
                       (check[1].removesuffix(" fits."), right)):
      shown, total = line.split("=")
      assert _plain(shown) == Fraction(total) == _at(side, x)
      assert f"({answer})" in shown or "x" not in side


def _fraction(prompt, answer, steps, check):
  question = prompt.removesuffix(" = ?").replace(" ", "")
  x = Fraction(answer)
  assert _plain(question) == x and str(x) == answer
  unreduced, total_over = None, None
  for line in steps:
    if line.startswith(("lcm", "gcd")):
      name, numbers, total = re.fullmatch(r"(lcm|gcd)\((.*)\)=(\d+)", line).groups()
      assert getattr(math, name)(*map(int, numbers.split(", "))) == int(total)
      if name == "lcm":
        assert numbers == ", ".join(re.findall(r"/(\d+)", question))
      else:
        over, under = map(int, numbers.split(", "))
        assert (abs(unreduced[0]), unreduced[1]) == (over, under)
    elif "=" in line:
      left, right = line.split("=")
      assert _plain(left) == int(right)
      total_over = int(right)
    else:
      assert _plain(line) == x
      if line is not steps[-1]:
        unreduced = tuple(map(int, line.split("/"))) if line.count("/") == 1 else None
        if unreduced:
          assert unreduced[0] == total_over
  assert steps[-1] == answer
  if check:
    first, second = check[0].removeprefix("Check: "), check[1].removesuffix(" fits.")
    for line in (first, second):
      left, right = line.split("=")
      assert _plain(left) == Fraction(right)
    assert first.split("=")[1] == second.split("=")[1]
    assert first.startswith(answer) and question.startswith(second.split("=")[0])


_KEYS = {"ascending": int, "descending": lambda n: -int(n), "by last digit": lambda n: n[-1]}


def _sort(prompt, answer, steps, check):
  way, items = re.fullmatch(r"Sort ([a-z ]+): ([\d ]+)", prompt).groups()
  items = items.split()
  assert sorted(items, key=_KEYS[way]) == answer.split()
  left = list(items)
  for step, taken in zip(steps, answer.split(), strict=True):
    assert step == f"{' '.join(left)}: {taken}"
    left.remove(taken)
  if check:
    first, second = check
    sign = ">=" if way == "descending" else "<="
    shown = first.removeprefix("Check: ").split(sign)
    assert shown == [n[-1] if way == "by last digit" else n for n in answer.split()]
    assert all(eval(f"{a}{sign}{b}") for a, b in zip(shown, shown[1:], strict=False))
    assert second == f"{len(items)} of {len(items)} fits."


def _without_repeats(items):
  return [c for i, c in enumerate(items) if c not in items[:i]]


_STEPS = {
    "reverse": lambda items: list(reversed(items)), "drop repeats": _without_repeats,
    "sort": sorted, "move first to end": lambda items: items[1:] + [items[0]],
    "swap halves": lambda items: items[len(items) // 2:] + items[:len(items) // 2],
    "count runs": lambda items: [c + str(len(list(g))) for c, g in groupby(items)]}


def _program(prompt, answer, steps, check):
  names, items = prompt.split(": ")
  names = names.lower().split(", then ")
  states = [items.split()]
  for name in names:
    states.append(_STEPS[name](states[-1]))
  assert answer == " ".join(states[-1])
  assert steps == [f"{n}: {' '.join(s)}" for n, s in zip(names, states[1:], strict=True)]
  if not check:
    return
  assert (check[0], check[-1]) == ("Check:", "All fits.")
  for line, name, before, after in zip(check[1:-1], names, states, states[1:], strict=False):
    assert line.startswith(f"{name}: ")
    words = line.removeprefix(f"{name}: ")
    if ": " in words:  # the way back
      assert words.split(": ")[1].split() == before
    elif name == "sort":
      tally = " ".join(f"{c}{n}" for c, n in sorted(Counter(before).items()))
      assert words == f"{tally} and {tally}"
    elif name == "swap halves":
      assert re.findall(r"\d+", words) == [str(len(before) - len(before) // 2),
                                           str(len(before) // 2)]
    else:
      news = [part.split() for part in words.split(", ")]
      assert [c for c, _ in news] == before and [c for c, n in news if n == "new"] == after


def _python(prompt, answer, steps, check):
  question = prompt.removeprefix("What does Python say to ")
  assert repr(eval(question)) == answer
  assert steps[0] == question and steps[-1] == answer
  assert len(set(steps)) == len(steps)
  assert all(repr(eval(step)) == answer for step in steps)
  if not check:
    return
  assert (check[0], check[-1]) == ("Check:", "All fits.")
  assert len(check) == len(steps) + 1
  for line, before, after in zip(check[1:-1], steps, steps[1:], strict=False):
    part, result = line.split(" is ")
    assert repr(eval(part)) == repr(eval(result))
    assert part.replace(" ", "") in before.replace(" ", "")
    assert result.replace(" ", "") in after.replace(" ", "")


def _recall(prompt, answer, steps, check):
  _, *lines, question = prompt.split("\n")
  pairs = [line.split(" ") for line in lines]
  assert len(dict(pairs)) == len(pairs)
  key = question.removesuffix("?")
  assert dict(pairs)[key] == answer and steps == [f"{key} {answer}"]
  if check:
    at = [k for k, _ in pairs].index(key)
    (line,) = check
    words = line.removeprefix("Check: ").removesuffix(f": {key} {answer} fits.")
    around = [f"after {lines[at - 1]}"] if at else []
    around += [f"before {lines[at + 1]}"] if at + 1 < len(lines) else []
    assert words == ", ".join(around)


_CHECKERS = {
    "add": _columns("+"), "subtract": _columns("-"), "multiply": _multiply,
    "polynomial": _polynomial, "equation": _equation, "fraction": _fraction, "sort": _sort,
    "program": _program, "python": _python, "recall": _recall}
