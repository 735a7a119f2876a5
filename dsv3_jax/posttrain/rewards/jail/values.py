"""Plain Python values as JSON, both ways: what may pass between a program and its judge.

None, truth, numbers, strings, bytes, lists, tuples, sets and dictionaries pass, of any size that
the limits permit; an object of any other class does not, so that nothing arrives that brings its
own `__eq__`. A subclass (a Counter, a namedtuple, an IntEnum) arrives as the plain type that it
extends.
"""

import json
import math
from typing import Any

_MADE = {"tuple": tuple, "set": set, "frozenset": frozenset}


def dumps(value: Any) -> str:
  """One line of ASCII. Raises TypeError for another class, ValueError for cycles and depth."""
  try:
    return json.dumps(_encode(value), allow_nan=False)
  except RecursionError:
    raise ValueError("nested too deeply") from None


def loads(text: str) -> Any:
  """Raises ValueError where `dumps` cannot have written this."""
  try:
    return _decode(json.loads(text))
  except (RecursionError, KeyError, TypeError, AttributeError, OverflowError):
    raise ValueError(f"not a plain value: {text[:80]!r}") from None


def _encode(value: Any) -> Any:
  if value is None or isinstance(value, bool):
    return value
  if isinstance(value, str):
    return str.__str__(value)
  if isinstance(value, int):
    value = int(value)
    return value if abs(value) < 2**53 else {"int": hex(value)}  # decimal digits are limited
  if isinstance(value, float):
    value = float(value)
    return value if math.isfinite(value) else {"float": repr(value)}
  if isinstance(value, complex):
    return {"complex": [_encode(value.real), _encode(value.imag)]}
  if isinstance(value, (bytes, bytearray)):
    return {"bytes": bytes(value).hex()}
  if isinstance(value, list):
    return [_encode(v) for v in value]
  if isinstance(value, dict):
    return {"dict": [[_encode(k), _encode(v)] for k, v in value.items()]}
  for name, kind in _MADE.items():
    if isinstance(value, kind):
      return {name: [_encode(v) for v in value]}
  raise TypeError(f"a value of class {type(value).__name__} cannot be judged; plain values can: "
                  "None, numbers, strings, bytes, lists, tuples, sets, dictionaries")


def _decode(value: Any) -> Any:
  if isinstance(value, list):
    return [_decode(v) for v in value]
  if not isinstance(value, dict):
    return value
  (name, inner), = value.items()
  if name == "int":
    return int(inner, 16)
  if name == "float":
    return float(inner)
  if name == "complex":
    return complex(*map(_decode, inner))
  if name == "bytes":
    return bytes.fromhex(inner)
  if name == "dict":
    return {_decode(k): _decode(v) for k, v in inner}
  return _MADE[name](_decode(v) for v in inner)
