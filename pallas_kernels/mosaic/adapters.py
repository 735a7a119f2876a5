"""Operands as `dsv3_jax.ops` knows them, brought to the Hopper kernels, and who may call those.

Kernels want both operands of a matmul with the summed axis contiguous, and scales with the summed
axis first. Here is where axes turn. A transpose of an array that was just transposed costs nothing,
for XLA cancels the two; a weight comes with its other form (`turned`) for the same reason.

Every function raises NotImplementedError where another implementation has to take the call: not on
a Hopper GPU, other formats or tiles than the kernels know. Only `impl="pallas"` on a CPU runs them
in the interpreter, which shows that they are right and takes its time. Kernels are imported where
they are called: Mosaic takes a third of a second that other platforms need not spend.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.scaled import Scaled

BLOCK = 128  # rows of a block of grouped operands
TILE = 128


@functools.cache
def on_hopper() -> bool:
  """Whether the default device is a GPU of compute capability 9.0."""
  if jax.default_backend() != "gpu":
    return False
  return str(getattr(jax.devices()[0], "compute_capability", "")) == "9.0"


def _how(impl: str) -> dict:
  """Arguments that tell a kernel where it runs."""
  if on_hopper():
    return dict(num_sms=jax.devices()[0].core_count, interpret=False)
  if impl == "pallas" and jax.default_backend() == "cpu":
    from pallas_kernels.mosaic import compat
    return dict(num_sms=2, interpret=compat.InterpretParams())
  raise NotImplementedError("kernels need a Hopper GPU (compute capability 9.0)")


def _need(x: Scaled, tile: tuple[int, int], what: str) -> None:
  if x.scales is None or x.codes.dtype != jnp.float8_e4m3fn:
    raise NotImplementedError(f"{what} is {x.codes.dtype}, not quantized to e4m3")
  if x.tile != tile:
    raise NotImplementedError(f"{what} has tiles {x.tile}, not {tile}")


def _config(kind: str, M: int, N: int, K: int, G: int = 1, dtype=jnp.float32):
  """The device's measured configuration; elsewhere what its model likes and can be interpreted."""
  from pallas_kernels.mosaic import compat, config, tables
  if on_hopper():
    return tables.lookup(jax.devices()[0].device_kind, kind, M, N, K, G, dtype)
  found = config.heuristic(kind, M, N, K, G, dtype)
  return found if compat.CLUSTERS else dataclasses.replace(found, cluster=None)


def _interval(interval: int) -> int:
  if interval not in (32, 64, 128):
    raise NotImplementedError(f"promotion every {interval} values; kernels have 32, 64 and 128")
  return interval


def _columns(M: int, codes_KM: jax.Array, scales_mK: jax.Array) -> Scaled:
  """What kernels made in tiles of 128x1, which end with whole tiles."""
  return Scaled(codes_KM[:, :M].T, scales_mK, (TILE, 1))


# --- quantizers ---------------------------------------------------------------------------------


def quantize(x: jax.Array, tile: tuple[int, int], pow2: bool, floor: float, impl: str) -> Scaled:
  """[..., m, n] in tiles 1x128 or 128x1."""
  how = _how(impl)
  from pallas_kernels.mosaic import quantize as kernels
  if x.ndim != 2:
    raise NotImplementedError(f"an array of {x.ndim} axes, not a matrix")
  if tile == (1, TILE):
    codes_MK, scales_kM = kernels.rows(x, pow2=pow2, floor=floor, **how)
    return Scaled(codes_MK, scales_kM.T, tile)
  if tile == (TILE, 1):
    return _columns(x.shape[0], *kernels.columns(x, pow2=pow2, floor=floor, **how))
  raise NotImplementedError(f"tiles {tile}; those of 1x128 and 128x1 have kernels")


def quantize_both(x_MK: jax.Array, pow2: bool, floor: float, impl: str) -> tuple[Scaled, Scaled]:
  """Tiles of 1x128 and of 128x1 from one read."""
  how = _how(impl)
  from pallas_kernels.mosaic import quantize as kernels
  (codes_MK, scales_kM), columns = kernels.both(x_MK, pow2=pow2, floor=floor, **how)
  return Scaled(codes_MK, scales_kM.T, (1, TILE)), _columns(x_MK.shape[0], *columns)


def quantize_weight(w: jax.Array, pow2: bool, floor: float, impl: str) -> tuple[Scaled, Scaled]:
  """[..., K, N] in blocks of 128x128, and its transpose [..., N, K]."""
  how = _how(impl)
  from pallas_kernels.mosaic import quantize as kernels
  lead = w.shape[:-2]
  found = kernels.blocks(w.reshape(-1, *w.shape[-2:]), pow2=pow2, floor=floor, **how)
  codes_NK, codes_KN, scales_nk = (z.reshape(*lead, *z.shape[1:]) for z in found)
  tile = (TILE, TILE)
  return Scaled(codes_KN, scales_nk.mT, tile), Scaled(codes_NK, scales_nk, tile)


def turn(x: Scaled, pow2: bool, floor: float, impl: str) -> Scaled:
  """Tiles of 1x128 read back and quantized again in tiles of 128x1."""
  how = _how(impl)
  from pallas_kernels.mosaic import quantize as kernels
  _need(x, (1, TILE), "the operand")
  return _columns(x.codes.shape[0],
                  *kernels.turn(x.codes, x.scales.T, pow2=pow2, floor=floor, **how))


def swiglu(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array | None, pow2: bool,
           floor: float, impl: str) -> Scaled:
  """`weight * silu(gate) * up` in tiles of 1x128."""
  how = _how(impl)
  from pallas_kernels.mosaic import swiglu as kernels
  codes_MF, scales_fM = kernels.swiglu_rows(gate_MF, up_MF, weight_M, pow2=pow2, floor=floor, **how)
  return Scaled(codes_MF, scales_fM.T, (1, TILE))


def swiglu_backward(gate_MF: Scaled, up_MF: Scaled, dh_MF: jax.Array, weight_M: jax.Array | None,
                    pow2: bool, floor: float, gradient_floor: float, impl: str):
  """(dgate, dgate for Wgrad), (dup, dup for Wgrad), h for Wgrad, dweight."""
  how = _how(impl)
  from pallas_kernels.mosaic import swiglu as kernels
  for name, x in (("gate", gate_MF), ("up", up_MF)):
    _need(x, (1, TILE), name)
  dgate, dup, h, dweight_M = kernels.swiglu_backward(
      *((x.codes, x.scales.T) for x in (gate_MF, up_MF)), dh_MF, weight_M, pow2=pow2, floor=floor,
      gradient_floor=gradient_floor, **how)

  def rows(x):
    return Scaled(x[0], x[1].T, (1, TILE))

  M = dh_MF.shape[0]
  return *((rows(a), _columns(M, *b)) for a, b in (dgate, dup)), _columns(M, *h), dweight_M


# --- matmuls ------------------------------------------------------------------------------------


def gemm(a_MK: Scaled, b_KN: Scaled, turned_NK: Scaled | None, dtype, interval: int, impl: str
         ) -> jax.Array:
  """`a @ b`."""
  how = _how(impl)
  from pallas_kernels.mosaic import gemm as kernels
  _need(a_MK, (1, TILE), "the first operand")
  _need(b_KN, (TILE, TILE), "the second operand")
  b_NK, s_nk = ((b_KN.codes.T, b_KN.scales.T) if turned_NK is None else
                (turned_NK.codes, turned_NK.scales))
  config = _config("dense", *a_MK.codes.shape[:1], *b_NK.shape, dtype=dtype)
  return kernels.gemm(a_MK.codes, a_MK.scales.T, b_NK, s_nk, out_dtype=dtype, config=config,
                      interval=_interval(interval), **how)


def wgrad(x_MK: Scaled, dy_MN: Scaled, interval: int, impl: str) -> jax.Array:
  """`x^T dy`, fp32 [K, N]."""
  how = _how(impl)
  from pallas_kernels.mosaic import gemm as kernels
  _need(x_MK, (TILE, 1), "the input")
  _need(dy_MN, (TILE, 1), "the gradient")
  T, K = x_MK.codes.shape
  config = _config("wgrad", K, dy_MN.codes.shape[1], T)
  return kernels.wgrad(x_MK.codes.T, x_MK.scales, dy_MN.codes.T, dy_MN.scales, config=config,
                       interval=_interval(interval), **how)


def grouped_gemm(x_MK: Scaled, w_GKN: Scaled, turned_GNK: Scaled | None, group_m: jax.Array,
                 used: jax.Array, dtype, interval: int, impl: str) -> jax.Array:
  """`y[block] = x[block] @ w[group of block]`, zeros beyond the used blocks."""
  how = _how(impl)
  from pallas_kernels.mosaic import gemm as kernels
  _need(x_MK, (1, TILE), "the first operand")
  _need(w_GKN, (TILE, TILE), "the weights")
  _blocks(x_MK, group_m)
  w_GNK, s_Gnk = ((w_GKN.codes.mT, w_GKN.scales.mT) if turned_GNK is None else
                  (turned_GNK.codes, turned_GNK.scales))
  G, N, K = w_GNK.shape
  config = _config("grouped", x_MK.codes.shape[0], N, K, G, dtype)
  return kernels.grouped_gemm(x_MK.codes, x_MK.scales.T, w_GNK, s_Gnk, group_m, used,
                              out_dtype=dtype, config=config, interval=_interval(interval), **how)


def grouped_wgrad(x_MK: Scaled, dy_MN: Scaled, group_m: jax.Array, used: jax.Array, groups: int,
                  interval: int, impl: str) -> jax.Array:
  """`dw[g]`: the sum over the blocks of g of `x^T dy`, fp32 [G, K, N]."""
  how = _how(impl)
  from pallas_kernels.mosaic import gemm as kernels
  _need(x_MK, (TILE, 1), "the input")
  _need(dy_MN, (TILE, 1), "the gradient")
  _blocks(x_MK, group_m)
  # Blocks lie sorted by group: each group is a range of them.
  group_m = jnp.where(jnp.arange(group_m.shape[0]) < used, group_m, groups)
  edges = jnp.searchsorted(group_m, jnp.arange(groups + 1)).astype(jnp.int32)
  bounds_G2 = jnp.stack([edges[:-1], edges[1:]], axis=1)
  T, K = x_MK.codes.shape
  config = _config("grouped_wgrad", K, dy_MN.codes.shape[1], T, groups)
  return kernels.grouped_wgrad(x_MK.codes.T, x_MK.scales, dy_MN.codes.T, dy_MN.scales, bounds_G2,
                               config=config, interval=_interval(interval), **how)


def _blocks(x_MK: Scaled, group_m: jax.Array) -> None:
  if x_MK.codes.shape[0] != BLOCK * group_m.shape[0]:
    raise NotImplementedError(f"{x_MK.codes.shape[0]} rows in {group_m.shape[0]} blocks; kernels "
                              f"take blocks of {BLOCK}")


# --- attention ----------------------------------------------------------------------------------


def mla_decode(*args, impl: str, **kwargs):
  """See `pallas_kernels.reference.mla_decode`."""
  how = _how(impl)
  from pallas_kernels.mosaic import mla_decode as kernels
  return kernels.mla_decode(*args, **kwargs, **how)
