"""SwiGLU with its quantizations for Hopper: h = weight silu(gate) up, in fp32, and its derivative.

Forward, one kernel: gate and up in (bf16), h out in 1x128 tiles for the down projection's Fprop. h
never exists in 16 bits.

Backward: gate and up again, in bf16 or as the FP8 codes that the forward pass kept, and dh:

    s = sigmoid(gate), a = gate s           h  = weight a up
    dup = weight dh a                       dgate = weight dh up (s + a (1 - s))
    dweight = sum over F of dh a up

dgate and dup leave in 1x128 tiles (Dgrad) and in 128x1 tiles, transposed (Wgrad); h in 128x1 tiles,
transposed (Wgrad of the down projection). These are two kernels, one a direction. A tile of both
directions has 128 rows and 128 columns; its three inputs take 96 KiB and its five outputs 80, so an
SM would hold a single one, with no room to load the next meanwhile. Two kernels of half such tiles
move 17 bytes an element instead of 11, but keep loads in flight all the time (13 instead of 9 from
FP8 codes).

sigmoid(x) is rsqrt(1 + exp(-x))^2: two approximate instructions, each good to 2^-22, in place of an
exact division. Scales are exact, codes of such values need not be, see `cast`.

Bound: HBM. Instructions issued per warp scheduler and element, of those that an H100's bandwidth
leaves (9 a byte; an H200's 6), counted in machine code: forward 21 of 45; backward from bf16, rows
39 of 72, columns 48 of 81; from FP8 codes 42 of 54 and 55 of 63, where an H200 is bound by
arithmetic.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import cast, compat
from pallas_kernels.mosaic.quantize import H, Struct, T, ceil, check, padded
from pallas_kernels.mosaic.stream import Window, matrix, stream

Codes = tuple[jax.Array, jax.Array]  # e4m3 [M, F] and fp32 [ceil(F / 128), M]


def _sigmoid(x: jax.Array) -> jax.Array:
  root = lax.rsqrt(1.0 + jnp.exp(-x))
  return root * root


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Value and derivative."""
  s = _sigmoid(x)
  a = x * s
  return a, s + a * (1.0 - s)


def _down(v_M: jax.Array, like: jax.Array) -> jax.Array:
  """A number a row."""
  return lax.broadcast_in_dim(v_M, like.shape, [0])


def _across(v_M: jax.Array, like: jax.Array) -> jax.Array:
  """A number a column."""
  return lax.broadcast_in_dim(v_M, like.shape, [1])


def _weights(weight_M: jax.Array | None, M: int, rows: int) -> list[tuple[jax.Array, Window]]:
  """The weights as an input of `stream`."""
  if weight_M is None:
    return []
  if weight_M.shape != (M,) or weight_M.dtype != jnp.float32:
    raise ValueError(f"weights {weight_M.dtype}{list(weight_M.shape)} should be float32[{M}]")
  weight_M1 = padded(weight_M[:, None])
  return [(weight_M1[:, 0], Window((rows,), lambda i, j: (pl.ds(i * rows, rows),)))]


def swiglu_rows(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array | None = None, *,
                pow2: bool = False, floor: float = 1e-4, num_sms: int = 132,
                interpret: compat.Interpret = False) -> tuple[jax.Array, jax.Array]:
  """`weight * silu(gate) * up` in 1x128 tiles.

  Args:
    gate_MF, up_MF: bf16, F a multiple of 32.
    weight_M: fp32 factors of the rows, or None.
    pow2, floor, num_sms, interpret: see `quantize.rows`.

  Returns:
    Codes e4m3 [M, F], scales fp32 [ceil(F / 128), M].

  Raises:
    ValueError, NotImplementedError: see `quantize.check`; weights of another shape or dtype.
  """
  check(gate_MF, up_MF)
  M = gate_MF.shape[0]
  weights = _weights(weight_M, M, H)
  gate_MF, up_MF = padded(gate_MF), padded(up_MF)
  padded_M, F = gate_MF.shape

  def compute(tile, ins, outs, _, put):
    (i, j), (gate, up, *weight), (codes, scales) = tile, ins, outs
    g, u = (cast.load(x, interpret).astype(jnp.float32) for x in (gate, up))
    h = g * _sigmoid(g) * u
    if weight:
      h *= _down(cast.load_vector(weight[0], interpret), h)
    q, s = cast.quantize(h, pow2, floor, interpret, exact=False)
    rows = pl.ds(i * H, H)
    put((codes.at[rows, pl.ds(j * T, T)], q), (scales.at[j, rows], s))

  codes_MF, scales_fM = stream(
      compute, (ceil(M, H), ceil(F)),
      [(gate_MF, matrix(H, T)), (up_MF, matrix(H, T)), *weights],
      [Struct((padded_M, F), cast.E4M3), Struct((ceil(F), padded_M), jnp.float32)],
      puts=1, num_ctas=3 * num_sms, buffers=1, interpret=interpret, approx_math=True)
  return codes_MF[:M], scales_fM[:, :M]


def swiglu_backward(
    gate_MF: jax.Array | Codes, up_MF: jax.Array | Codes, dh_MF: jax.Array,
    weight_M: jax.Array | None = None, *, pow2: bool = False, floor: float = 1e-4,
    gradient_floor: float = 1e-30, num_sms: int = 132, interpret: compat.Interpret = False
) -> tuple[tuple[Codes, Codes], tuple[Codes, Codes], Codes, jax.Array | None]:
  """Every operand that the backward pass of `weight * silu(gate) * up` feeds to a matmul.

  Args:
    gate_MF, up_MF: bf16, F a multiple of 32; or both as codes e4m3 [M, F] and scales fp32
      [ceil(F / 128), M].
    dh_MF: bf16.
    weight_M: fp32 factors of the rows, or None.
    pow2, num_sms, interpret: see `quantize.rows`.
    floor: least amax of h.
    gradient_floor: least amax of dgate and dup.

  Returns:
    (dgate in 1x128 tiles, dgate in 128x1 tiles and transposed), the same of dup, h in 128x1 tiles
    and transposed, dweight fp32 [M] or None; tiles as from `quantize.rows` and `quantize.columns`.

  Raises:
    ValueError, NotImplementedError: see `quantize.check`; weights or scales of another shape.
  """
  kept = isinstance(gate_MF, tuple)
  operands = [*gate_MF, *up_MF] if kept else [gate_MF, up_MF]
  M, F = dh_MF.shape
  check(dh_MF)
  if kept:
    (gate, gate_scales), (up, up_scales) = gate_MF, up_MF
    check(gate, up, dtypes=(cast.E4M3,))
    for scales in (gate_scales, up_scales):
      if scales.shape != (ceil(F), M):
        raise ValueError(f"scales {list(scales.shape)} should have the shape {[ceil(F), M]}")
  else:
    check(gate_MF, up_MF, dh_MF)
  if M % 8:
    operands = [padded(x.T).T if x.dtype == jnp.float32 else padded(x) for x in operands]
  dh_MF = padded(dh_MF)
  options = dict(pow2=pow2, num_sms=num_sms, interpret=interpret)
  weights = functools.partial(_weights, weight_M, M)
  dgate, dup, dweight_M = _backward_rows(operands, dh_MF, weights(H), kept, M,
                                         floor=gradient_floor, **options)
  dgate_t, dup_t, h_t = _backward_columns(operands, dh_MF, weights(T), kept, floor=floor,
                                          gradient_floor=gradient_floor, **options)
  return (dgate, dgate_t), (dup, dup_t), h_t, dweight_M


def _windows(operands: list[jax.Array], rows: int, columns: int) -> list[tuple[jax.Array, Window]]:
  """Inputs of `stream`: values or codes with a scale for each row and 128 columns."""
  scales = Window((rows,), lambda i, j: (lax.div(j * columns, jnp.int32(T)),
                                         pl.ds(i * rows, rows)))
  return [(x, scales if x.dtype == jnp.float32 else matrix(rows, columns)) for x in operands]


def _backward_rows(operands, dh_MF, weights, kept, M, *, pow2, floor, num_sms, interpret):
  """dgate and dup in 1x128 tiles, dweight or None."""
  padded_M, F = dh_MF.shape

  def value(refs):
    x = cast.load(refs[0], interpret).astype(jnp.float32)
    return x * _down(cast.load_vector(refs[1], interpret), x) if kept else x

  def compute(tile, ins, outs, _, put):
    i, j = tile
    rows, columns = pl.ds(i * H, H), pl.ds(j * T, T)
    each = 1 + kept
    gate, up, (dh, *weight) = ins[:each], ins[each:2 * each], ins[2 * each:]
    dgate_codes, dgate_scales, dup_codes, dup_scales, *dweight = outs

    def weighted(x):
      return x * _down(cast.load_vector(weight[0], interpret), x) if weight else x

    # dh and up are read again for the second result: in registers some of it all would spill.
    a, d = _silu(value(gate))
    x = a * cast.load(dh, interpret).astype(jnp.float32)
    more = [(dweight[0].at[j, rows], jnp.sum(x * value(up), axis=1))] if weight else []
    codes, scales = cast.quantize(weighted(x), pow2, floor, interpret, exact=False)
    put((dup_codes.at[rows, columns], codes), (dup_scales.at[j, rows], scales), *more)

    x = d * value(up) * cast.load(dh, interpret).astype(jnp.float32)
    codes, scales = cast.quantize(weighted(x), pow2, floor, interpret, exact=False)
    put((dgate_codes.at[rows, columns], codes), (dgate_scales.at[j, rows], scales))

  codes, scales = Struct((padded_M, F), cast.E4M3), Struct((ceil(F), padded_M), jnp.float32)
  outs = stream(
      compute, (ceil(M, H), ceil(F)),
      [*_windows(operands, H, T), (dh_MF, matrix(H, T)), *weights],
      [codes, scales, codes, scales, *([scales] if weights else [])],
      puts=2, num_ctas=2 * num_sms, buffers=1, vectors=1 + bool(weights), interpret=interpret,
      approx_math=True)
  dgate, dgate_s, dup, dup_s, *dweight = outs
  return ((dgate[:M], dgate_s[:, :M]), (dup[:M], dup_s[:, :M]),
          dweight[0].sum(0)[:M] if dweight else None)


def _backward_columns(operands, dh_MF, weights, kept, *, pow2, floor, gradient_floor, num_sms,
                      interpret):
  """dgate, dup and h in 128x1 tiles, transposed."""
  M, F = dh_MF.shape

  def compute(tile, ins, outs, scratch, put):
    i, j = tile
    each = 1 + kept
    gate, up, (dh, *weight) = ins[:each], ins[each:2 * each], ins[2 * each:]
    if kept:
      for (codes, _), exact in zip((gate, up), scratch, strict=True):
        exact[...] = cast.load(codes, interpret).astype(jnp.float16)
      plgpu.commit_smem()
      gate, up = ((exact, scales) for (_, scales), exact in zip((gate, up), scratch, strict=True))

    def value(ref, scales=None):
      x = cast.load_turned(ref, interpret).astype(jnp.float32)
      return x if scales is None else x * _across(cast.load_across(scales, interpret), x)

    def send(k, x, floor):
      columns = pl.ds(j * H, H)
      codes, scales = cast.quantize(x, pow2, floor, interpret, exact=False)
      put((outs[2 * k].at[columns, pl.ds(i * T, T)], codes),
          (outs[2 * k + 1].at[i, columns], scales))

    # dh and up are read again for each result: in registers some of it all would spill.
    a, d = _silu(value(*gate))
    if weight:
      w = _across(cast.load_across(weight[0], interpret), a)
      a, d = a * w, d * w
    send(2, a * value(*up), floor)
    send(1, a * value(dh), gradient_floor)
    send(0, d * value(*up) * value(dh), gradient_floor)

  codes, scales = Struct((F, ceil(M) * T), cast.E4M3), Struct((ceil(M), F), jnp.float32)
  exact = plgpu.SMEM((T, H), jnp.float16, transforms=compat.transforms(jnp.float16, H))
  outs = stream(
      compute, (ceil(M), ceil(F, H)),
      [*_windows(operands, T, H), (dh_MF, matrix(T, H)), *weights], [codes, scales] * 3,
      puts=3, num_ctas=2 * num_sms, buffers=1, scratch=[exact] * (2 * kept), interpret=interpret,
      approx_math=True)
  return tuple(zip(outs[::2], outs[1::2], strict=True))
