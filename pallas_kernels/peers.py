"""What the kernels are measured against, in the same process.

  bf16          `jnp.dot` and `lax.ragged_dot` of bf16 operands: what training without FP8 uses
  cublas        cuBLASLt's block-scaled FP8 through torch, the fastest published peer on Hopper
  XLA           this package's own plain implementations, for operations that no library has

torch is imported only where it is installed and sees a GPU.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import shapes
from pallas_kernels.timing import Time

E4M3, TILE = jnp.float8_e4m3fn, 128


def torch_module() -> Any | None:
  """torch, if it can use a GPU."""
  try:
    torch = importlib.import_module("torch")
  except ImportError:
    return None
  return torch if torch.cuda.is_available() else None


def bf16_operands(shape: shapes.Gemm, key: jax.Array) -> tuple[jax.Array, ...]:
  """Random bf16 operands of the same product, in the layouts that XLA likes: weights [K, N]."""
  g, m, n, k = shape.groups, shape.m, shape.n, shape.k
  a, b = jax.random.split(key)
  sizes = {"dense": ((m, k), (k, n)), "wgrad": ((k, m), (k, n)),
           "grouped_wgrad": ((g, k, m), (g, k, n))}.get(shape.kind, ((g * m, k), (g, k, n)))
  return tuple(jax.random.normal(x, s, jnp.bfloat16) for x, s in zip((a, b), sizes, strict=True))


def bf16(shape: shapes.Gemm) -> Callable:
  """The product of `bf16_operands` in bf16; weight gradients give fp32 as the kernels do."""
  if shape.kind == "dense":
    return lambda a, b: a @ b
  if shape.kind == "wgrad":
    return lambda a, b: jnp.einsum("km,kn->mn", a, b, preferred_element_type=jnp.float32)
  if shape.kind == "grouped_wgrad":
    return lambda a, b: jnp.einsum("gkm,gkn->gmn", a, b, preferred_element_type=jnp.float32)
  sizes_G = jnp.full((shape.groups,), shape.m, jnp.int32)
  return lambda a, b: lax.ragged_dot(a, b, sizes_G)


# --- quantizers, as XLA fuses them --------------------------------------------------------------


def _scale(amax: jax.Array, floor: float) -> jax.Array:
  return jnp.maximum(amax, floor) / 448.0


def quantize_rows(x_MK: jax.Array, floor: float = 1e-4) -> tuple[jax.Array, jax.Array]:
  """Codes [M, K] and scales [K/128, M]; K a multiple of 128."""
  M, K = x_MK.shape
  x = x_MK.astype(jnp.float32).reshape(M, K // TILE, TILE)
  scale = _scale(jnp.max(jnp.abs(x), axis=2), floor)
  return (x / scale[..., None]).reshape(M, K).astype(E4M3), scale.T


def quantize_columns(x_MK: jax.Array, floor: float = 1e-4) -> tuple[jax.Array, jax.Array]:
  """Codes [K, M] and scales [M/128, K]; M a multiple of 128."""
  return quantize_rows(x_MK.T, floor)


def quantize_both(x_MK: jax.Array, floor: float = 1e-4) -> tuple:
  return quantize_rows(x_MK, floor), quantize_columns(x_MK, floor)


def quantize_blocks(w_KN: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Codes [N, K] and [K, N], scales [N/128, K/128]."""
  K, N = w_KN.shape
  w = w_KN.astype(jnp.float32).reshape(K // TILE, TILE, N // TILE, TILE)
  scale = _scale(jnp.max(jnp.abs(w), axis=(1, 3)), 1e-4)
  codes = (w / scale[:, None, :, None]).reshape(K, N).astype(E4M3)
  return codes.T, codes, scale.T


def turn(codes_MK: jax.Array, scales_kM: jax.Array) -> tuple[jax.Array, jax.Array]:
  """1x128 codes again as 128x1 codes, transposed."""
  x = codes_MK.astype(jnp.float32) * jnp.repeat(scales_kM.T, TILE, axis=1)
  return quantize_columns(x)


def swiglu_rows(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array
                ) -> tuple[jax.Array, jax.Array]:
  """`weight * silu(gate) * up` in 1x128 tiles."""
  gate, up = gate_MF.astype(jnp.float32), up_MF.astype(jnp.float32)
  return quantize_rows(weight_M[:, None] * jax.nn.silu(gate) * up)


def swiglu_backward(gate, up, dh_MF: jax.Array, weight_M: jax.Array) -> tuple:
  """As `mosaic.swiglu.swiglu_backward`; `gate` and `up` bf16, or codes and scales."""
  def values(x):
    if not isinstance(x, tuple):
      return x.astype(jnp.float32)
    return x[0].astype(jnp.float32) * jnp.repeat(x[1].T, TILE, axis=1)

  gate, up, dh = values(gate), values(up), dh_MF.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  silu, weight = gate * sigmoid, weight_M[:, None]
  h = weight * silu * up
  dgate = weight * dh * up * (sigmoid + silu * (1 - sigmoid))
  dup = weight * dh * silu
  return (quantize_both(dgate, 1e-30), quantize_both(dup, 1e-30), quantize_columns(h),
          jnp.sum(dh * silu * up, axis=1))


# --- torch --------------------------------------------------------------------------------------


def to_torch(torch: Any, x: jax.Array) -> Any:
  """The same memory as a torch tensor; DLPack does not know float8, so that travels as bytes."""
  if x.dtype == jnp.float8_e4m3fn:
    raw = lax.bitcast_convert_type(x, jnp.uint8)
    return torch.from_dlpack(raw).view(torch.float8_e4m3fn)
  return torch.from_dlpack(x)


def cublas_operands(torch: Any, shape: shapes.Gemm, operands: tuple) -> tuple:
  """Operands of the kernels as `scaled_mm` wants them.

  cuBLASLt fixes the layout of scales and checks little: a row's scales [M, K/128] lie with M
  contiguous, as the kernels' do; a block's, [K/128, N/128], with K/128 contiguous and padded to a
  multiple of 4. Unpadded ones give wrong numbers without a word (pytorch 166752).
  """
  a_MK, a_scales_kM, b_NK, b_scales = operands[:4]
  if shape.kind == "dense":
    b_scales = jnp.pad(b_scales, ((0, 0), (0, -b_scales.shape[1] % 4)))
  a, a_scales, b, scales = (to_torch(torch, x) for x in (a_MK, a_scales_kM, b_NK, b_scales))
  return a, b.t(), a_scales.t(), scales.t()


def cublas(torch: Any, shape: shapes.Gemm) -> Callable:
  """cuBLASLt's product of `cublas_operands`."""
  functional = importlib.import_module("torch.nn.functional")
  kinds = functional.ScalingType
  b_kind = kinds.BlockWise128x128 if shape.kind == "dense" else kinds.BlockWise1x128
  out = torch.bfloat16 if shape.kind == "dense" else torch.float32

  def run(a, b, a_scales, b_scales):
    return functional.scaled_mm(a, b, a_scales, kinds.BlockWise1x128, b_scales, b_kind,
                                output_dtype=out)

  return run


def measure_torch(torch: Any, operation: Callable, sets: Sequence[tuple], repetitions: int = 8
                  ) -> Time:
  """`timing.measure` for torch: kernel durations too, by its profiler, which also asks CUPTI."""
  for args in sets:
    operation(*args)
  torch.cuda.synchronize()
  found = []
  kind = torch.profiler.ProfilerActivity.CUDA
  for _ in range(3):
    with torch.profiler.profile(activities=[kind]) as profile:
      for _ in range(repetitions):
        for args in sets:
          operation(*args)
      torch.cuda.synchronize()
    found.append(sum(e.self_device_time_total for e in profile.key_averages())
                 / repetitions / len(sets))
  found.sort()
  if found[0] > 0:
    return Time(found[1], found[0], "cupti")
  start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
  start.record()
  for _ in range(repetitions):
    for args in sets:
      operation(*args)
  stop.record()
  stop.synchronize()
  ms = start.elapsed_time(stop)
  return Time(ms * 1e3 / repetitions / len(sets), ms * 1e3 / repetitions / len(sets), "events")
