"""A tensor core's limited accumulation in exact rational arithmetic, one product at a time."""

import math
from fractions import Fraction

import numpy as np


def exponent(x: Fraction) -> int:
  """The e of 2^e <= |x| < 2^(e + 1)."""
  n, d = abs(x).numerator, x.denominator
  e = n.bit_length() - d.bit_length()
  return e if Fraction(2)**e <= abs(x) else e - 1


def to_multiple(x: Fraction, unit: Fraction, truncation: str) -> Fraction:
  """`x` cut to a multiple of `unit`."""
  return (math.floor if truncation == "floor" else math.trunc)(x / unit) * unit


def to_bits(x: Fraction, bits: int, truncation: str) -> Fraction:
  """`x` cut to `bits` significant bits."""
  return x if x == 0 else to_multiple(x, Fraction(2)**(exponent(x) - bits + 1), truncation)


def step(register: Fraction, products: list[Fraction], bits: int, truncation: str,
         register_bits: int) -> Fraction:
  """One MMA step: aligned to the largest exponent, cut, added, cut again."""
  terms = [register, *products]
  if not any(terms):
    return Fraction(0)
  unit = Fraction(2)**(max(exponent(x) for x in terms if x) - bits + 1)
  return to_bits(sum(to_multiple(x, unit, truncation) for x in terms), register_bits, truncation)


def dot(a_K, b_K, interval: int, bits: int, truncation: str, scale_K=None) -> np.float32:
  """sum of a * b in steps of 32, promoted to fp32 (and there scaled) every `interval`.

  `scale_K` holds each k's combined scale, the same within an interval.
  """
  total = None
  for start in range(0, len(a_K), interval):
    register = Fraction(0)
    end = min(start + interval, len(a_K))
    for k in range(start, end, 32):
      products = [Fraction(float(a_K[i])) * Fraction(float(b_K[i]))
                  for i in range(k, min(k + 32, end))]
      register = step(register, products, bits, truncation, min(bits, 24))
    part = np.float32(float(register))
    part = part if scale_K is None else part * np.float32(scale_K[start])
    total = part if total is None else total + part
  return total
