"""A quantized array: codes and one scale a tile, as one pytree."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.fp8 import formats

Tile = tuple[int, ...]


def tiles(size: int, tile: int) -> int:
  """Tiles along an axis; the last may be ragged. `tile` 0 covers the axis whole."""
  return -(-size // tile) if tile else 1


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"],
                   meta_fields=["format", "tile", "last"])
@dataclasses.dataclass(frozen=True)
class QTensor:
  """`value = decode(codes) * scale of the tile`.

  The tile covers the trailing axes (two of them, everywhere in this package); axes before those
  stack layers or experts and may be added or removed by vmap, scan or indexing, so nothing static
  here knows them.

  Attributes:
    codes: [..., m, n] in the format's dtype; packed formats: uint8 [..., m, 3 ceil(n/2)].
    scales: [..., ceil(m / tile_m), ceil(n / tile_n)] multipliers: fp32, or uint8 (UE8M0) powers of
      two.
    format: of the codes.
    tile: elements along each trailing axis that share a scale; 0 covers an axis whole.
    last: n.
  """

  codes: jax.Array
  scales: jax.Array
  format: formats.Format
  tile: Tile
  last: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the array this stands for."""
    return (*self.codes.shape[:-1], self.last)

  @property
  def ndim(self) -> int:
    return self.codes.ndim

  @property
  def nbytes(self) -> int:
    """Of codes and scales."""
    return sum(x.size * np.dtype(x.dtype).itemsize for x in (self.codes, self.scales))

  @property
  def pow2(self) -> bool:
    """Whether the scales are powers of two."""
    return self.scales.dtype == jnp.uint8

  def validate(self) -> "QTensor":
    """This, or ValueError where shapes or dtypes of codes and scales disagree."""
    f = self.format
    if self.codes.dtype != jnp.dtype(f.dtype) or self.codes.shape[-1] != f.width(self.last):
      raise ValueError(f"codes {self.codes.dtype}{list(self.codes.shape)} do not hold {self.last} "
                       f"values of {f.name} a row; {f.dtype} and {f.width(self.last)} are expected")
    if self.scales.dtype not in (jnp.float32, jnp.uint8):
      raise ValueError(f"scales have dtype {self.scales.dtype}; float32, or uint8 for powers of "
                       "two, is expected")
    if len(self.tile) > self.ndim or min(self.tile, default=0) < 0:
      raise ValueError(f"tile {self.tile} does not fit an array of shape {list(self.shape)}")
    want = scales_shape(self.shape, self.tile)
    if self.scales.shape != want:
      raise ValueError(f"scales have shape {list(self.scales.shape)}; tile {self.tile} of an array "
                       f"of shape {list(self.shape)} needs {list(want)}")
    return self

  def scale_values(self) -> jax.Array:
    """The scales in fp32."""
    return formats.decode_pow2(self.scales) if self.pow2 else self.scales

  def decoded(self) -> jax.Array:
    """Codes as fp32, without their scales."""
    return formats.decode(self.codes, self.format, self.last)

  def dequantize(self, dtype=jnp.float32) -> jax.Array:
    """The array, one fp32 product an element, rounded to `dtype`."""
    self.validate()
    values = split(self.decoded(), self.tile)
    scales = split(self.scale_values(), (1,) * len(self.tile))
    return join(values * scales, self.shape, self.tile).astype(dtype)

  def transpose(self) -> "QTensor":
    """The last two axes exchanged, exactly: bytes move and the tile turns with them."""
    if len(self.tile) != 2:
      raise ValueError(f"transpose needs a tile over two axes, not {self.tile}")
    codes = self.codes
    if self.format.packed:
      codes = formats.pack(jnp.swapaxes(formats.unpack(codes, self.last), -1, -2))
    else:
      codes = jnp.swapaxes(codes, -1, -2)
    return QTensor(codes, jnp.swapaxes(self.scales, -1, -2), self.format, self.tile[::-1],
                   self.shape[-2])

  @property
  def mT(self) -> "QTensor":
    """As `jax.Array.mT`."""
    return self.transpose()

  def raw(self) -> "QTensor":
    """The same bytes as uint8; only `typed` can be called on it.

    For residuals: jax.checkpoint passes what it saves through `reduce_precision` of the dtype's
    exponent and mantissa bits, which takes e4m3fn for an IEEE format and turns 256 and more to inf.
    """
    return dataclasses.replace(self, codes=jax.lax.bitcast_convert_type(self.codes, jnp.uint8))

  def typed(self) -> "QTensor":
    """Inverse of `raw`."""
    codes = jax.lax.bitcast_convert_type(self.codes, jnp.dtype(self.format.dtype))
    return dataclasses.replace(self, codes=codes)

  def __getitem__(self, key) -> "QTensor":
    """Indexes the stacking axes; `[...]` is the whole, as nnx variables read their values."""
    if key is Ellipsis:
      return self
    if len(key if isinstance(key, tuple) else (key,)) > self.ndim - len(self.tile):
      raise IndexError(f"index {key} reaches into the tiles {self.tile} of {list(self.shape)}")
    return dataclasses.replace(self, codes=self.codes[key], scales=self.scales[key])


def scales_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, ...]:
  """Shape of the scales of an array of `shape`."""
  lead = len(shape) - len(tile)
  return (*shape[:lead], *(tiles(s, t) for s, t in zip(shape[lead:], tile, strict=True)))


def split(x: jax.Array, tile: Tile) -> jax.Array:
  """[..., m, n] as [..., m/tm, tm, n/tn, tn], ragged edges filled with zeros."""
  lead = x.ndim - len(tile)
  sizes = [(tiles(s, t), t or s) for s, t in zip(x.shape[lead:], tile, strict=True)]
  pads = [(0, 0)] * lead + [(0, count * t - s)
                            for s, (count, t) in zip(x.shape[lead:], sizes, strict=True)]
  if any(after for _, after in pads):
    x = jnp.pad(x, pads)
  return x.reshape(*x.shape[:lead], *(n for pair in sizes for n in pair))


def join(x: jax.Array, shape: tuple[int, ...], tile: Tile) -> jax.Array:
  """Inverse of `split`."""
  lead = len(shape) - len(tile)
  full = [a * b for a, b in zip(x.shape[lead::2], x.shape[lead + 1::2], strict=True)]
  x = x.reshape(*shape[:lead], *full)
  return x if x.shape == shape else x[(..., *(slice(s) for s in shape[lead:]))]
