"""A persistent loop over the tiles of matrices, for kernels that quantize at memory bandwidth.

    load (TMA, `stages` tiles ahead) --> shared memory --> compute --> shared memory --> store (TMA)

Each CTA is one warpgroup; several share an SM, so that one computes while another waits. CTA c of C
takes the tiles c, c + C, ... The order is a snake through strips of eight rows of tiles: what runs
at one time is a few hundred tiles that lie together both in the arrays and in their transposes.

Results leave a warpgroup in pieces of 64 x 128 codes and 64 scales, whatever the size of a tile:
there is little shared memory for them beside what loads need.

Tiles at an array's edge are cut by the copies themselves: what lies outside is read as zero and not
written.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import compat

STRIP = 8
PIECE = 64, 128
E4M3 = jnp.float8_e4m3fn


class Window(NamedTuple):
  """What tile (i, j) is of an array: `array[at(i, j)]`, of shape `block`."""

  block: tuple[int, ...]
  at: Callable[..., tuple]


def matrix(rows: int, columns: int) -> Window:
  """Of a matrix."""
  return Window((rows, columns), lambda i, j: (pl.ds(i * rows, rows), pl.ds(j * columns, columns)))


def _buffers(array: jax.Array, window: Window, count: int):
  """Shared memory for `count` tiles; its tiling divides the array's rows, as copies need."""
  if len(window.block) == 1:
    return plgpu.SMEM((count, *window.block), array.dtype)
  minor = math.gcd(window.block[-1], array.shape[-1])
  return plgpu.SMEM((count, *window.block), array.dtype,
                    transforms=compat.transforms(array.dtype, minor))


def stream(compute: Callable, tiles: tuple[int, int], ins: Sequence[tuple[jax.Array, Window]],
           outs: Sequence[jax.ShapeDtypeStruct], *, puts: int, num_ctas: int, stages: int = 2,
           buffers: int = 2, vectors: int = 1, scratch: Sequence = (), reduction: int = 0,
           interpret: compat.Interpret = False, **kwargs) -> list[jax.Array]:
  """Runs `compute(tile, ins, outs, scratch, put)` on every tile.

  `tile` is (i, j); `ins` are tiles in shared memory, `outs` whole arrays. `put((part, value), ...)`
  sends values from registers to parts of arrays: at most one e4m3 [64, 128] and `vectors` fp32
  [64]. It is called `puts` times, the last time after all reads.

  Args:
    compute: see above.
    tiles: rows and columns of tiles.
    ins: arrays, and what a tile is of each.
    outs: what results look like.
    puts: calls of `put` a tile.
    num_ctas: CTAs of 128 threads.
    stages: tiles on their way into a CTA's shared memory.
    buffers: pieces on their way out.
    vectors: see above.
    scratch: more shared memory.
    reduction: bytes of it for reductions over all warps.
    interpret: see `compat`.
    **kwargs: of `compat.kernel`.
  """
  count = tiles[0] * tiles[1]
  num_ctas = min(num_ctas, count)
  rows = [x.shape[-1] for x in outs if x.dtype == E4M3]
  codes = plgpu.SMEM((buffers, *PIECE), E4M3,
                     transforms=compat.transforms(E4M3, math.gcd(PIECE[1], *rows)))

  def body(*refs):
    in_gmem, out_gmem = refs[:len(ins)], refs[len(ins):]

    def scope(in_smem, codes_smem, vector_smem, scratch_smem, full):

      def position(index):
        return plgpu.planar_snake(index, tiles, 0, STRIP)

      def fetch(index, slot):
        where = position(index)
        for (_, window), gmem, smem in zip(ins, in_gmem, in_smem, strict=True):
          plgpu.copy_gmem_to_smem(gmem.at[window.at(*where)], smem.at[slot], full.at[slot])

      first = lax.axis_index("cta")
      for slot in range(stages):
        index = first + slot * num_ctas
        pl.when(index < count)(functools.partial(fetch, index, slot))

      @plgpu.nd_loop((count,), collective_axes="cta")
      def _(info):
        index, = info.index
        slot = lax.rem(info.local_index, jnp.int32(stages))
        called = itertools.count()

        def put(*pairs):
          piece = info.local_index * puts + next(called)
          buffer = lax.rem(piece, jnp.int32(buffers))
          free = iter(vector_smem)
          plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
          smem = [(codes_smem if value.ndim == 2 else next(free)).at[buffer] for _, value in pairs]
          for ref, (_, value) in zip(smem, pairs, strict=True):
            ref[...] = value
          plgpu.commit_smem()
          for k, (ref, (part, _)) in enumerate(zip(smem, pairs, strict=True), 1):
            plgpu.copy_smem_to_gmem(ref, part, commit_group=k == len(pairs))

        plgpu.barrier_wait(full.at[slot])
        compute(position(index), [smem.at[slot] for smem in in_smem], out_gmem, scratch_smem, put)
        assert next(called) == puts
        ahead = index + stages * num_ctas
        pl.when(ahead < count)(lambda: fetch(ahead, slot))

      plgpu.wait_smem_to_gmem(0)

    pl.run_scoped(
        scope, in_smem=[_buffers(x, w, stages) for x, w in ins], codes_smem=codes,
        vector_smem=[plgpu.SMEM((buffers, PIECE[0]), jnp.float32)] * vectors,
        scratch_smem=list(scratch), full=plgpu.Barrier(num_arrivals=len(ins), num_barriers=stages))

  call = compat.kernel(body, out_type=list(outs), grid=(num_ctas,), grid_names=("cta",),
                       interpret=interpret, reduction_scratch_bytes=reduction, **kwargs)
  return call(*(x for x, _ in ins))
