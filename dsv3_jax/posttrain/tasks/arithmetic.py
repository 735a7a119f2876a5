"""Addition, subtraction and multiplication, worked digit by digit with carries.

A tokenizer cuts digits in groups of one to three, and which groups are one token depends on its
corpus: 47 may be one token, 83 two. Sums of such tokens are a table with a row a pair; sums of
digits are 200 facts. So each operand is first spelt with spaces, which makes every digit a token of
its own in any tokenizer, and each step is about single digits:

    47 + 85 = ?

    4 7+8 5        spelt
    7+5+0=1 2      digits of one place and the carry; new carry and digit of the sum
    4+8+1=1 3
    1 3 2          last carry, then digits from the last step to the first
    \\boxed{132}

A step of a subtraction has the borrowed ten in front: `1 2-5-0=7` borrows, `0 7-5-0=2` does not. A
product goes digit by digit of the second factor, and sums up its parts by addition.
"""

from dsv3_jax.posttrain.tasks.statements import Choices, Family, Solution

DIGITS = tuple(range(2, 9))  # of sums, level by level
FACTORS = ((2, 1), (3, 1), (2, 2), (3, 2), (3, 3), (4, 3))  # digits of a product's factors


def spaced(n: int, width: int = 0) -> str:
  """Digits with spaces between, zeros in front up to `width`."""
  return " ".join(str(n).zfill(width))


def _last(n: int, width: int) -> list[int]:
  """Digits from the last to the first."""
  return [n // 10**i % 10 for i in range(width)]


def plus(a: int, b: int) -> list[str]:
  """Lines of a sum: spelt, a step for each place, the result."""
  width, carry = max(len(str(a)), len(str(b))), 0
  lines = [f"{spaced(a, width)}+{spaced(b, width)}"]
  for x, y in zip(_last(a, width), _last(b, width), strict=True):
    total = x + y + carry
    lines.append(f"{x}+{y}+{carry}={spaced(total, 2)}")
    carry = total // 10
  return [*lines, spaced(a + b)]


def minus(a: int, b: int) -> list[str]:
  """Lines of a difference that is not negative."""
  width, borrowed = len(str(a)), 0
  lines = [f"{spaced(a, width)}-{spaced(b, width)}"]
  for x, y in zip(_last(a, width), _last(b, width), strict=True):
    ten = int(x - y - borrowed < 0)
    lines.append(f"{ten} {x}-{y}-{borrowed}={10 * ten + x - y - borrowed}")
    borrowed = ten
  return [*lines, spaced(a - b)]


def times(a: int, b: int) -> list[str]:
  """Lines of a product: a part for each digit of b, each added to those before."""
  lines, total = [f"{spaced(a)}*{spaced(b)}"], 0
  digits = _last(b, len(str(b)))
  for place, y in enumerate(digits):
    if len(digits) > 1:
      lines.append(f"{spaced(a)}*{y}")
    carry = 0
    for x in _last(a, len(str(a))):
      product = x * y + carry
      lines.append(f"{x}*{y}+{carry}={spaced(product, 2)}")
      carry = product // 10
    lines.append(spaced(a * y))
    if place:
      lines += plus(total, a * y * 10**place)
    total += a * y * 10**place
  return lines


def nines(n: int) -> tuple[str, int]:
  """Sums of digits until one digit is left, and that digit."""
  sums, left = [], n
  while left > 9:
    total = sum(map(int, str(left)))
    sums.append(f"{'+'.join(str(left))}={spaced(total)}")
    left = total
  return ", ".join(sums or [spaced(n)]), left


def _numbers(choices: Choices, digits: int) -> int:
  return choices.between(10**(digits - 1), 10**digits - 1)


def _draw_pair(level: int, choices: Choices) -> tuple[int, int]:
  return _numbers(choices, DIGITS[level]), _numbers(choices, DIGITS[level])


def _draw_falling(level: int, choices: Choices) -> tuple[int, int]:
  a, b = _draw_pair(level, choices)
  return max(a, b), min(a, b)


def _draw_factors(level: int, choices: Choices) -> tuple[int, int]:
  first, second = FACTORS[level]
  return (_numbers(choices, first),
          _numbers(choices, second) if second > 1 else choices.between(2, 9))


def _add(pair: tuple[int, int]) -> Solution:
  a, b = pair
  head, *steps, rest = minus(a + b, b)
  return Solution(f"{a} + {b} = ?", str(a + b), plus(a, b),
                  [f"Check: {head}", *steps, f"{rest} fits."])


def _subtract(pair: tuple[int, int]) -> Solution:
  a, b = pair
  head, *steps, total = plus(a - b, b)
  return Solution(f"{a} - {b} = ?", str(a - b), minus(a, b),
                  [f"Check: {head}", *steps, f"{total} fits."])


def _multiply(pair: tuple[int, int]) -> Solution:
  a, b = pair
  (sums_a, nine_a), (sums_b, nine_b) = nines(a), nines(b)
  sums, nine = nines(a * b)
  product, _ = nines(nine_a * nine_b)
  return Solution(f"{a} * {b} = ?", str(a * b), times(a, b), [
      "Check by sums of digits:", f"{spaced(a)}: {sums_a}", f"{spaced(b)}: {sums_b}",
      f"{nine_a}*{nine_b}={spaced(nine_a * nine_b)}: {product}",
      f"{spaced(a * b)}: {sums}", f"{nine} fits."])


def _unordered(pair: tuple[int, int]) -> str:
  return f"{min(pair)},{max(pair)}"


_LEVELS = tuple(f"{n} digits" for n in DIGITS)
FAMILIES = (
    Family("add", _LEVELS, _draw_pair, _unordered, _add),
    Family("subtract", _LEVELS, _draw_falling, _unordered, _subtract),
    Family("multiply", tuple(f"{a} digits by {b}" for a, b in FACTORS), _draw_factors, _unordered,
           _multiply),
)
