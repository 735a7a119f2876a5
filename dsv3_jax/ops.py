"""The only door to `pallas_kernels`: picks an implementation and says once which.

`impl="auto"` tries the accelerator's implementations in order; one that cannot take the call raises
NotImplementedError, which is the only signal for trying the next. Any other name runs that
implementation or fails.
"""

import functools
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import cudnn_attention, latent_cache, reference, scaled, vma
from pallas_kernels.mosaic import adapters as mosaic
from pallas_kernels.scaled import Scaled
from pallas_kernels.xla import attention as xla_attention
from pallas_kernels.xla import fp8_gemm as xla_fp8_gemm
from pallas_kernels.xla import gemm as xla_gemm
from pallas_kernels.xla import grouped_gemm as xla_grouped_gemm
from pallas_kernels.xla import mla_decode as xla_mla_decode

_log = logging.getLogger(__name__)


@functools.cache
def _say(op: str, name: str, platform: str) -> None:
  """Logs a choice the first time it is made."""
  _log.info("%s: %s implementation on %s", op, name, platform)


def _dispatch(op: str, impl: str, implementations: dict[str, Callable], auto: tuple[str, ...]):
  """Result of the chosen implementation, or of the first of `auto` that takes the call."""
  if impl != "auto":
    if impl not in implementations:
      raise ValueError(f"{op}: no implementation {impl!r}; "
                       f"choose from auto, {', '.join(implementations)}")
    return implementations[impl]()
  for name in auto:
    try:
      result = implementations[name]()
    except NotImplementedError as error:
      _log.debug("%s: %s declined: %s", op, name, error)
      continue
    _say(op, name, jax.default_backend())
    return result
  raise NotImplementedError(f"{op}: none of {', '.join(auto)} takes this call")


def varying_zeros(shape: tuple[int, ...], dtype, *like: jax.Array) -> jax.Array:
  """Zeros to start a loop's carry with, varying over every mesh axis that one of `like` does."""
  return vma.zeros(shape, dtype, *like)


def attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, *, scale: float,
              segments_BT: jax.Array | None = None, impl: str = "auto", block: int = 0
              ) -> jax.Array:
  """Causal attention of separate key and value widths.

  Args:
    q_BTHK, k_BTHK, v_BTHU: queries, keys, values of H heads.
    scale: factor on the scores.
    segments_BT: int32; a query sees only keys of its own number. None: plain causal.
    impl: auto, xla (blockwise, linear memory), cudnn, reference.
    block: tile rows of the blockwise form; 0 lets it choose.

  Returns:
    [B, T, H, U] in the dtype of the queries.
  """
  args = (q_BTHK, k_BTHK, v_BTHU)
  kwargs = dict(scale=scale, segments_BT=segments_BT)
  return _dispatch("attention", impl, {
      "cudnn": lambda: cudnn_attention.attention(*args, **kwargs),
      "xla": lambda: xla_attention.attention(*args, **kwargs, block=block),
      "reference": lambda: reference.attention(*args, **kwargs),
  }, auto=("cudnn", "xla"))


def attention_in_halves(impl: str, dtype, segments_BT: jax.Array | None) -> bool:
  """Whether `attention` of such a call is what the two halves below compute."""
  if impl == "auto":
    return not cudnn_attention.takes(dtype, segments_BT)
  return impl == "xla"


def attention_forward(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, *, scale: float,
                      segments_BT: jax.Array | None = None, impl: str = "auto", block: int = 0
                      ) -> tuple[jax.Array, jax.Array]:
  """`attention`, not differentiable, and its log-sum-exp fp32 [B, T, H]; impl: auto, xla."""
  return _dispatch("attention_forward", impl, {"xla": lambda: xla_attention.forward(
      q_BTHK, k_BTHK, v_BTHU, scale=scale, segments_BT=segments_BT, block=block)}, auto=("xla",))


def attention_backward(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, o_BTHU: jax.Array,
                       lse_BTH: jax.Array, do_BTHU: jax.Array, *, scale: float,
                       segments_BT: jax.Array | None = None, impl: str = "auto", block: int = 0
                       ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of q, k, v from output, log-sum-exp and the output's gradient; impl: auto, xla."""
  return _dispatch("attention_backward", impl, {"xla": lambda: xla_attention.backward(
      q_BTHK, k_BTHK, v_BTHU, o_BTHU, lse_BTH, do_BTHU, scale=scale, segments_BT=segments_BT,
      block=block)}, auto=("xla",))


def gemm(x_MK: jax.Array, w_KN: jax.Array, *, impl: str = "auto") -> jax.Array:
  """`x @ w`, [M, N] in the dtype of both; impl: auto, xla (made for the CPU), reference."""
  return _dispatch("gemm", impl, {
      "xla": lambda: xla_gemm.gemm(x_MK, w_KN),
      "reference": lambda: reference.gemm(x_MK, w_KN),
  }, auto=("xla", "reference"))


def grouped_gemm(x_MK: jax.Array, w_GKN: jax.Array, group_m: jax.Array, used: jax.Array, *,
                 impl: str = "auto") -> jax.Array:
  """`y[block i] = x[block i] @ w[group_m[i]]` for the first `used` blocks of rows, zeros after.

  Args:
    x_MK: rows in blocks of M / len(group_m); see `dsv3_jax.model.moe.plan`.
    w_GKN: one matrix a group, in the dtype of `x_MK`.
    group_m: int32 [blocks], non-decreasing over the used blocks.
    used: int32 scalar.
    impl: auto, xla, ragged_dot, reference.

  Returns:
    [M, N] in the dtype of `x_MK`.
  """
  args = (x_MK, w_GKN, group_m, used)
  return _dispatch("grouped_gemm", impl, {
      "xla": lambda: xla_grouped_gemm.grouped_gemm(*args),
      "ragged_dot": lambda: reference.ragged_dot(*args),
      "reference": lambda: reference.grouped_gemm(*args),
  }, auto=("xla",))


def fp8_multiplies_transposed(impl: str = "auto") -> bool:
  """Whether FP8 matmuls of this `impl` read their second operand transposed, K contiguous.

  Then `turned_NK` saves moving bytes, and of a weight's two forms the other one is worth keeping.
  """
  return impl == "pallas" or (impl == "auto" and mosaic.on_hopper())


def fp8_block(impl: str = "auto") -> int:
  """Rows of a block that grouped FP8 kernels of this `impl` insist on; 0: any number."""
  return mosaic.BLOCK if fp8_multiplies_transposed(impl) else 0


def fp8_quantize(x: jax.Array, tile: tuple[int, int], *, pow2: bool = False, floor: float = 1e-4,
                 impl: str = "auto") -> Scaled:
  """`x` in E4M3 with online scales, [..., m, n]: tiles 1x128, 128x1 or 128x128.

  Raises:
    NotImplementedError: no kernel takes the call; `dsv3_jax.fp8.quantize` takes every one.
  """
  return _kernel("fp8_quantize", impl, lambda: mosaic.quantize(x, tile, pow2, floor, impl))


def fp8_quantize_both(x_MK: jax.Array, *, pow2: bool = False, floor: float = 1e-4,
                      impl: str = "auto") -> tuple[Scaled, Scaled]:
  """`fp8_quantize` in tiles of 1x128 and of 128x1, from one read."""
  return _kernel("fp8_quantize_both", impl, lambda: mosaic.quantize_both(x_MK, pow2, floor, impl))


def fp8_quantize_weight(w: jax.Array, *, pow2: bool = False, floor: float = 1e-4,
                        impl: str = "auto") -> tuple[Scaled, Scaled]:
  """Weights [..., K, N] in blocks of 128x128, and their transpose, from one read."""
  return _kernel("fp8_quantize_weight", impl, lambda: mosaic.quantize_weight(w, pow2, floor, impl))


def fp8_turn(x_MK: Scaled, *, pow2: bool = False, floor: float = 1e-4, impl: str = "auto"
             ) -> Scaled:
  """What lies in tiles of 1x128, quantized again in tiles of 128x1."""
  return _kernel("fp8_turn", impl, lambda: mosaic.turn(x_MK, pow2, floor, impl))


def fp8_swiglu(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array | None, *,
               pow2: bool = False, floor: float = 1e-4, impl: str = "auto") -> Scaled:
  """`weight * silu(gate) * up` in tiles of 1x128; weight fp32 or None."""
  return _kernel("fp8_swiglu", impl,
                 lambda: mosaic.swiglu(gate_MF, up_MF, weight_M, pow2, floor, impl))


def fp8_swiglu_backward(
    gate_MF: Scaled, up_MF: Scaled, dh_MF: jax.Array, weight_M: jax.Array | None, *,
    pow2: bool = False, floor: float = 1e-4, gradient_floor: float = 1e-30, impl: str = "auto"
) -> tuple[tuple[Scaled, Scaled], tuple[Scaled, Scaled], Scaled, jax.Array | None]:
  """dgate and dup in tiles of 1x128 and of 128x1, h in tiles of 128x1, dweight fp32 [M] or None."""
  return _kernel("fp8_swiglu_backward", impl, lambda: mosaic.swiglu_backward(
      gate_MF, up_MF, dh_MF, weight_M, pow2, floor, gradient_floor, impl))


def _kernel(op: str, impl: str, call: Callable):
  """The kernel's result; NotImplementedError: `dsv3_jax.fp8.quantize` is to take the call."""
  if impl not in ("auto", "pallas"):
    raise NotImplementedError(f"{op} has no implementation {impl!r}")
  return _dispatch(op, impl, {"pallas": call}, auto=("pallas",))


def fp8_dequantize(x: Scaled, after: jax.Array | None = None) -> jax.Array:
  """fp32 values of a quantized operand; with `after` no sooner than that array is there."""
  return scaled.dequantize(x, after)


def fp8_gemm(a_MK: Scaled, b_KN: Scaled, *, turned_NK: Scaled | None = None, dtype=jnp.float32,
             interval: int = 128, impl: str = "auto") -> jax.Array:
  """`a @ b` of quantized operands, added in fp32: Fprop and Dgrad. [M, N] in `dtype`.

  Args:
    a_MK: activations or gradients, a scale a row and tile of K.
    b_KN: a weight (for Dgrad: its transpose), a scale a block.
    turned_NK: the transpose of `b_KN`, if there is one.
    interval: values of K that a kernel adds in the tensor core; the others add in fp32.
    impl: auto, pallas, xla, reference.
  """
  return _dispatch("fp8_gemm", impl, {
      "pallas": lambda: mosaic.gemm(a_MK, b_KN, turned_NK, dtype, interval, impl),
      "xla": lambda: xla_fp8_gemm.gemm(a_MK, b_KN).astype(dtype),
      "reference": lambda: reference.fp8_gemm(a_MK, b_KN).astype(dtype),
  }, auto=("pallas", "xla"))


def fp8_wgrad(x_MK: Scaled, dy_MN: Scaled, *, interval: int = 128, impl: str = "auto"
              ) -> jax.Array:
  """`x^T dy` of operands with scales along the tokens: Wgrad. fp32 [K, N]."""
  return _dispatch("fp8_wgrad", impl, {
      "pallas": lambda: mosaic.wgrad(x_MK, dy_MN, interval, impl),
      "xla": lambda: xla_fp8_gemm.wgrad(x_MK, dy_MN),
      "reference": lambda: reference.fp8_gemm(
          Scaled(x_MK.codes.T, None if x_MK.scales is None else x_MK.scales.T, x_MK.tile[::-1]),
          dy_MN),
  }, auto=("pallas", "xla"))


def fp8_grouped_gemm(x_MK: Scaled, w_GKN: Scaled, group_m: jax.Array, used: jax.Array, *,
                     turned_GNK: Scaled | None = None, dtype=jnp.float32, interval: int = 128,
                     impl: str = "auto") -> jax.Array:
  """`grouped_gemm` of quantized operands, [M, N] in `dtype`; `impl` as there, and pallas."""
  def dequantized(impl):
    return lambda: grouped_gemm(scaled.dequantize(x_MK), scaled.dequantize(w_GKN), group_m, used,
                                impl=impl).astype(dtype)

  return _dispatch("fp8_grouped_gemm", impl, {
      "pallas": lambda: mosaic.grouped_gemm(x_MK, w_GKN, turned_GNK, group_m, used, dtype, interval,
                                            impl),
      "xla": lambda: xla_grouped_gemm.quantized(x_MK, w_GKN, group_m, used).astype(dtype),
      **{name: dequantized(name) for name in ("ragged_dot", "reference")},
  }, auto=("pallas", "xla"))


def fp8_grouped_wgrad(x_MK: Scaled, dy_MN: Scaled, group_m: jax.Array, used: jax.Array,
                      groups: int, *, interval: int = 128, impl: str = "auto") -> jax.Array:
  """The weight gradient of `fp8_grouped_gemm`, fp32 [G, K, N]: a sum over each group's blocks."""
  def dequantized(impl):
    x, dy = scaled.dequantize(x_MK), scaled.dequantize(dy_MN)
    w_GKN = varying_zeros((groups, x.shape[1], dy.shape[1]), x.dtype, x, dy, group_m)
    # The product is linear in the weights, so its pullback needs none: these zeros are never read.
    _, pull = jax.vjp(lambda w: grouped_gemm(x, w, group_m, used, impl=impl), w_GKN)
    return pull(dy)[0]

  return _dispatch("fp8_grouped_wgrad", impl, {
      "pallas": lambda: mosaic.grouped_wgrad(x_MK, dy_MN, group_m, used, groups, interval, impl),
      **{name: functools.partial(dequantized, name) for name in ("xla", "ragged_dot", "reference")},
  }, auto=("pallas", "xla"))


def mla_decode(q_BTHZ: jax.Array, cache: jax.Array, lengths_B: jax.Array, *, scale: float,
               pages_BN: jax.Array | None = None, kv_rank: int = 512, return_lse: bool = False,
               impl: str = "auto") -> jax.Array | tuple[jax.Array, jax.Array]:
  """Absorbed attention of the newest T tokens over what MLA caches of a sequence.

  Args:
    q_BTHZ: queries folded with the key up-projection (C), then their rotary part.
    cache: [B, S, Z], or with `pages_BN` a pool [pages, page size, Z]; or int32 records
      (`pallas_kernels.latent_cache`) in place of Z numbers.
    lengths_B: int32, tokens of each sequence, the T new ones included; 0 gives zeros.
    scale: factor on the scores.
    pages_BN: int32, each sequence's pages in order; anything beyond its length.
    kv_rank: C.
    return_lse: also return the log-sum-exp, fp32 [B, T, H].
    impl: auto, pallas (512 + 64 numbers, pages of 64), xla, reference.

  Returns:
    [B, T, H, C] in the dtype of the queries.
  """
  args = (q_BTHZ, cache, lengths_B)
  kwargs = dict(scale=scale, pages_BN=pages_BN, kv_rank=kv_rank, return_lse=return_lse)
  return _dispatch("mla_decode", impl, {
      "pallas": lambda: mosaic.mla_decode(*args, **kwargs, impl=impl),
      "xla": lambda: xla_mla_decode.mla_decode(*args, **kwargs),
      "reference": lambda: reference.mla_decode(*args, **kwargs),
  }, auto=("pallas", "xla"))


def mla_record_words(kv_rank: int, rope_dim: int) -> int:
  """int32 words of a token's record in a latent cache of 8-bit codes.

  Raises:
    ValueError: records hold 512 + 64 numbers.
  """
  if (kv_rank, rope_dim) != (latent_cache.CODES, latent_cache.HALVES):
    raise ValueError(f"records of 8-bit codes hold {latent_cache.CODES} + {latent_cache.HALVES} "
                     f"numbers a token, not {kv_rank} + {rope_dim}; keep the cache in bfloat16")
  return latent_cache.WORDS


def mla_record(latent: jax.Array, rope: jax.Array) -> jax.Array:
  """Latents [..., 512] and rotary keys [..., 64] as records int32 [..., 164] for `mla_decode`."""
  return latent_cache.encode_record(latent, rope)
