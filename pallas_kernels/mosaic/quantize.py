"""FP8 quantize kernels for Hopper: every operand of Fprop, Dgrad and Wgrad in one pass over memory.

    rows     1x128 tiles                            x of Fprop, dy of Dgrad
    columns  128x1 tiles, transposed                x and dy of Wgrad: sums run over tokens
    both     the two from one read                  dy
    blocks   128x128 tiles, as they lie and transposed       weights of Dgrad and of Fprop
    turn     1x128 codes to 128x1 codes, transposed          Wgrad's x from what Fprop kept of it

Codes are e4m3, scales fp32 (powers of two with `pow2`), laid out as the matmuls load them: [tiles
along the summed axis, other axis]. `cast` has the arithmetic, `stream` the loop.

Bound: HBM. Instructions issued per warp scheduler and element, of those that an H100's bandwidth
leaves (9 a byte; an H200's 6), counted in machine code: rows 12 of 27, columns 12 of 27, both 19 of
36, blocks of fp32 14 of 54, turn 14 of 18 (of 12 on an H200, where arithmetic is the bound).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import cast, compat
from pallas_kernels.mosaic.stream import Window, matrix, stream

T = 128
H = 64  # rows of a warpgroup
Struct = jax.ShapeDtypeStruct


def ceil(size: int, tile: int = T) -> int:
  return -(-size // tile)


def check(*arrays: jax.Array, dtypes=(jnp.bfloat16,), width: int = 32) -> None:
  """Whether copies can address these matrices.

  Raises:
    ValueError: not matrices of one shape.
    NotImplementedError: another dtype, no elements, or rows of another length than a multiple of
      `width`.
  """
  x = arrays[0]
  for y in arrays:
    if y.shape != x.shape or y.ndim != 2:
      raise ValueError(f"matrices of one shape are expected, not {[list(z.shape) for z in arrays]}")
    if y.dtype not in dtypes:
      raise NotImplementedError(f"a kernel for {', '.join(str(jnp.dtype(d)) for d in dtypes)} "
                                f"cannot read {y.dtype}")
  if not x.size or x.shape[1] % width:
    raise NotImplementedError(f"rows must be a multiple of {width} elements, not {list(x.shape)}")


def padded(x_MK: jax.Array) -> jax.Array:
  """With rows of zeros up to a multiple of 8: tilings of copies must divide the array."""
  M = x_MK.shape[0]
  return jnp.pad(x_MK, ((0, -M % 8), (0, 0))) if M % 8 else x_MK


def exact_tile():
  """Shared memory for the codes of a tile as fp16, which holds each of them exactly."""
  return plgpu.SMEM((T, T), jnp.float16, transforms=compat.transforms(jnp.float16, T))


def rows(x_MK: jax.Array, *, pow2: bool = False, floor: float = 1e-4, num_sms: int = 132,
         interpret: compat.Interpret = False) -> tuple[jax.Array, jax.Array]:
  """1x128 tiles.

  Args:
    x_MK: bf16 or fp32, K a multiple of 32; the last tile of a row may be cut.
    pow2: rounds scales up to powers of two.
    floor: least amax.
    num_sms: of the device.
    interpret: see `compat`.

  Returns:
    Codes e4m3 [M, K], scales fp32 [ceil(K / 128), M].

  Raises:
    ValueError, NotImplementedError: see `check`.
  """
  check(x_MK, dtypes=(jnp.bfloat16, jnp.float32))
  M = x_MK.shape[0]
  x_MK = padded(x_MK)
  padded_M, K = x_MK.shape

  def compute(tile, ins, outs, _, put):
    (i, j), (codes, scales) = tile, outs
    rows = pl.ds(i * H, H)
    q, s = cast.quantize(cast.load(ins[0], interpret), pow2, floor, interpret)
    put((codes.at[rows, pl.ds(j * T, T)], q), (scales.at[j, rows], s))

  per_sm = 4 if x_MK.dtype == jnp.bfloat16 else 2
  codes_MK, scales_kM = stream(
      compute, (ceil(M, H), ceil(K)), [(x_MK, matrix(H, T))],
      [Struct((padded_M, K), cast.E4M3), Struct((ceil(K), padded_M), jnp.float32)],
      puts=1, num_ctas=per_sm * num_sms, interpret=interpret)
  return codes_MK[:M], scales_kM[:, :M]


def columns(x_MK: jax.Array, *, pow2: bool = False, floor: float = 1e-4, num_sms: int = 132,
            interpret: compat.Interpret = False) -> tuple[jax.Array, jax.Array]:
  """128x1 tiles, transposed.

  Args:
    x_MK: bf16, K a multiple of 32.
    pow2, floor, num_sms, interpret: see `rows`.

  Returns:
    Codes e4m3 [K, M], M rounded up to whole tiles and filled with zeros, as Wgrad wants it; scales
    fp32 [ceil(M / 128), K].

  Raises:
    ValueError, NotImplementedError: see `check`.
  """
  check(x_MK)
  x_MK = padded(x_MK)
  M, K = x_MK.shape

  def compute(tile, ins, outs, _, put):
    (i, j), (codes, scales) = tile, outs
    columns = pl.ds(j * H, H)
    q, s = cast.quantize(cast.load_turned(ins[0], interpret), pow2, floor, interpret)
    put((codes.at[columns, pl.ds(i * T, T)], q), (scales.at[i, columns], s))

  return stream(
      compute, (ceil(M), ceil(K, H)), [(x_MK, matrix(T, H))],
      [Struct((K, ceil(M) * T), cast.E4M3), Struct((ceil(M), K), jnp.float32)],
      puts=1, num_ctas=4 * num_sms, interpret=interpret)


def both(x_MK: jax.Array, *, pow2: bool = False, floor: float = 1e-4, num_sms: int = 132,
         interpret: compat.Interpret = False
         ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
  """`rows(x)` and `columns(x)` from one read of x; arguments and errors as there, bf16 alone."""
  check(x_MK)
  M = x_MK.shape[0]
  x_MK = padded(x_MK)
  padded_M, K = x_MK.shape

  def compute(tile, ins, outs, _, put):
    (i, j), (x,), (codes, scales, codes_t, scales_t) = tile, ins, outs
    for h in (0, H):
      rows = pl.ds(i * T + h, H)
      q, s = cast.quantize(cast.load(x.at[pl.ds(h, H)], interpret), pow2, floor, interpret)
      put((codes.at[rows, pl.ds(j * T, T)], q), (scales.at[j, rows], s))
    for h in (0, H):
      columns = pl.ds(j * T + h, H)
      q, s = cast.quantize(cast.load_turned(x.at[:, pl.ds(h, H)], interpret), pow2, floor,
                           interpret)
      put((codes_t.at[columns, pl.ds(i * T, T)], q), (scales_t.at[i, columns], s))

  codes_MK, scales_kM, codes_KM, scales_mK = stream(
      compute, (ceil(M), ceil(K)), [(x_MK, matrix(T, T))],
      [Struct((padded_M, K), cast.E4M3), Struct((ceil(K), padded_M), jnp.float32),
       Struct((K, ceil(M) * T), cast.E4M3), Struct((ceil(M), K), jnp.float32)],
      puts=4, num_ctas=2 * num_sms, interpret=interpret)
  return (codes_MK[:M], scales_kM[:, :M]), (codes_KM, scales_mK)


def blocks(w_GKN: jax.Array, *, pow2: bool = False, floor: float = 1e-4, num_sms: int = 132,
           interpret: compat.Interpret = False) -> tuple[jax.Array, jax.Array, jax.Array]:
  """128x128 tiles of weights stored [in, out], for Fprop and for Dgrad.

  The codes are turned, not the weights.

  Args:
    w_GKN: fp32 or bf16 [K, N], or a stack of such; K and N multiples of 32.
    pow2, floor, num_sms, interpret: see `rows`.

  Returns:
    Codes e4m3 [.., N, K] (Fprop), [.., K, N] (Dgrad), scales fp32 [.., ceil(N / 128),
    ceil(K / 128)] of the former; those of the latter are its transpose.

  Raises:
    ValueError, NotImplementedError: see `check`.
  """
  if w_GKN.ndim == 2:
    return tuple(x[0] for x in blocks(w_GKN[None], pow2=pow2, floor=floor, num_sms=num_sms,
                                      interpret=interpret))
  G, K, N = w_GKN.shape
  check(Struct((G * K, N), w_GKN.dtype), dtypes=(jnp.bfloat16, jnp.float32))
  if K % 32:
    raise NotImplementedError(f"K={K} must be a multiple of 32")
  k = ceil(K)


  def split(i):
    return lax.div(i, jnp.int32(k)), lax.rem(i, jnp.int32(k))

  def at(i, j):
    g, i = split(i)
    return g, pl.ds(i * T, T), pl.ds(j * T, T)

  def compute(tile, ins, outs, scratch, put):
    (i, j), (w,), (codes_t, codes, scales), (exact,) = tile, ins, outs, scratch
    g, i = split(i)
    found = [cast.amax(cast.load(w.at[pl.ds(h, H)], interpret), interpret) for h in (0, H)]
    # Rounding is monotone: the largest scale is that of the largest magnitude. As vectors, because
    # scalars have no bit patterns on the device.
    s = cast.amax_of([cast.scales(x, pow2, floor, interpret) for x in found], interpret)
    scales[g, j, i] = s
    for h in (0, H):
      x = cast.load(w.at[pl.ds(h, H)], interpret).astype(jnp.float32)
      q = cast.codes(x, s, not pow2, interpret)
      exact[pl.ds(h, H)] = q.astype(jnp.float16)
      put((codes.at[g, pl.ds(i * T + h, H), pl.ds(j * T, T)], q))
    for h in (0, H):
      q = cast.load_turned(exact.at[:, pl.ds(h, H)], interpret).astype(cast.E4M3)
      put((codes_t.at[g, pl.ds(j * T + h, H), pl.ds(i * T, T)], q))

  return stream(
      compute, (G * k, ceil(N)), [(w_GKN, Window((T, T), at))],
      [Struct((G, N, K), cast.E4M3), Struct((G, K, N), cast.E4M3),
       Struct((G, ceil(N), k), jnp.float32)],
      puts=4, num_ctas=num_sms, scratch=[exact_tile()], reduction=2048, interpret=interpret)


def turn(codes_MK: jax.Array, scales_kM: jax.Array, *, pow2: bool = False, floor: float = 1e-4,
         num_sms: int = 132, interpret: compat.Interpret = False) -> tuple[jax.Array, jax.Array]:
  """1x128 codes quantized again in 128x1 tiles, transposed, without a 16-bit copy in memory.

  Args:
    codes_MK: e4m3, K a multiple of 32.
    scales_kM: fp32 [ceil(K / 128), M].
    pow2, floor, num_sms, interpret: see `rows`.

  Returns:
    As `columns`.

  Raises:
    ValueError, NotImplementedError: see `check`; scales of another shape.
  """
  check(codes_MK, dtypes=(cast.E4M3,))
  M, K = codes_MK.shape
  if scales_kM.shape != (ceil(K), M):
    raise ValueError(f"scales {list(scales_kM.shape)} of codes {list(codes_MK.shape)} should have "
                     f"the shape {[ceil(K), M]}")
  codes_MK, scales_kM = padded(codes_MK), padded(scales_kM.T).T if M % 8 else scales_kM

  def compute(tile, ins, outs, scratch, put):
    (i, j), (codes, scales), (codes_t, scales_t), (exact,) = tile, ins, outs, scratch
    for h in (0, H):
      exact[pl.ds(h, H)] = cast.load(codes.at[pl.ds(h, H)], interpret).astype(jnp.float16)
    plgpu.commit_smem()
    by_M = cast.load_across(scales, interpret)
    for h in (0, H):
      columns = pl.ds(j * T + h, H)
      x = cast.load_turned(exact.at[:, pl.ds(h, H)], interpret).astype(jnp.float32)
      x *= lax.broadcast_in_dim(by_M, x.shape, [1])
      q, s = cast.quantize(x, pow2, floor, interpret)
      put((codes_t.at[columns, pl.ds(i * T, T)], q), (scales_t.at[i, columns], s))

  scale_window = Window((T,), lambda i, j: (j, pl.ds(i * T, T)))
  return stream(
      compute, (ceil(M), ceil(K)), [(codes_MK, matrix(T, T)), (scales_kM, scale_window)],
      [Struct((K, ceil(M) * T), cast.E4M3), Struct((ceil(M), K), jnp.float32)],
      puts=2, num_ctas=2 * num_sms, stages=3, scratch=[exact_tile()], interpret=interpret)
