"""The kernels on the shapes of `shapes`: random operands, the call, work, and the same by XLA.

What tuner, benchmark, compile check and hardware test share.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import latent_cache, peers, shapes
from pallas_kernels.mosaic import compat, gemm, mla_decode, quantize, swiglu
from pallas_kernels.mosaic.config import BLOCK, SMS, GemmConfig, one_d
from pallas_kernels.xla import mla_decode as xla_mla_decode

E4M3 = jnp.float8_e4m3fn
TINY = GemmConfig(rows=64, tile_n=64, warpgroups=2, stages=2)  # quick to interpret, on any jax


@dataclasses.dataclass(frozen=True)
class Case:
  """One kernel on one shape.

  Attributes:
    name: family and shape.
    operands: from a random key to the operands; traceable, so `jax.eval_shape` gives their shapes.
    kernel: from (num_sms, interpret) to a function of the operands.
    flops, bytes: of the operation; each operand read and each result written once.
    plain: the same function by XLA, on the same operands; None where `shape` says how.
    needs: instructions that the machine code must hold.
    shape: of a GEMM.
  """

  name: str
  operands: Callable[[jax.Array], tuple]
  kernel: Callable[..., Callable]
  flops: float
  bytes: float
  plain: Callable | None = None
  needs: tuple[str, ...] = ()
  shape: shapes.Gemm | None = None

  def abstract(self) -> tuple:
    """The operands' shapes and types."""
    return jax.eval_shape(self.operands, jax.random.key(0))


# --- GEMMs --------------------------------------------------------------------------------------


def out_dtype(kind: str):
  """Of a product as the layers call it."""
  return jnp.float32 if one_d(kind) else jnp.bfloat16


def dimensions(shape: shapes.Gemm) -> tuple[int, int, int]:
  """M, N, K as the configurations count them: grouped rows or tokens of all groups together."""
  g, m, n, k = shape.groups, shape.m, shape.n, shape.k
  if one_d(shape.kind):
    return m, n, g * k
  return (m if shape.kind == "masked" else g * m), n, k


def arguments(shape: shapes.Gemm, dtype=None) -> tuple:
  """kind, M, N, K, G, dtype of the result: what the functions on configurations take."""
  return shape.kind, *dimensions(shape), shape.groups, dtype or out_dtype(shape.kind)


def _codes(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
  """As quantizing normal numbers gives: the largest of 128 comes near 448."""
  return jnp.clip(jax.random.normal(key, size) * 160, -448, 448).astype(E4M3)


def _scales(key: jax.Array, size: tuple[int, ...]) -> jax.Array:
  return jnp.exp(0.3 * jax.random.normal(key, size)) / 160


def gemm_operands(shape: shapes.Gemm, key: jax.Array) -> tuple[jax.Array, ...]:
  """Random operands, groups of equal size."""
  M, N, K = dimensions(shape)
  G, blocks = shape.groups, K // BLOCK
  a, b, sa, sb = jax.random.split(key, 4)
  if one_d(shape.kind):
    found = (_codes(a, (M, K)), _scales(sa, (blocks, M)), _codes(b, (N, K)),
             _scales(sb, (blocks, N)))
    if shape.kind == "wgrad":
      return found
    edges = jnp.arange(G + 1, dtype=jnp.int32) * (shape.k // BLOCK)
    return *found, jnp.stack([edges[:-1], edges[1:]], axis=1)
  rows = (G,) if shape.kind == "masked" else ()
  lead = () if shape.kind == "dense" else (G,)
  found = (_codes(a, (*rows, M, K)), _scales(sa, (*rows, blocks, M)), _codes(b, (*lead, N, K)),
           _scales(sb, (*lead, -(-N // BLOCK), blocks)))
  if shape.kind == "dense":
    return found
  if shape.kind == "masked":
    return *found, jnp.full((G,), M, jnp.int32)
  group_m = jnp.repeat(jnp.arange(G, dtype=jnp.int32), shape.m // BLOCK)
  return *found, group_m, jnp.int32(group_m.shape[0])


def gemm_call(shape: shapes.Gemm, config: GemmConfig | None = None, num_sms: int = SMS,
              interpret: compat.Interpret = False, **options) -> Callable:
  """The kernel as a function of `gemm_operands`; the heuristic's configuration where None.

  Further `options` go to the kernel.
  """
  function = {"dense": gemm.gemm, "wgrad": gemm.wgrad, "grouped": gemm.grouped_gemm,
              "masked": gemm.masked_gemm, "grouped_wgrad": gemm.grouped_wgrad}[shape.kind]
  return lambda *args: function(*args, config=config, num_sms=num_sms, interpret=interpret,
                                **options)


def gemm_case(shape: shapes.Gemm, config: GemmConfig | None = None) -> Case:
  return Case(shape.name, functools.partial(gemm_operands, shape),
              functools.partial(gemm_call, shape, config), shape.flops, shape.bytes,
              needs=("QGMMA", "UTMALDG"), shape=shape)


def gemm_rows(shape: shapes.Gemm, operands: tuple, rows: int) -> jax.Array:
  """The first `rows` rows of the (first group's) product in fp32, from dequantized operands."""
  a, a_scales, b, b_scales = operands[:4]
  if shape.kind == "masked":
    a, a_scales = a[0], a_scales[0]
  if shape.kind in ("masked", "grouped"):
    b, b_scales = b[0], b_scales[0]
  k = shape.k  # of a weight gradient: the first group's tokens, which come first
  a, a_scales = a[:rows, :k], a_scales[: k // BLOCK, :rows]
  a = a.astype(jnp.float32) * jnp.repeat(a_scales.T, BLOCK, axis=1)
  if one_d(shape.kind):
    spread = jnp.repeat(b_scales[: k // BLOCK].T, BLOCK, axis=1)
  else:
    spread = jnp.repeat(jnp.repeat(b_scales, BLOCK, axis=0)[: shape.n], BLOCK, axis=1)
  return jnp.dot(a, (b[:, :k].astype(jnp.float32) * spread).T, precision="highest")


def first_rows(shape: shapes.Gemm, result: jax.Array, rows: int) -> jax.Array:
  """Those of a result that `gemm_rows` computes."""
  return (result if result.ndim == 2 else result[0])[:rows]


# --- the others ---------------------------------------------------------------------------------


def _normal(*size: int) -> Callable[[jax.Array], tuple]:
  return lambda key: (jax.random.normal(key, size, jnp.bfloat16),)


_QUANTIZERS = {"rows": (quantize.rows, peers.quantize_rows, 1),
               "columns": (quantize.columns, peers.quantize_columns, 1),
               "both": (quantize.both, peers.quantize_both, 2)}


def quantize_case(name: str, m: int, k: int) -> Case:
  """Activations [m, k] in one direction ("rows", "columns") or "both"."""
  kernel, plain, written = _QUANTIZERS[name]
  return Case(f"quantize {name} {m}x{k}", _normal(m, k), functools.partial(_bound, kernel), 0.0,
              m * k * (2 + written * (1 + 4 / BLOCK)), plain)


def quantize_cases() -> list[Case]:
  """Each direction of activations and gradients, weights, and codes turned."""
  found = [quantize_case(name, m, k) for name in _QUANTIZERS for m, k in shapes.ROWS]
  found += [Case(f"quantize blocks {k}x{n}", _normal(k, n),
                 functools.partial(_bound, quantize.blocks), 0.0, 4.0 * k * n,
                 peers.quantize_blocks) for k, n in shapes.WEIGHTS]
  m, k = shapes.ROWS[0]
  found.append(Case(
      f"quantize turn {m}x{k}", lambda key: peers.quantize_rows(*_normal(m, k)(key)),
      functools.partial(_bound, quantize.turn), 0.0, m * k * 2 * (1 + 4 / BLOCK), peers.turn))
  return found


def _bound(function: Callable, num_sms: int = SMS, interpret: compat.Interpret = False, **more
           ) -> Callable:
  return lambda *args: function(*args, num_sms=num_sms, interpret=interpret, **more)


def swiglu_operands(m: int, f: int, given: str, key: jax.Array) -> tuple:
  """gate, up and weights; for the backward pass ("bf16", "codes") dh before the weights."""
  keys = jax.random.split(key, 4)
  gate, up, dh = (_normal(m, f)(k)[0] for k in keys[:3])
  weight = jax.random.uniform(keys[3], (m,), jnp.float32)
  if given == "forward":
    return gate, up, weight
  if given == "codes":
    gate, up = peers.quantize_rows(gate), peers.quantize_rows(up)
  return gate, up, dh, weight


def swiglu_cases() -> list[Case]:
  """Forward; backward from bf16 and from the codes that the forward pass may keep."""
  found = []
  code = 1 + 4 / BLOCK  # bytes, with its share of a scale
  for m, f in shapes.SWIGLU:
    for given, kernel, plain, size in (
        ("forward", swiglu.swiglu_rows, peers.swiglu_rows, 4 + code),
        ("bf16", swiglu.swiglu_backward, peers.swiglu_backward, 6 + 5 * code),
        ("codes", swiglu.swiglu_backward, peers.swiglu_backward, 2 + 7 * code)):
      name = given if given == "forward" else f"backward {given}"
      found.append(Case(f"swiglu {name} {m}x{f}", functools.partial(swiglu_operands, m, f, given),
                        functools.partial(_bound, kernel), 0.0, m * f * size, plain))
  return found


def decode_operands(shape: shapes.Decode, records: bool, key: jax.Array) -> tuple:
  """Queries, a paged cache (pages of 64 tokens, shuffled) and full lengths."""
  q, c, p = jax.random.split(key, 3)
  B, pages = shape.batch, shape.context // 64
  q_BTHZ = jax.random.normal(q, (B, shape.queries, shape.heads, 576), jnp.bfloat16)
  cache = jax.random.normal(c, (B * pages, 64, 576), jnp.bfloat16)
  if records:
    cache = latent_cache.encode_record(cache[..., :512], cache[..., 512:])
  table = jax.random.permutation(p, B * pages).astype(jnp.int32).reshape(B, pages)
  return q_BTHZ, cache, jnp.full((B,), shape.context, jnp.int32), table


def _decode(function: Callable, more: dict) -> Callable:
  return lambda q, cache, lengths, table: function(q, cache, lengths, scale=192**-0.5,
                                                   pages_BN=table, **more)


def decode_cases() -> list[Case]:
  """The latent cache in bf16 and in records."""
  return [Case(f"{shape.name} {'fp8' if records else 'bf16'}",
               functools.partial(decode_operands, shape, records),
               lambda num_sms=SMS, interpret=False: _decode(
                   mla_decode.mla_decode, dict(num_sms=num_sms, interpret=interpret)),
               shape.flops, shape.bytes(656 if records else 1152),
               _decode(xla_mla_decode.mla_decode, {}), needs=("HGMMA",))
          for shape in shapes.DECODES for records in (False, True)]


def others() -> list[Case]:
  """All but the GEMMs."""
  return quantize_cases() + swiglu_cases() + decode_cases()
