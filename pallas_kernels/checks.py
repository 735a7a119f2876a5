"""What a kernel's result has to be: float64 references, errors and random operands.

An error is the largest over all elements: |got - expected|, less what rounding to the result's own
type allows, over the root mean square expected. Codes obey a law instead, see `code_error`.

Each function that returns a Callable makes a check: `run(rng, num_sms=..., interpret=...)` calls a
kernel on fresh operands and gives the error. Before a call on the device, memory that it may get
for its result is filled with NaN, so that what a kernel forgets to write shows.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cases, latent_cache, peers, reference, shapes
from pallas_kernels.mosaic import gemm, mla_decode, quantize, swiglu
from pallas_kernels.mosaic.config import BLOCK

E4M3 = jnp.float8_e4m3fn
_ROUNDING = {"bfloat16": 2.0**-8, "float32": 0.0}


def error(got: jax.Array, expected: np.ndarray) -> float:
  """See the module docstring; NaN anywhere gives NaN."""
  found = np.asarray(got).astype(np.float64)
  if found.shape != expected.shape:
    return float("inf")
  if not found.size:
    return 0.0
  off = np.abs(found - expected) - 1.01 * _ROUNDING[str(got.dtype)] * np.abs(expected)
  rms = max(np.sqrt(np.mean(expected**2)), 1e-30)
  return float(np.maximum(off, 0).max() / rms) if np.isfinite(off).all() else float("nan")


def poison(size: int) -> None:
  """Leaves NaN in memory of this size that the allocator will hand out next."""
  if jax.default_backend() == "gpu":
    jax.block_until_ready([jnp.full((max(size, 256) // 4 + 1,), jnp.nan) for _ in range(3)])


def called(function: Callable, *args):
  """The result of a jitted call into poisoned memory."""
  lowered = jax.jit(function).lower(*args)
  compiled = lowered.compile()
  poison(sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(lowered.out_info)))
  return compiled(*args)


def _upload(*arrays) -> list[jax.Array]:
  return [jnp.asarray(x) for x in arrays]


# --- GEMMs --------------------------------------------------------------------------------------


def _rows(rng: np.random.Generator, *size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
  """Codes [.., M, K], scales [.., ceil(K/128), M] and the values."""
  *lead, M, K = size
  codes = jnp.asarray(np.clip(rng.normal(size=size) * 160, -448, 448), E4M3)
  scales = np.exp(rng.normal(size=(*lead, -(-K // BLOCK), M))).astype(np.float32) / 160
  spread = np.repeat(np.swapaxes(scales, -1, -2), BLOCK, axis=-1)[..., :K]
  return codes, jnp.asarray(scales), np.asarray(codes).astype(np.float64) * spread


def _blocks(rng: np.random.Generator, *size: int) -> tuple[jax.Array, jax.Array, np.ndarray]:
  """Codes [.., N, K], a scale a block of 128x128, and the values."""
  *lead, N, K = size
  codes = jnp.asarray(np.clip(rng.normal(size=size) * 160, -448, 448), E4M3)
  scales = np.exp(rng.normal(size=(*lead, -(-N // BLOCK), -(-K // BLOCK)))).astype(np.float32) / 160
  spread = np.repeat(np.repeat(scales, BLOCK, axis=-2)[..., :N, :], BLOCK, axis=-1)[..., :K]
  return codes, jnp.asarray(scales), np.asarray(codes).astype(np.float64) * spread


def dense(M: int, N: int, K: int, config=None, **options) -> Callable:
  def run(rng, **how):
    a, sa, x = _rows(rng, M, K)
    b, sb, y = _blocks(rng, N, K)
    got = called(lambda *o: gemm.gemm(*o, config=config, **options, **how), a, sa, b, sb)
    return error(got, x @ y.T)

  return run


def wgrad(K: int, N: int, T: int, config=None, accumulate: bool = False) -> Callable:
  def run(rng, **how):
    x, sx, left = _rows(rng, K, T)
    dy, sdy, right = _rows(rng, N, T)
    expected, more = left @ right.T, {}
    if accumulate:
      before = rng.normal(size=(K, N)).astype(np.float32)
      expected, more = expected + before, {"accumulate": jnp.asarray(before)}
    got = called(lambda *o: gemm.wgrad(*o, **more, config=config, **how), x, sx, dy, sdy)
    return error(got, expected)

  return run


def _groups(rng: np.random.Generator, G: int, blocks: int) -> np.ndarray:
  """Blocks of each group: one empty, one hot, some of the capacity unused."""
  counts = rng.multinomial(blocks - 1, rng.dirichlet(np.full(G, 0.5)))
  counts[rng.integers(G)] = 0
  return counts


def grouped(G: int, blocks: int, N: int, K: int, config=None) -> Callable:
  def run(rng, **how):
    counts = _groups(rng, G, blocks)
    used = int(counts.sum())
    group_m = np.full(blocks, G - 1, np.int32)
    group_m[:used] = np.repeat(np.arange(G), counts)
    a, sa, x = _rows(rng, blocks * BLOCK, K)
    b, sb, y = _blocks(rng, G, N, K)
    expected = np.concatenate([x[i * BLOCK:(i + 1) * BLOCK] @ y[g].T * (i < used)
                               for i, g in enumerate(group_m)])
    got = called(lambda *o: gemm.grouped_gemm(*o, config=config, **how), a, sa, b, sb,
                 *_upload(group_m, np.int32(used)))
    return error(got, expected)

  return run


def grouped_wgrad(G: int, blocks: int, K: int, N: int, config=None) -> Callable:
  def run(rng, **how):
    edges = np.concatenate([[0], np.cumsum(_groups(rng, G, blocks))]).astype(np.int32)
    bounds = np.stack([edges[:-1], edges[1:]], axis=1)
    x, sx, left = _rows(rng, K, blocks * BLOCK)
    dy, sdy, right = _rows(rng, N, blocks * BLOCK)
    expected = np.stack([left[:, a * BLOCK:b * BLOCK] @ right[:, a * BLOCK:b * BLOCK].T
                         for a, b in bounds])
    got = called(lambda *o: gemm.grouped_wgrad(*o, config=config, **how), x, sx, dy, sdy,
                 jnp.asarray(bounds))
    return error(got, expected)

  return run


def masked(G: int, M: int, N: int, K: int, config=None) -> Callable:
  def run(rng, **how):
    masked_m = rng.integers(0, M + 1, G).astype(np.int32)
    masked_m[0], masked_m[-1] = 0, M
    a, sa, x = _rows(rng, G, M, K)
    b, sb, y = _blocks(rng, G, N, K)
    got = called(lambda *o: gemm.masked_gemm(*o, config=config, **how), a, sa, b, sb,
                 jnp.asarray(masked_m))
    if not np.isfinite(np.asarray(got).astype(np.float32)).all():
      return float("nan")  # `finite` is the contract for the other rows
    keep = np.arange(M) < masked_m[:, None]
    return error(jnp.where(keep[..., None], got, 0), np.where(keep[..., None], x @ y.mT, 0))

  return run


def real(shape: shapes.Gemm) -> Callable:
  """A shape of the report with the configuration it gets, compared in its first 256 rows."""
  def run(rng, **how):
    operands = jax.jit(cases.gemm_case(shape).operands)(jax.random.key(int(rng.integers(2**31))))
    got = called(cases.gemm_call(shape, **how), *operands)
    if not bool(jnp.isfinite(got).all()):
      return float("nan")
    rows = min(256, shape.m)
    expected = jax.jit(lambda *args: cases.gemm_rows(shape, args, rows))(*operands)
    return error(cases.first_rows(shape, got, rows), np.asarray(expected).astype(np.float64))

  return run


# --- quantizers ---------------------------------------------------------------------------------


def _half_step(exact: np.ndarray, scale: np.ndarray) -> np.ndarray:
  """How far e4m3 codes may lie from these values, which may be off by a part in 2^15 themselves."""
  exponent = np.floor(np.log2(np.maximum(np.abs(exact / scale), 2.0**-6)))
  return scale * 2.0 ** (exponent - 4) + np.abs(exact) * 2.0**-15


def code_error(codes: jax.Array, scales: jax.Array, exact: np.ndarray, floor: float, pow2: bool
               ) -> float:
  """How far 1x128 codes and scales are from right, 0 to 1 where they are right.

  Law: a scale is amax / 448 (or the next power of two), and a code the nearest: half a step off at
  most.

  Args:
    codes: [m, k]. scales: [ceil(k / 128), m]. exact: float64 [m, k].
  """
  m, k = exact.shape
  tiles = -(-k // BLOCK)
  wide = np.pad(exact, ((0, 0), (0, tiles * BLOCK - k))).reshape(m, tiles, BLOCK)
  right = np.maximum(np.abs(wide).max(-1), floor) / 448
  scale = np.asarray(scales).astype(np.float64).T
  if scale.shape != right.shape or np.asarray(codes).shape != exact.shape:
    return float("inf")
  if pow2:
    ratio = scale / right
    ok = (np.log2(scale) % 1 == 0) & (ratio > 1 - 2.0**-16) & (ratio < 2 + 2.0**-15)
  else:
    ok = np.abs(scale / right - 1) < 2.0**-16
  spread = np.repeat(scale, BLOCK, axis=1)[:, :k]
  off = np.abs(np.asarray(codes).astype(np.float64) * spread - exact)
  worst = (off / _half_step(exact, spread)).max()
  return float(worst) if ok.all() and np.isfinite(worst) else float("inf")


def _activation(rng: np.random.Generator, M: int, K: int) -> tuple[jax.Array, np.ndarray]:
  """bf16 with outliers, a row and a column of zeros, and tiny rows."""
  x = rng.normal(size=(M, K)) * np.exp(rng.normal(size=(M, 1)))
  x[rng.integers(M)] = 0
  x[:, rng.integers(K)] = 0
  x[rng.integers(M), rng.integers(K)] = 300.0
  x = jnp.asarray(x, jnp.bfloat16)
  return x, np.asarray(x).astype(np.float64)


def _turned(exact: np.ndarray) -> np.ndarray:
  """Transposed, rows filled up with zeros to whole tiles."""
  return np.pad(exact, ((0, -exact.shape[0] % BLOCK), (0, 0))).T


def quantized(name: str, M: int, K: int, pow2: bool) -> Callable:
  def run(rng, **how):
    x, exact = _activation(rng, M, K)
    function = getattr(quantize, name)
    got = called(lambda x: function(x, pow2=pow2, floor=1e-4, **how), x)
    along = lambda pair: code_error(*pair, exact, 1e-4, pow2)
    across = lambda pair: code_error(*pair, _turned(exact), 1e-4, pow2)
    return {"rows": along, "columns": across,
            "both": lambda pairs: max(along(pairs[0]), across(pairs[1]))}[name](got)

  return run


def turned(M: int, K: int) -> Callable:
  def run(rng, **how):
    codes, scales, exact = _rows(rng, M, K)
    got = called(lambda *o: quantize.turn(*o, **how), codes, scales)
    return code_error(*got, _turned(exact), 1e-4, False)

  return run


def weights(G: int, K: int, N: int, pow2: bool) -> Callable:
  def run(rng, **how):
    w = jnp.asarray(rng.normal(size=(G, K, N)) * 0.006, jnp.float32)
    codes_t, codes, scales = called(lambda w: quantize.blocks(w, pow2=pow2, **how), w)
    plain = [np.asarray(x).astype(np.float64) for x in (codes_t, codes)]
    if not (plain[0] == plain[1].swapaxes(1, 2)).all():
      return float("inf")
    worst = 0.0
    wide = np.pad(np.asarray(w).astype(np.float64), ((0, 0), (0, -K % BLOCK), (0, -N % BLOCK)))
    padded = np.pad(plain[0], ((0, 0), (0, -N % BLOCK), (0, -K % BLOCK)))
    for g, j, i in np.ndindex(*np.asarray(scales).shape):  # a block as one row of its own tile
      part = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
      exact = wide[g][part]
      right = max(np.abs(exact).max(), 1e-4) / 448
      scale = float(scales[g, j, i])
      fits = (0.9999 < scale / right < 2.0001 and np.log2(scale) % 1 == 0 if pow2
              else abs(scale / right - 1) < 2.0**-16)
      off = np.abs(padded[g][part[::-1]].T * scale - exact)
      worst = max(worst, float((off / _half_step(exact, scale)).max()) if fits else np.inf)
    return worst

  return run


def gated(M: int, F: int, backward: str = "") -> Callable:
  """SwiGLU; backward from "bf16" or "codes"."""
  def run(rng, **how):
    (gate, g), (up, u), (dh, d) = (_activation(rng, M, F) for _ in range(3))
    w = rng.uniform(0.1, 2, M).astype(np.float32)
    weight = w.astype(np.float64)[:, None]
    if backward == "codes":
      gate, up = peers.quantize_rows(gate), peers.quantize_rows(up)
      g, u = (np.asarray(c).astype(np.float64) * np.repeat(np.asarray(s).T, BLOCK, axis=1)
              for c, s in (gate, up))
    sigmoid = 1 / (1 + np.exp(-g))
    h = weight * g * sigmoid * u
    if not backward:
      got = called(lambda *o: swiglu.swiglu_rows(*o, **how), gate, up, jnp.asarray(w))
      return code_error(*got, h, 1e-4, False)
    dgate = weight * d * u * sigmoid * (1 + g * (1 - sigmoid))
    dup = weight * d * g * sigmoid
    (dg, dg_t), (du, du_t), h_t, dw = called(
        lambda *o: swiglu.swiglu_backward(*o, **how), gate, up, dh, jnp.asarray(w))
    return max(code_error(*dg, dgate, 1e-30, False), code_error(*du, dup, 1e-30, False),
               code_error(*dg_t, _turned(dgate), 1e-30, False),
               code_error(*du_t, _turned(dup), 1e-30, False),
               code_error(*h_t, _turned(h), 1e-4, False),
               error(dw, (d * g * sigmoid * u).sum(1)) / 1e-4)

  return run


# --- decode -------------------------------------------------------------------------------------


def decoded(B: int, T: int, H: int, pages: int, records: bool, splits: int = 0) -> Callable:
  def run(rng, **how):
    lengths = rng.integers(T, pages * 64 + 1, B).astype(np.int32)
    lengths[0], lengths[-1] = T, pages * 64
    q = jnp.asarray(rng.normal(size=(B, T, H, 576)), jnp.bfloat16)
    cache = jnp.asarray(rng.normal(size=(B * pages + 1, 64, 576)), jnp.bfloat16)
    if records:
      cache = latent_cache.encode_record(cache[..., :512], cache[..., 512:])
    table = 1 + rng.permutation(B * pages).astype(np.int32).reshape(B, pages)
    operands = q, cache, *_upload(lengths, table)

    def call(function, **more):
      return lambda q, cache, lengths, table: function(
          q, cache, lengths, scale=192**-0.5, pages_BN=table, **more)

    got = called(call(mla_decode.mla_decode, splits=splits, **how), *operands)
    with jax.default_matmul_precision("highest"):
      expected = jax.jit(call(reference.mla_decode))(operands[0].astype(jnp.float32),
                                                     *operands[1:])
    return error(got, np.asarray(expected).astype(np.float64))

  return run
