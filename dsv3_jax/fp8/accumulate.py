"""How a tensor core adds: fp32 promotion and limited accumulation (report 3.3.2, 3.5.2).

An FP8 product needs few bits (two E4M3 values multiply to 8 significant bits, exact in fp32). What
loses precision is the sum. A Hopper tensor core takes the products of 32 consecutive k and its
running accumulator in one MMA step, and adds them as fixed-point numbers:

    1. e    = the largest exponent among the 32 products and the accumulator
    2. each of the 33 numbers is shifted right to that exponent; of its bits only the top `bits`
       stay, that is multiples of 2^(e - bits + 1), and the rest is cut off
    3. these integers are added, without error
    4. the sum goes back to a register of `bits` significant bits, again cut off

With bits = 14 the register has 1 sign, 8 exponent and 13 fraction bits ("FP22", ISCA paper,
arXiv 2505.09343; the report says about 14 bits). The accumulator grows with K while the products
do not, so ever more of each product falls off its end: the error grows with the number of steps
added in one register, and cutting always in one direction makes it a drift, not a random walk.

The report's remedy is promotion. Every `interval` = 128 values of k (four steps) the register is
added to an fp32 accumulator outside the tensor core and starts again from zero. There it can also
be multiplied by the scales of its 1x128 and 128x128 tiles, which is what makes fine-grained scales
possible on hardware whose GEMM knows none:

    y[m, n] = sum over intervals i of   scale_a[m, i] * scale_b[i, n] * mma_i(a[m, :], b[:, n])

`bits=0` makes step 2 and 4 exact up to fp32, and mma_i an fp32 dot: the definition of an FP8 GEMM
that kernels are compared with. An interval that straddles tiles (256 over 128-wide tiles, say)
cannot be scaled afterwards; the operands are then scaled beforehand, as tensor cores with native
tile scales would do, and the sum is emulated over the scaled products.

The texts differ on the direction of cutting. The report's first version shifts right "with sign
fill", which for two's complement rounds towards minus infinity (`truncation="floor"`); measured
tensor cores of NVIDIA cut magnitudes (`"zero"`, the default). A second freedom of interpretation is
the exponent of step 1. Here it is that of the products' values; hardware may compare the sums of
the operands' exponents before the significands in [1, 4) are normalised, which keeps one bit more
where the largest product is above 2.

How many bits would be enough? E4M3 products are multiples of 2^-18 below 2^18, so `bits=36` adds
any 32 of them exactly; 34 is enough unless a product above 2^16 meets one that ends at 2^-18.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

STEP = 32  # products of one MMA step
HOPPER_BITS = 14
MAX_BITS = 36
TRUNCATIONS = ("zero", "floor")

_LIMB = 18  # bits whose sum of 33 stays below fp32's 24, and far below int32's 31
_SMALLEST = 2.0**-80  # of step 1's largest magnitude; keeps every power of two below in range
_CHUNK = 32_768  # outputs whose products exist at once, in registers


def matmul(a_MK: jax.Array, b_KN: jax.Array, *, interval: int = 128, bits: int = 0,
           scale_a: jax.Array | None = None, tile_a: tuple[int, int] = (1, 128),
           scale_b: jax.Array | None = None, tile_b: tuple[int, int] = (128, 128),
           truncation: str = "zero") -> jax.Array:
  """`a @ b` of quantized operands as a tensor core with `bits` of accumulation computes it.

  Args:
    a_MK, b_KN: codes in any float dtype. For `bits` > 0 their products must be exact in fp32
      (significands of 12 bits or fewer: E4M3, E5M2, E5M6, bf16).
    interval: values of k between promotions to fp32, a multiple of 32; 0, or K and more: none.
    bits: significant bits kept of aligned products and of the register; 14 on Hopper, at most 36
      (registers above 24 are fp32); 0 adds each interval in fp32.
    scale_a: fp32 [ceil(M / tile_a[0]), ceil(K / tile_a[1])]; multiplying restores values. None: 1.
    scale_b: fp32 [ceil(K / tile_b[0]), ceil(N / tile_b[1])].
    tile_a, tile_b: what one scale covers; 0, or more than the axis has: all of it.
    truncation: "zero" cuts magnitudes, "floor" rounds towards minus infinity.

  Returns:
    fp32 [M, N]. Where the fp32 product is NaN or infinite, that.

  Raises:
    ValueError: shapes that do not fit, an interval or a number of bits that does not exist.
  """
  _check(a_MK, b_KN, interval, bits, truncation)
  (M, K), N = a_MK.shape, b_KN.shape[1]
  a_MK, b_KN = a_MK.astype(jnp.float32), b_KN.astype(jnp.float32)
  interval = min(interval or K, K)
  if bits:
    interval = -(-interval // STEP) * STEP
  count = -(-K // interval)

  scales = []
  for scale, tile, shape, axis in ((scale_a, tile_a, (M, K), 1), (scale_b, tile_b, (K, N), 0)):
    tile = tuple(t or n for t, n in zip(tile, shape, strict=True))
    _check_scale("ab"[1 - axis], scale, tile, shape)
    straddles = scale is not None and scale.shape[axis] > 1 and tile[axis] % interval
    scales.append((scale, tile, bool(straddles)))
  (scale_a, tile_a, fold_a), (scale_b, tile_b, fold_b) = scales
  if fold_a or fold_b:
    # Scaled products cannot be told apart afterwards: whatever scales there are go in first.
    a_MK = a_MK if scale_a is None else a_MK * _expand(scale_a, tile_a, (M, K))
    b_KN = b_KN if scale_b is None else b_KN * _expand(scale_b, tile_b, (K, N))
    scale_a = scale_b = None

  def per_interval(scale, tile, axis, size):
    """The scale of each row (or column) in each interval, [count, size]."""
    if scale is None:
      return None
    scale = jnp.repeat(scale if axis else scale.T, min(tile[1 - axis], size), axis=0)[:size]
    return scale[:, jnp.minimum(jnp.arange(count) * interval // tile[axis], scale.shape[1] - 1)].T

  scale_a = per_interval(scale_a, tile_a, 1, M)
  scale_b = per_interval(scale_b, tile_b, 0, N)
  a_iMk = _pad(a_MK, count * interval, 1).reshape(M, count, interval).transpose(1, 0, 2)
  b_ikN = _pad(b_KN, count * interval, 0).reshape(count, interval, N)
  if not bits:
    return _promoted(_dot, a_iMk, b_ikN, scale_a, scale_b)

  def emulate(a_mk, b_kN):
    return _emulated(a_mk, b_kN, bits, truncation)

  y_MN = _in_chunks(lambda a_iRk, scale_iR: _promoted(emulate, a_iRk, b_ikN, scale_iR, scale_b),
                    (a_iMk, scale_a), M, N)
  # Integers know no NaN; one plain product finds where they had to.
  plain_MN = _promoted(_dot, a_iMk, b_ikN, scale_a, scale_b)
  return jnp.where(jnp.isfinite(plain_MN), y_MN, plain_MN)


def add(register_MN: jax.Array, a_MK: jax.Array, b_KN: jax.Array, *, bits: int,
        truncation: str = "zero") -> jax.Array:
  """A register of the tensor core after `a @ b` was added to it, fp32 [M, N].

  For sums whose operands come in pieces: adding the pieces one after another, each a multiple of 32
  values of k, gives `matmul` of the whole with interval 0. Values that are not finite give what
  fp32 addition gives.

  Args:
    register_MN: fp32; zeros to begin with.
    a_MK, b_KN: values, scales multiplied in.
    bits, truncation: as in `matmul`; bits is not 0.
  """
  _check(a_MK, b_KN, 0, bits, truncation)
  if not bits:
    raise ValueError("bits=0 is an fp32 sum; add the product itself")
  (M, K), N = a_MK.shape, b_KN.shape[1]
  whole = -(-K // STEP) * STEP
  a_MK, b_KN = (_pad(z.astype(jnp.float32), whole, axis) for z, axis in ((a_MK, 1), (b_KN, 0)))
  y_MN = _in_chunks(lambda a_1Rk, start_1RN: _emulated(a_1Rk[0], b_KN, bits, truncation,
                                                       start_1RN[0]),
                    (a_MK[None], register_MN[None]), M, N)
  plain_MN = register_MN + _dot(a_MK, b_KN)
  return jnp.where(jnp.isfinite(plain_MN), y_MN, plain_MN)


@functools.partial(jax.jit, static_argnames="truncation")
def sum_of_step(a_SK: jax.Array, b_SK: jax.Array, bits: jax.Array, truncation: str = "zero"
                ) -> jax.Array:
  """What one MMA step makes of the products of each row, in an fp32 register; fp32 [S].

  Args:
    a_SK, b_SK: codes, K = 32.
    bits: int32 scalar, at most 36; the significant bits kept of the aligned products.
    truncation: as in `matmul`.
  """
  a_KS, b_KS = a_SK.astype(jnp.float32).T, b_SK.astype(jnp.float32).T
  products = [a_KS[k] * b_KS[k] for k in range(STEP)]
  return _wide_step(jnp.zeros_like(products[0]), products, bits, truncation)


# --- the tensor core ----------------------------------------------------------------------------


def _in_chunks(f, operands, M: int, N: int) -> jax.Array:
  """`f` of `_CHUNK` outputs at a time: operands [i, M, ...] (or None) cut along M; [M, N]."""
  rows = min(max(_CHUNK // N, 1), M)
  chunks = -(-M // rows)

  def cut(x):
    return _pad(x, chunks * rows, 1).reshape(x.shape[0], chunks, rows, *x.shape[2:]).swapaxes(0, 1)

  y_cRN = lax.map(lambda chunk: f(*chunk), jax.tree.map(cut, operands))
  return y_cRN.reshape(chunks * rows, N)[:M]


def _emulated(a_mk: jax.Array, b_kN: jax.Array, bits: int, truncation: str,
              start_mN: jax.Array | None = None) -> jax.Array:
  """One interval: [m, k] times [k, N] in steps of 32, all added in one register; [m, N]."""
  steps = a_mk.shape[1] // STEP
  a_s32m = a_mk.T.reshape(steps, STEP, -1)
  b_s32N = b_kN.reshape(steps, STEP, -1)

  def body(sum_mN, step):
    a_32m, b_32N = step
    # Written out, not reduced: XLA then fuses the step into one loop over outputs, with the 32
    # products in registers (measured on a CPU: 15 times faster than a reduction over an axis).
    products = [a_32m[k][:, None] * b_32N[k][None] for k in range(STEP)]
    return _step(sum_mN, products, bits, truncation), None

  if start_mN is None:  # zeros that vary as the operands do, under shard_map
    start_mN = jnp.zeros_like(a_s32m[0, 0][:, None] * b_s32N[0, 0][None])
  return lax.scan(body, start_mN, (a_s32m, b_s32N))[0]


def _step(sum_: jax.Array, products: list[jax.Array], bits: int, truncation: str) -> jax.Array:
  """One MMA step: aligned, cut to `bits`, added, cut to the register."""
  if bits > _LIMB:
    return _cut(_wide_step(sum_, products, bits, truncation), min(bits, 24), truncation)
  terms = [sum_, *products]
  power = _largest_power(terms)
  total, factor = 0, 2.0**(bits - 1) / power
  for x in terms:
    total = total + _integer(x * factor, truncation)
  return _cut(total.astype(jnp.float32) * (power * 2.0**(1 - bits)), bits, truncation)


def _wide_step(sum_: jax.Array, products: list[jax.Array], bits: int | jax.Array, truncation: str
               ) -> jax.Array:
  """The same for any width, in an fp32 register: two limbs, each added exactly."""
  terms = [sum_, *products]
  power = _largest_power(terms)
  high_unit = power * _power_of_two(1 - jnp.minimum(bits, _LIMB))
  low_unit = power * _power_of_two(1 - bits)
  high = low = 0
  for x in terms:
    whole = _integer(x / high_unit, truncation)
    high = high + whole
    low = low + _integer((x - whole.astype(jnp.float32) * high_unit) / low_unit, truncation)
  return _add_cut(high.astype(jnp.float32) * high_unit, low.astype(jnp.float32) * low_unit,
                  truncation)


def _largest_power(terms: list[jax.Array]) -> jax.Array:
  """2^e of step 1, fp32."""
  top = _SMALLEST
  for x in terms:
    top = jnp.maximum(top, jnp.abs(x))
  return lax.bitcast_convert_type(_as_int(top) & 0x7F800000, jnp.float32)


def _power_of_two(exponent: int | jax.Array) -> jax.Array:
  """Exactly 2^exponent, which XLA's exp2 is not."""
  return lax.bitcast_convert_type(jnp.asarray(exponent + 127, jnp.int32) << 23, jnp.float32)


def _integer(x: jax.Array, truncation: str) -> jax.Array:
  return (jnp.floor(x) if truncation == "floor" else x).astype(jnp.int32)


def _as_int(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.int32)


def _cut(x: jax.Array, bits: int, truncation: str) -> jax.Array:
  """The first `bits` significant bits of fp32 values."""
  rest = (1 << (24 - bits)) - 1
  if not rest:
    return x
  code = _as_int(x)
  if truncation == "floor":  # away from zero where negative; the carry runs into the exponent
    code = jnp.where(code < 0, code + rest, code)
  return lax.bitcast_convert_type(code & ~rest, jnp.float32)


def _add_cut(x: jax.Array, y: jax.Array, truncation: str) -> jax.Array:
  """x + y in fp32, cut instead of rounded to nearest."""
  s = x + y
  y_part = s - x
  error = (x - (s - y_part)) + (y - y_part)  # exactly x + y - s (Knuth's two-sum)
  too_large = error < 0 if truncation == "floor" else error * s < 0
  toward = jnp.where(s > 0, -1, 1) if truncation == "floor" else -1  # of the magnitude's code
  return lax.bitcast_convert_type(_as_int(s) + jnp.where(too_large, toward, 0), jnp.float32)


# --- promotion ----------------------------------------------------------------------------------


def _dot(a_mk: jax.Array, b_kN: jax.Array) -> jax.Array:
  return lax.dot(a_mk, b_kN, precision=lax.Precision.HIGHEST)


def _promoted(mma, a_imk, b_ikN, scale_im, scale_iN) -> jax.Array:
  """The fp32 sum of the intervals' products, each scaled; [m, N]."""

  def partial(a_mk, b_kN, scale_m, scale_N):
    y_mN = mma(a_mk, b_kN)
    y_mN = y_mN if scale_m is None else y_mN * scale_m[:, None]
    return y_mN if scale_N is None else y_mN * scale_N[None]

  rest = (a_imk, b_ikN, scale_im, scale_iN)
  first, rest = jax.tree.map(lambda x: x[0], rest), jax.tree.map(lambda x: x[1:], rest)
  y_mN = partial(*first)
  if a_imk.shape[0] == 1:
    return y_mN
  return lax.scan(lambda sum_mN, xs: (sum_mN + partial(*xs), None), y_mN, rest)[0]


# --- shapes -------------------------------------------------------------------------------------


def _pad(x: jax.Array, size: int, axis: int) -> jax.Array:
  widths = [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)]
  return jnp.pad(x, widths) if any(w for _, w in widths) else x


def _expand(scale: jax.Array, tile: tuple[int, int], shape: tuple[int, int]) -> jax.Array:
  """A scale for each element."""
  for axis in (0, 1):
    scale = jnp.repeat(scale, min(tile[axis], shape[axis]), axis=axis)
  return scale[:shape[0], :shape[1]]


def _check(a_MK: jax.Array, b_KN: jax.Array, interval: int, bits: int, truncation: str) -> None:
  if a_MK.ndim != 2 or b_KN.ndim != 2 or a_MK.shape[1] != b_KN.shape[0]:
    raise ValueError(f"shapes {a_MK.shape} and {b_KN.shape} do not multiply; [M, K] and [K, N] are "
                     "expected")
  if interval < 0 or (interval % STEP and interval < a_MK.shape[1]):
    raise ValueError(f"interval={interval} must be a multiple of {STEP} (one MMA step), or 0 for "
                     "the whole of K")
  if bits != 0 and not 4 <= bits <= MAX_BITS:
    raise ValueError(f"bits={bits} must be 0 (fp32 sums) or from 4 to {MAX_BITS}")
  if truncation not in TRUNCATIONS:
    raise ValueError(f"truncation={truncation!r} must be one of {', '.join(TRUNCATIONS)}")


def _check_scale(name: str, scale: jax.Array | None, tile: tuple[int, int],
                 shape: tuple[int, int]) -> None:
  expected = tuple(-(-n // t) for n, t in zip(shape, tile, strict=True))
  if scale is not None and scale.shape != expected:
    raise ValueError(f"scale_{name} has shape {scale.shape}; {expected} is expected for an array "
                     f"of shape {shape} in tiles of {tile}")
