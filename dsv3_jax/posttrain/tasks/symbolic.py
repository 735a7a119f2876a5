"""Polynomials, equations and fractions: expressions to be simplified, line by line.

The answer of a polynomial and of a fraction is judged as text in its one normal form (falling
powers, no spaces; lowest terms), because the question itself, put into the box, equals the answer.
An equation's solution is judged by equality: `6/4`, `3/2` and `1.5` are all right.

A polynomial is a tuple of terms (coefficient, power). A statement's expression is a sum of
products, each a tuple of polynomials.
"""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from dsv3_jax.posttrain.tasks.statements import Choices, Family, Solution

Polynomial = tuple[tuple[int, int], ...]
Product = tuple[Polynomial, ...]

POINT = 2  # where a polynomial is checked
_NOT_ZERO = tuple(n for n in range(-9, 10) if n)


def text(terms: Sequence[tuple[int, int]]) -> str:
  """Terms as they stand, without those that are zero."""
  found = ""
  for c, power in terms:
    if not c:
      continue
    x = ("", "x")[power] if power < 2 else f"x^{power}"
    size = str(abs(c)) if abs(c) != 1 or not power else ""
    found += ("-" if c < 0 else "+" if found else "") + size + x
  return found or "0"


def expression(products: Sequence[Product]) -> str:
  """A sum of products; `3(2x-1)+4x`."""
  found = ""
  for factors in products:
    part = "".join(text(f) if len(f) == 1 or len(factors) == 1 else f"({text(f)})"
                   for f in factors)
    found += part if not found or part[0] == "-" else "+" + part
  return found


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
  """Each term with each, not yet collected."""
  return tuple((c * d, p + q) for c, p in a for d, q in b)


def collect(terms: Sequence[tuple[int, int]]) -> Polynomial:
  """One term a power, falling; () for zero."""
  powers = sorted({p for _, p in terms}, reverse=True)
  sums = [(sum(c for c, q in terms if q == p), p) for p in powers]
  return tuple((c, p) for c, p in sums if c)


def _collecting(terms: Sequence[tuple[int, int]]) -> list[str]:
  """A line for each power of which there are several terms."""
  lines = []
  for p in sorted({p for _, p in terms}, reverse=True):
    numbers = [(c, 0) for c, q in terms if q == p]
    if len(numbers) > 1:
      name = text([(1, p)])
      lines.append(f"{name}: {text(numbers)}={sum(c for c, _ in numbers)}")
  return lines


def expand(products: Sequence[Product]) -> tuple[list[str], list[tuple[int, int]]]:
  """Lines for each product, and the terms of all, not yet collected."""
  lines, terms = [], []
  for factors in products:
    found = factors[0]
    for i, factor in enumerate(factors[1:], 1):
      if i > 1:
        lines += _collecting(found)
        found = collect(found)
      raw = multiply(found, factor)
      lines.append(f"{expression([(found, factor)])}={text(raw)}")
      found = raw
    terms += found
  return lines, terms


def substitute(expr: str, value: int) -> str:
  """The expression with a number for x, as Python writes it."""
  expr = re.sub(r"(?<=[\dx)])(?=[x(])", "*", expr)  # products that are not written
  return expr.replace("x", str(value)).replace("^", "**")


def value(terms: Sequence[tuple[int, int]], at: Fraction | int) -> Fraction | int:
  return sum(c * at**p for c, p in terms)


def _linear(choices: Choices) -> Polynomial:
  return (choices.between(1, 9), 1), (choices.one(_NOT_ZERO), 0)


def _number(n: int) -> Polynomial:
  return ((n, 0),)


_POLYNOMIALS = (
    "4 terms of degree 1", "number times sum, and a term", "product of 2 sums",
    "product of 2 sums, and number times sum", "2 products of 2 sums", "product of 3 sums")


def _draw_polynomial(level: int, choices: Choices) -> tuple[Product, ...]:
  sums = lambda n: tuple(_linear(choices) for _ in range(n))
  coefficient = lambda: choices.one(_NOT_ZERO)
  if level == 0:
    return ((tuple((coefficient(), p) for p in (1, 0, 1, 0)),),)
  if level == 1:
    return ((_number(choices.between(2, 9)), _linear(choices)), (((coefficient(), 1),),))
  if level == 3:
    return (sums(2), (_number(choices.between(2, 9)), _linear(choices)))
  return {2: lambda: (sums(2),), 4: lambda: (sums(2), sums(2)), 5: lambda: (sums(3),)}[level]()


def _key(products: tuple[Product, ...]) -> str:
  return repr(sorted(sorted(tuple(sorted(f)) for f in factors) for factors in products))


def _simplify(products: tuple[Product, ...]) -> Solution:
  question = expression(products)
  lines, terms = expand(products)
  if len(products) > 1:
    lines.append(text(terms))
  result = collect(terms)
  answer = text(result)
  at = value(terms, POINT)
  return Solution(f"Expand and simplify: {question}", answer,
                  [*lines, *_collecting(terms), answer],
                  [f"Check x={POINT}: {substitute(question, POINT)}={at}",
                   f"{substitute(answer, POINT)}={at} fits."])


_EQUATIONS = ("ax+b=c", "ax+b=cx+d", "a(x+b)+c=dx+e", "a(x+b)+c=dx+e, solved by fractions",
              "a(bx+c)+d(ex+f)=gx+h, solved by fractions")
Equation = tuple[tuple[Product, ...], tuple[Product, ...]]


def _draw_equation(level: int, choices: Choices) -> Equation | None:
  a, b = choices.between(2, 9), choices.one(_NOT_ZERO)
  if level < 2:
    left: tuple[Product, ...] = ((((a, 1), (b, 0)),),)
  elif level < 4:
    left = ((_number(a), ((1, 1), (b, 0))), (_number(choices.one(_NOT_ZERO)),))
  else:
    left = tuple((_number(choices.between(2, 9)), _linear(choices)) for _ in range(2))
  slope = choices.between(1, 9) if level else 0
  line = _line(left)
  if line[0][0] == slope:
    return None
  if level < 3:  # a whole solution
    x = choices.between(-9, 9)
    constant = int(value(line, x)) - slope * x
  else:
    constant = choices.one(_NOT_ZERO)
  return left, ((((slope, 1), (constant, 0)),),)


def _line(products: Sequence[Product]) -> Polynomial:
  """Slope and constant as terms, zeros too."""
  terms = expand(products)[1]
  return tuple((sum(c for c, q in terms if q == p), p) for p in (1, 0))


def _solve_equation(sides: Equation) -> Solution:
  left, right = sides
  lines, terms = expand(left)
  if len(left) > 1:
    lines.append(f"{text(terms)}={expression(right)}")
  (a, _), (b, _) = line = _line(left)
  (c, _), (d, _) = _line(right)
  if len(left) > 1:
    lines.append(f"{text(line)}={expression(right)}")
  if c:
    lines.append(f"{text([(a, 1), (-c, 1)])}={text([(d, 0), (-b, 0)])}")
  else:
    lines.append(f"{text([(a, 1)])}={text([(d, 0), (-b, 0)])}")
  lines.append(f"{text([(a - c, 1)])}={d - b}")
  x = Fraction(d - b, a - c)
  if a - c != 1:
    lines.append(f"x={d - b}/{a - c}" if a - c > 0 else f"x={b - d}/{c - a}")
  if lines[-1] != f"x={x}":
    lines.append(f"x={x}")
  at = value(line, x)
  return Solution(f"Solve for x: {expression(left)}={expression(right)}", str(x), lines,
                  [f"Check: {_at(a, b, x)}={at}", f"{_at(c, d, x)}={at} fits."])


def _at(slope: int, constant: int, x: Fraction) -> str:
  """Of a line, its value at x, not yet computed."""
  product = f"{slope}*({x})" if slope else ""
  return product + (f"+{constant}" if constant > 0 and product else str(constant)
                    if constant or not product else "")


_FRACTIONS = ("2 terms, one denominator to 30", "2 terms, denominators to 12",
              "2 terms, plus or minus, denominators to 15",
              "3 terms, plus or minus, denominators to 15",
              "4 terms, plus or minus, denominators to 20")
Fractions = tuple[tuple[int, int], ...]  # numerators with their signs, denominators


def _draw_fractions(level: int, choices: Choices) -> Fractions | None:
  if level == 0:
    below = choices.between(2, 30)
    found: Fractions = tuple((choices.between(1, below - 1), below) for _ in range(2))
    return found
  terms, largest = ((2, 12), (2, 15), (3, 15), (4, 20))[level - 1]
  found = ()
  for i in range(terms):
    below = choices.between(2, largest)
    sign = choices.one((1, -1)) if level > 1 and i else 1
    found += ((sign * choices.between(1, below - 1), below),)
  return found if len({d for _, d in found}) > 1 else None


def _sum_of(fractions: Fractions, first: bool = True) -> str:
  """Fractions with their signs; that of the first is not written where it is plus."""
  return "".join(("-" if n < 0 else "+" if i or not first else "") + f"{abs(n)}/{d}"
                 for i, (n, d) in enumerate(fractions))


def _add_fractions(fractions: Fractions) -> Solution:
  below = math.lcm(*(d for _, d in fractions))
  over = [n * below // d for n, d in fractions]
  lines = []
  if any(d != below for _, d in fractions):
    lines += [f"lcm({', '.join(str(d) for _, d in fractions)})={below}",
              _sum_of(tuple((n, below) for n in over))]
  lines += [f"{text([(n, 0) for n in over])}={sum(over)}", f"{sum(over)}/{below}",
            f"gcd({abs(sum(over))}, {below})={math.gcd(sum(over), below)}"]
  x = Fraction(sum(over), below)
  *rest, (n, d) = fractions
  back = x - Fraction(n, d)
  question = _sum_of(fractions).replace("+", " + ").replace("-", " - ")
  return Solution(f"{question} = ?", str(x), [*lines, str(x)],
                  [f"Check: {x}{_sum_of(((-n, d),), False)}={back}",
                   f"{_sum_of(tuple(rest))}={back} fits."])


FAMILIES = (
    Family("polynomial", _POLYNOMIALS, _draw_polynomial, _key, _simplify),
    Family("equation", _EQUATIONS, _draw_equation,
           lambda sides: "=".join(sorted(_key(side) for side in sides)), _solve_equation,
           (("math", 1.0), ("format", 0.1))),
    Family("fraction", _FRACTIONS, _draw_fractions, lambda f: repr(sorted(f)), _add_fractions),
)
