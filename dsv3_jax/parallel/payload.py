"""What travels: trees of rows as few messages as possible, and the formats on the wire."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


class Codec(NamedTuple):
  """How rows are written on the wire.

  Attributes:
    encode: [P, D] to a tree of arrays that all lead with P, such as codes and scales.
    decode: its inverse, up to rounding; fp32 or any dtype that the caller casts.
  """

  encode: Callable[[jax.Array], Any]
  decode: Callable[[Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Wire:
  """Formats of dispatch and combine (report 3.3.3); each field stands for itself.

  Attributes:
    activations: of what dispatch sends forward; None: as it is.
    gradients: of what combine's backward pass sends; None: as it is.
    combine: dtype of what combine, and dispatch's backward pass, send; "": as it is. A sum is
      always taken in fp32 and rounded once before each hop.
  """

  activations: Codec | None = None
  gradients: Codec | None = None
  combine: str = ""

  def __post_init__(self):
    if self.combine not in ("", "bfloat16", "float32"):
      raise ValueError(f'combine={self.combine!r} must be "" (as it is), bfloat16 or float32')


def row_bytes(tree: Any) -> int:
  """Bytes of one row of a tree whose arrays lead with rows (arrays or their shapes)."""
  return sum(x.dtype.itemsize * x.size // x.shape[0] for x in jax.tree.leaves(tree))


def pack(tree: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
  """The leaves, each [P, ...], joined to one array for each size of element.

  Codes and their scales, or numbers of experts and routing weights, so travel as one message. A
  lone float array is left as it is.

  Returns:
    Arrays [P, n]; and what turns such arrays, of any number of rows, back into the tree.
  """
  leaves, treedef = jax.tree.flatten(tree)
  groups: dict[int, list[int]] = {}
  for i, x in enumerate(leaves):
    groups.setdefault(x.dtype.itemsize, []).append(i)
  alone = [len(g) == 1 and size > 1 for size, g in groups.items()]

  def words(i, size):
    x = leaves[i]
    x = x if x.dtype == _WORDS[size] else lax.bitcast_convert_type(x, _WORDS[size])
    return x.reshape(x.shape[0], -1)

  packed = [leaves[g[0]] if one else jnp.concatenate([words(i, size) for i in g], axis=1)
            for one, (size, g) in zip(alone, groups.items(), strict=True)]

  def unpack(arrays):
    out = [None] * len(leaves)
    for one, x, group in zip(alone, arrays, groups.values(), strict=True):
      at = 0
      for i in group:
        like = leaves[i]
        part = x
        if not one:
          width = like.size // like.shape[0]
          part = x[:, at:at + width].reshape(x.shape[0], *like.shape[1:])
          part = part if part.dtype == like.dtype else lax.bitcast_convert_type(part, like.dtype)
          at += width
        out[i] = part
    return jax.tree.unflatten(treedef, out)

  return packed, unpack
