"""Every difference between the jax releases that the kernels meet (0.10.2 and 0.11), in one place.

Kernels take `interpret`: False for the device (also to lower and compile without one), True for the
interpreter with race detection, or interpreter parameters of one's own. jax 0.10.2's interpreter
lacks several primitives; the functions below say the same with those that it has. It has no cluster
barriers and no copies that reach over an array's edge either: `CLUSTERS` and `TAILS` tell tests.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import vma

try:
  InterpretParams = plgpu.InterpretGPUParams
except AttributeError:  # jax 0.10.2
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams as InterpretParams

NEW = jax.version.__version_info__[:2] >= (0, 11)
CLUSTERS = NEW  # whether the interpreter has cluster barriers
TAILS = NEW  # whether its copies clip at an array's edge, as the hardware does

Interpret = bool | InterpretParams


def kernel(body, *, interpret: Interpret = False, reduction_scratch_bytes: int | None = None,
           approx_math: bool = False, **kwargs):
  """`plgpu.kernel` with this package's compiler parameters; see there for `kwargs`."""
  more = {} if reduction_scratch_bytes is None else dict(
      reduction_scratch_bytes=reduction_scratch_bytes)
  params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
                                approx_math=approx_math, **more)
  if interpret:
    kwargs["interpret"] = InterpretParams(detect_races=True) if interpret is True else interpret
  call = plgpu.kernel(body, compiler_params=params, **kwargs)

  def run(*operands):
    # Under shard_map results vary over the mesh axes that operands do, which pallas does not see.
    return jax.tree.map(lambda y: vma.match(y, *operands), call(*operands))

  return run


def transforms(dtype, minor: int) -> tuple:
  """Tiling and swizzle of a shared-memory array whose last axis has `minor` elements."""
  bits = jnp.dtype(dtype).itemsize * 8
  swizzle = plgpu.find_swizzle(minor * bits)
  return plgpu.TilingTransform((8, swizzle * 8 // bits)), plgpu.SwizzleTransform(swizzle)


def layout_cast(x: jax.Array, layout, interpret: Interpret) -> jax.Array:
  """`x` in registers of another layout."""
  return x if interpret and not NEW else plgpu.layout_cast(x, layout)


def load(ref, index: tuple, layout, interpret: Interpret, *, optimized: bool = True) -> jax.Array:
  """Reads shared memory into registers of a given layout."""
  if interpret and not NEW:
    return ref[index]
  if NEW:
    return plgpu.load(ref.at[index], layout=layout, optimized=optimized)
  return plgpu.load(ref, index, layout=layout, optimized=optimized)


def matmul_nt(a_ref, b_ref, interpret: Interpret, meanwhile: Callable[[], None] | None = None
              ) -> jax.Array:
  """`a @ b^T` of two shared-memory arrays, fp32 from zero; waits for the tensor core.

  `meanwhile()` runs between its start and the wait.
  """
  meanwhile = meanwhile or (lambda: None)
  if interpret and not NEW:  # no transposed reference inside its wgmma
    meanwhile()
    return lax.dot_general(a_ref[...], b_ref[...], (((1,), (1,)), ((), ())),
                           preferred_element_type=jnp.float32)

  def multiply(accumulator):
    plgpu.wgmma(accumulator, a_ref, b_ref.T)
    meanwhile()
    return accumulator[...]

  return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))


def release(barrier, interpret: Interpret, fence: bool = False) -> None:
  """Hands a stage of the ring back to the producer of asynchronous copies.

  The memory model asks for a proxy fence between ordinary reads of the stage and the copy that
  overwrites it, and the race detector insists. On the device the barrier's own latency orders
  them, as other Hopper kernels rely on; `fence` adds the fence there too.
  """
  if fence or interpret:
    plgpu.commit_smem()
  plgpu.barrier_arrive(barrier)


def matmuls_nt(pairs: list, interpret: Interpret) -> jax.Array:
  """The sum of `a @ b^T` over pairs of shared-memory arrays; see `matmul_nt`."""
  if interpret and not NEW:
    return sum(matmul_nt(a_ref, b_ref, interpret) for a_ref, b_ref in pairs)

  def multiply(accumulator):
    for a_ref, b_ref in pairs:
      plgpu.wgmma(accumulator, a_ref, b_ref.T)
    return accumulator[...]

  shape = (pairs[0][0].shape[0], pairs[0][1].shape[0])
  return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def accumulate_tn(accumulator: jax.Array, a_ref, b_ref, interpret: Interpret) -> jax.Array:
  """`accumulator + a^T @ b`, fp32, of an accumulator in registers; waits for the tensor core."""
  if interpret:  # no accumulator there that starts from a value
    return accumulator + lax.dot_general(a_ref[...], b_ref[...], (((0,), (0,)), ((), ())),
                                         preferred_element_type=jnp.float32)
  return pl.run_state(lambda acc: plgpu.wgmma(acc, a_ref.T, b_ref))(plgpu.ACC.init(accumulator))


def store_transposed(ref, x: jax.Array, interpret: Interpret) -> None:
  """Writes `x^T`, of a 16-bit `x` in the tensor core's layout, to shared memory."""
  if interpret:
    ref[...] = x.T
  else:
    ref.T[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def iota(shape: tuple[int, ...], axis: int, layout, interpret: Interpret) -> jax.Array:
  """int32 positions along an axis, in registers of a given layout."""
  if interpret:
    return lax.broadcasted_iota(jnp.int32, shape, axis)
  return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=layout)
