"""The FP8 GEMM kernel: one body for dense, grouped and masked products and both weight gradients.

    out[m, n] = sum over blocks kb of 128:  sa[kb, m] * sb * sum over k in kb of a[m, k] * b[n, k]

A persistent grid walks over output tiles. In a thread block one warpgroup only issues asynchronous
copies into a ring of stages and one or two compute; the ring runs on across tiles, so the next
tile's operands arrive while the last products of this one are summed.

Promotion. A tensor core multiplies e4m3 codes and adds in about 14 bits, so after `interval` values
(a stage of the ring) the partial sum is multiplied by its scales and added to fp32 registers. The
two warpgroups take turns: while one promotes, the other keeps the tensor core busy.

Epilogue. With few steps of k a tile's end costs as much as its products: 32768x512 has four. So a
finished tile stays in registers, and goes to shared memory while the next tile's first product
is on the tensor core (`GemmConfig.overlap`). A copy then takes it to memory under the rest of
that tile, and is awaited only when the staging is needed again.

Clusters. Two blocks side by side read the same rows of A (cluster "n") or B (cluster "m"): each
copies half and sends it to both.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic import compat
from pallas_kernels.mosaic.config import BLOCK, GemmConfig, one_d, ring, store_columns
from pallas_kernels.mosaic.schedule import Spot, schedule

WAVE = 64  # rows of one tensor-core instruction


def run(kind: str, config: GemmConfig, a: jax.Array, a_scales: jax.Array, b: jax.Array,
        b_scales: jax.Array, *, columns: int, out: jax.ShapeDtypeStruct, tables: tuple = (),
        addend: jax.Array | None = None, groups: int = 1, interval: int = BLOCK,
        num_sms: int = 132, interpret: compat.Interpret = False) -> jax.Array:
  """Calls the kernel; shapes already suit it (see `gemm`).

  Args:
    a: e4m3 [M, K]; a_scales: fp32 [K/128, M], of masked [groups * K/128, M/groups].
    b: e4m3 [groups * columns, K], rows of one group after another.
    b_scales: fp32, blocks [groups * ceil(N/128), K/128], for weight gradients rows [K/128, N].
    columns: N of one group.
    out: of the result: [M, columns], or [groups, M, columns] of grouped_wgrad.
    tables: see `schedule.schedule`.
    addend: fp32 like `out`, added to the result (wgrad, grouped_wgrad).
  """
  rows, K = a.shape
  steps, tm, tn = K // BLOCK, config.tile_m, config.tile_n
  parts, stages = BLOCK // interval, ring(config, kind, out.dtype, interval)
  wgs, waves = config.warpgroups, config.rows // WAVE
  wave_rows = WAVE * wgs
  vector = one_d(kind)  # B has a scale a row, not a block
  sub = tn if vector else math.gcd(tn, BLOCK)  # columns that surely share a scale
  subs = tn // sub
  cluster_m, cluster_n = (2 if config.cluster == axis else 1 for axis in "mn")
  cluster = cluster_m * cluster_n
  several, padded = kind == "grouped_wgrad", kind not in ("dense", "wgrad")
  scale_rows = 0 if vector else b_scales.shape[0] // groups
  layout = plgpu.Layout.WGMMA
  block = lambda k: lax.div(k, jnp.int32(parts)) if parts > 1 else k  # of a stage's scales
  collective = lambda axis: (
      dict(collective_axes="cluster") if config.cluster == axis else {})

  def body(a_g, a_scales_g, b_g, b_scales_g, *rest):
    tables_g, out_g = rest[:len(tables)], rest[-1]
    addend_g = rest[len(tables)] if addend is not None else None
    plan = schedule(kind, config, rows, columns, steps, groups, tables_g, scale_rows)
    (m_tiles, n_tiles) = plan.size
    m_pairs = m_tiles if cluster_m == 1 else -(-m_tiles // cluster_m)
    n_pairs = -(-n_tiles // cluster_n)

    def locate(index) -> Spot:
      mi, ni = plgpu.planar_snake(index[-1], (m_pairs, n_pairs), config.raster_minor,
                                  config.raster_width)
      if cluster > 1:
        member = lax.axis_index("cluster")
        mi, ni = (mi * 2 + member, ni) if cluster_m > 1 else (mi, ni * 2 + member)
      return plan.spot(mi, ni, index[0])

    def each_tile(init):
      grid = (groups, m_pairs * n_pairs) if several else (m_pairs * n_pairs,)
      return plgpu.nd_loop(grid, collective_axes="sm", init_carry=init)

    def scope(a_s, b_s, a_scales_s, out_s, full, empty, full_2=None, b_scales_s=None, added=None):
      wg = lax.axis_index("wg")

      # --- copies in ---------------------------------------------------------------------------

      @pl.when(wg == wgs)
      def _producer():
        if wgs > 1:
          plgpu.set_max_registers(config.registers, action="decrease")

        @each_tile(jnp.int32(0))
        def total(info, carry):
          spot = locate(info.index)

          def load(k, step):
            slot = lax.rem(step, jnp.int32(stages))
            pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
            window = pl.ds(k * interval, interval)
            arrived = full.at[slot]
            plgpu.copy_gmem_to_smem(a_g.at[pl.ds(spot.row, wave_rows), window],
                                    a_s.at[slot, pl.ds(0, wave_rows)], arrived, **collective("n"))
            base, first_row = spot.a_scale or (0, spot.row)
            plgpu.copy_gmem_to_smem(a_scales_g.at[base + block(k), pl.ds(first_row, tm)],
                                    a_scales_s.at[slot], arrived, **collective("n"))

            def load_b(**how):
              plgpu.copy_gmem_to_smem(b_g.at[pl.ds(spot.b_row, tn), window], b_s.at[slot], arrived,
                                      **how)

            if config.cluster == "m" and kind == "grouped":
              pl.when(spot.shared)(lambda: load_b(**collective("m")))
              pl.when(jnp.logical_not(spot.shared))(load_b)
            else:
              load_b(**collective("m"))
            if vector:
              plgpu.copy_gmem_to_smem(b_scales_g.at[block(k), pl.ds(spot.column, tn)],
                                      b_scales_s.at[slot], arrived, **collective("m"))
            if waves > 1:
              plgpu.copy_gmem_to_smem(a_g.at[pl.ds(spot.row + wave_rows, wave_rows), window],
                                      a_s.at[slot, pl.ds(wave_rows, wave_rows)], full_2.at[slot],
                                      **collective("n"))
            return step + 1

          return lax.fori_loop(spot.first * parts, spot.last * parts, load, carry)

        # A block may not end while its cluster still reads from it or arrives at its barriers.
        @pl.loop(jnp.maximum(total - stages, 0), total)
        def _drain(step):
          plgpu.barrier_wait(empty.at[lax.rem(step, jnp.int32(stages))])

      # --- products ----------------------------------------------------------------------------

      @pl.when(wg < wgs)
      def _consumer():
        if wgs > 1:
          plgpu.set_max_registers((512 - config.registers) // wgs // 8 * 8, action="increase")
        rows_of = lambda wave: pl.ds(wave * wave_rows + wg * WAVE, WAVE)

        def product(spot, k, step, sums, meanwhile=None):
          """Adds one stage; gives it back as soon as it has been read."""
          slot = lax.rem(step, jnp.int32(stages))
          if not vector:
            b_scale = [b_scales_g[spot.scale_row + jnp.minimum(
                lax.div(spot.column + j * sub, jnp.int32(BLOCK)), scale_rows - 1), block(k)]
                       for j in range(subs)]
          plgpu.barrier_wait(full.at[slot])
          if vector:
            b_scale = compat.load(b_scales_s.at[slot], (slice(None),), layout.reduce(0), interpret)
          sums = list(sums)
          for wave in range(waves):
            if wave:  # arrives by itself, which also keeps the compiler from running two at once
              plgpu.barrier_wait(full_2.at[slot])
            a_scale = compat.load(a_scales_s.at[slot], (rows_of(wave),), layout.reduce(1),
                                  interpret)
            part = compat.matmul_nt(a_s.at[slot, rows_of(wave)], b_s.at[slot], interpret,
                                    None if wave else meanwhile)
            if wave == waves - 1:
              compat.release(empty.at[slot], interpret, config.fence)
            for j in range(subs):
              x = part[:, j * sub:(j + 1) * sub] if subs > 1 else part
              if vector:
                x = x * lax.broadcast_in_dim(a_scale, x.shape, [0])
                x = x * lax.broadcast_in_dim(b_scale, x.shape, [1])
              else:
                x = x * lax.broadcast_in_dim(a_scale * b_scale[j], x.shape, [0])
              at = wave * subs + j
              sums[at] = x if sums[at] is None else sums[at] + x
          return sums

        def window(ref, spot, wave):
          at = (pl.ds(spot.row + wave * wave_rows + wg * WAVE, WAVE), pl.ds(spot.column, tn))
          return ref.at[(spot.group, *at) if several else at]

        def fetch(spot):
          """Starts the copy of what is to be added into the staging."""
          plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          for wave in range(waves):
            plgpu.copy_gmem_to_smem(window(addend_g, spot, wave), out_s.at[wg, wave], added.at[wg])

        def store(spot, values):
          """Registers to staging, and the copy of that to memory started."""
          if addend is None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
          else:
            plgpu.barrier_wait(added.at[wg])
          for wave in range(waves):
            for j in range(subs):
              x, at = values[wave * subs + j], (wg, wave, slice(None), pl.ds(j * sub, sub))
              out_s[at] = x if addend is None else x + compat.load(out_s, at, layout, interpret)
          plgpu.commit_smem()
          for wave in range(waves):
            plgpu.copy_smem_to_gmem(out_s.at[wg, wave], window(out_g, spot, wave))

        def compute(spot, step, meanwhile):
          """The tile's values, as they are stored, and the ring's next step."""
          first = spot.first * parts
          sums = product(spot, first, step, [None] * (waves * subs), meanwhile)
          step, sums = lax.fori_loop(
              first + 1, spot.last * parts,
              lambda k, c: (c[0] + 1, tuple(product(spot, k, c[0], c[1]))),
              (step + 1, tuple(sums)))
          if padded:
            keep = lax.broadcast_in_dim(spot.keep, (WAVE, sub), ())
            sums = [lax.select(keep, x, jnp.zeros_like(x)) for x in sums]
          return step, tuple(x.astype(out.dtype) for x in sums)

        if config.overlap and addend is None:
          zeros = tuple(compat.layout_cast(jnp.zeros((WAVE, sub), out.dtype), layout, interpret)
                        for _ in range(waves * subs))
          none = (jnp.int32(0),) * 4

          def flush(before, values):
            exists, group, row, column = before
            spot = Spot(pl.multiple_of(row, WAVE), pl.multiple_of(column, tn), group)
            pl.when(exists > 0)(lambda: store(spot, values))

          @each_tile((jnp.int32(0), none, zeros))
          def last(info, carry):
            step, before, values = carry
            spot = locate(info.index)
            step, values = compute(spot, step, lambda: flush(before, values))
            at = tuple(jnp.int32(x) for x in (1, spot.group, spot.row, spot.column))
            return step, at, values

          flush(*last[1:])
        else:
          @each_tile(jnp.int32(0))
          def _tile(info, carry):
            spot = locate(info.index)
            step, values = compute(spot, carry, None if addend is None else lambda: fetch(spot))
            store(spot, values)
            return step
        plgpu.wait_smem_to_gmem(0)

    operands = compat.transforms(a.dtype, interval)
    staging = compat.transforms(out.dtype, store_columns(tn, columns, out.dtype))
    more = {}
    if vector:
      more["b_scales_s"] = plgpu.SMEM((stages, tn), jnp.float32)
    if waves > 1:
      more["full_2"] = plgpu.Barrier(num_barriers=stages)
    if addend is not None:
      more["added"] = plgpu.Barrier(num_arrivals=waves, num_barriers=wgs)
    arrivals = dict(num_arrivals=wgs, num_barriers=stages)
    pl.run_scoped(
        scope,
        a_s=plgpu.SMEM((stages, tm, interval), a.dtype, transforms=operands),
        b_s=plgpu.SMEM((stages, tn, interval), b.dtype, transforms=operands),
        a_scales_s=plgpu.SMEM((stages, tm), jnp.float32),
        out_s=plgpu.SMEM((wgs, waves, WAVE, tn), out.dtype, transforms=staging),
        full=plgpu.Barrier(num_arrivals=4 if vector else 3, num_barriers=stages),
        empty=(plgpu.ClusterBarrier(collective_axes=("cluster",), **arrivals) if cluster > 1
               else plgpu.Barrier(**arrivals)),
        collective_axes="wg", **more)

  mesh = dict(cluster=(cluster,), cluster_names=("cluster",)) if cluster > 1 else {}
  call = compat.kernel(body, interpret=interpret, reduction_scratch_bytes=0, out_type=out,
                       grid=(max(num_sms // cluster, 1),), grid_names=("sm",),
                       num_threads=wgs + 1, thread_name="wg", **mesh)
  return call(a, a_scales, b, b_scales, *tables, *([] if addend is None else [addend]))
