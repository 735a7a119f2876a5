"""MLA decode for Hopper: split-KV attention of 64 query rows a block over the paged latent cache.

Query tokens and heads make the rows of one matrix (all heads share keys and values). A thread block
takes 64 rows of one sequence and one split of its pages, in three warpgroups: one brings pages of
64 tokens into a ring in shared memory, two compute. They share each page twice over:

    scores    by tokens: each scores 32 of the 64 tokens, over all 576 numbers
    maximum   exchanged through shared memory (barrier)
    weights   exp2(score - maximum) as bf16, transposed, into shared memory (barrier)
    values    by columns: each accumulates 256 of the 512 output columns in registers

Shared memory is full: 72 KB of queries, two pages of 72 KB, 8 KB of weights. So 8-bit records have
no room to land in, and come through registers: `mla_records`.

Each split writes its normalised output, row maxima and row sums. XLA combines them: one pass over
the partial outputs that fuses with the cast and the reordering, where a kernel has nothing to gain.
With one split the kernel's output is the result.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import latent_cache
from pallas_kernels.mosaic import compat, mla_records
from pallas_kernels.mosaic.mla_records import LATENT, PAGE, ROPE, STAGES, spread

ROWS = 64  # queries of a thread block
COLUMNS = LATENT // 2  # of the output, a warpgroup
_FLOOR = -1e30  # below any score, and finite: a row that sees no token has exp2(-inf - _FLOOR) = 0
# Registers a thread of the producing and the computing warpgroups; 504 in all are there to divide.
_REGISTERS, _RECORD_REGISTERS = (40, 232), (88, 208)
_WGMMA = plgpu.Layout.WGMMA


def choose_splits(sequences: int, row_blocks: int, pages: int, num_sms: int) -> int:
  """Number of splits a sequence whose lengths need up to `pages` pages.

  Estimates time in pages read one after the other: waves of thread blocks, each with a fixed cost
  of starting and ending of about five pages, and three more to write a partial output and combine.
  """
  blocks = sequences * row_blocks

  def cost(splits):
    waves = -(-blocks * splits // num_sms)
    return waves * (-(-pages // splits) + 5 + (3 if splits > 1 else 0))

  return min(range(1, min(pages, max(1, num_sms)) + 1), key=cost)


def _kernel(q_g, cache_g, pages_g, lengths_g, o_g, stats_g, *, scale, heads, tokens, splits,
            records, interpret, q_s, q_rope_s, k_s, p_s, stats_s, q_ready, full, empty, exchanged,
            weighed):
  b, row_block, split = lax.axis_index("b"), lax.axis_index("rows"), lax.axis_index("split")
  wg = lax.axis_index("wg")
  rows = pl.ds(row_block * ROWS, ROWS)
  length = lengths_g[b]
  used = lax.div(length + (PAGE - 1), jnp.int32(PAGE))
  share = lax.div(used + (splits - 1), jnp.int32(splits))
  first = split * share
  last = jnp.minimum(first + share, used)

  def page_of(i):
    return pages_g[b, i]

  @pl.when(wg == 2)
  def _():
    plgpu.set_max_registers((_RECORD_REGISTERS if records else _REGISTERS)[0], action="decrease")
    plgpu.copy_gmem_to_smem(q_g.at[b, rows, pl.ds(0, LATENT)], q_s, q_ready)
    plgpu.copy_gmem_to_smem(q_g.at[b, rows, pl.ds(LATENT, ROPE)], q_rope_s, q_ready)
    if records:
      mla_records.produce(cache_g, page_of, first, last, length, k_s, full, empty, interpret)
    else:
      mla_records.ring(first, last, lambda i, slot, _: plgpu.copy_gmem_to_smem(
          cache_g.at[page_of(i)], k_s.at[slot], full.at[slot]), empty)

  @pl.when(wg < 2)
  def _():
    plgpu.set_max_registers((_RECORD_REGISTERS if records else _REGISTERS)[1], action="increase")
    mine = PAGE // 2  # tokens that this warpgroup scores
    tokens_here = pl.ds(wg * mine, mine)
    columns_here = pl.ds(wg * COLUMNS, COLUMNS)
    token = compat.iota((ROWS, mine), 1, _WGMMA, interpret)
    limit = length
    if tokens > 1:  # earlier tokens see less; padding rows are those of tokens beyond the last
      row = row_block * ROWS + compat.iota((ROWS, mine), 0, _WGMMA, interpret)
      limit = jnp.minimum(length, length - (tokens - 1) + lax.div(row, jnp.full_like(row, heads)))
    plgpu.barrier_wait(q_ready)

    def scores(slot):
      keys = k_s.at[slot, tokens_here]
      return compat.matmuls_nt([(q_s, keys.at[:, pl.ds(0, LATENT)]),
                                (q_rope_s, keys.at[:, pl.ds(LATENT, ROPE)])], interpret)

    def clear(slot, count):
      """Zeros for the page's values from token `count` on: 0 * NaN would be NaN."""
      for chunk in range(COLUMNS // 64):
        columns = pl.ds(wg * COLUMNS + chunk * 64, 64)
        values = compat.load(k_s, (slot, slice(None), columns), _WGMMA, interpret)
        token = compat.iota((PAGE, 64), 0, _WGMMA, interpret)
        k_s[slot, :, columns] = jnp.where(token < count, values, jnp.zeros_like(values))

    def body(i, carry):
      count, o, top, total = carry
      slot = lax.rem(count, jnp.int32(STAGES))
      plgpu.barrier_wait(full.at[slot])
      s = scores(slot) * (scale * math.log2(math.e))
      s = jnp.where(token < limit - (i * PAGE + wg * mine), s, -jnp.inf)
      stats_s[wg, 0] = jnp.max(s, axis=1)
      plgpu.barrier_arrive(exchanged)
      plgpu.barrier_wait(exchanged)

      if not records:  # only after the barrier has the other warpgroup read these tokens as keys
        pl.when(length < (i + 1) * PAGE)(lambda: clear(slot, length - i * PAGE))

      highest = top
      for other in range(2):
        highest = jnp.maximum(
            highest, compat.load(stats_s, (other, 0), _WGMMA.reduce(1), interpret))
      shrink = jnp.exp2(top - highest)
      p = jnp.exp2(s - spread(highest, s.shape))
      total = total * shrink + jnp.sum(p, axis=1)
      compat.store_transposed(p_s.at[tokens_here], p.astype(jnp.bfloat16), interpret)
      plgpu.commit_smem()
      plgpu.barrier_arrive(weighed)
      plgpu.barrier_wait(weighed)
      o = compat.accumulate_tn(o * spread(shrink, o.shape), p_s, k_s.at[slot, :, columns_here],
                               interpret)
      compat.release(empty.at[slot], interpret)
      return count + 1, o, highest, total

    def full_of(value, shape, layout):
      return compat.layout_cast(jnp.full(shape, value, jnp.float32), layout, interpret)

    _, o, top, total = lax.fori_loop(first, last, body, (
        jnp.int32(0), full_of(0, (ROWS, COLUMNS), _WGMMA),
        full_of(_FLOOR, (ROWS,), _WGMMA.reduce(1)), full_of(0, (ROWS,), _WGMMA.reduce(1))))

    stats_s[wg, 1] = total
    plgpu.barrier_arrive(exchanged)
    plgpu.barrier_wait(exchanged)
    total = sum(compat.load(stats_s, (w, 1), _WGMMA.reduce(1), interpret) for w in range(2))
    o = o * spread(1 / jnp.where(total > 0, total, 1.0), o.shape)
    if splits == 1:
      q_s[:, columns_here] = o.astype(jnp.bfloat16)  # the queries have been read
    else:
      o_g[split, b, rows, columns_here] = o

    @pl.when(wg == 0)
    def _():
      stats_s[0, 0] = top

    @pl.when(wg == 1)
    def _():
      stats_s[1, 0] = total

    plgpu.commit_smem()
    if splits == 1:
      plgpu.barrier_arrive(weighed)
      plgpu.barrier_wait(weighed)
      half = ROWS // 2
      plgpu.copy_smem_to_gmem(q_s.at[pl.ds(wg * half, half)],
                              o_g.at[split, b, pl.ds(row_block * ROWS + wg * half, half)])
    plgpu.copy_smem_to_gmem(stats_s.at[wg, 0], stats_g.at[split, b, wg, rows])
    plgpu.wait_smem_to_gmem(0)


def _combine(o_sBMC: jax.Array, stats_sBkM: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Output [B, M, C] and log-sum-exp [B, M] from those of the splits and their (maximum, sum)."""
  top_sBM, total_sBM = stats_sBkM[:, :, 0], stats_sBkM[:, :, 1]
  top_BM = top_sBM.max(0)
  weight_sBM = total_sBM * jnp.exp2(top_sBM - top_BM)
  total_BM = weight_sBM.sum(0)
  seen_BM = total_BM > 0
  lse_BM = jnp.where(seen_BM, (top_BM + jnp.log2(total_BM)) * math.log(2), -jnp.inf)
  if o_sBMC.shape[0] == 1:
    return o_sBMC[0], lse_BM
  weight_sBM = weight_sBM / jnp.where(seen_BM, total_BM, 1)
  return (o_sBMC * weight_sBM[..., None]).sum(0), lse_BM


def _decline(q_BTHZ, cache, pages_BN, kv_rank) -> None:
  """NotImplementedError for what other implementations should take."""
  Z = q_BTHZ.shape[-1]
  if (kv_rank, Z - kv_rank) != (LATENT, ROPE):
    raise NotImplementedError(f"latent of {kv_rank} and rotary key of {Z - kv_rank}: this kernel "
                              f"is for {LATENT} and {ROPE}")
  if q_BTHZ.dtype != jnp.bfloat16 or cache.dtype not in (jnp.bfloat16, jnp.int32):
    raise NotImplementedError(f"queries {q_BTHZ.dtype}, cache {cache.dtype}: this kernel takes "
                              "bfloat16 queries, and a cache of bfloat16 or records")
  if pages_BN is None and cache.shape[1] % PAGE:
    raise NotImplementedError(f"a contiguous cache of {cache.shape[1]} tokens is not whole pages "
                              f"of {PAGE}")
  if pages_BN is not None and cache.shape[1] != PAGE:
    raise NotImplementedError(f"pages of {cache.shape[1]} tokens: this kernel is for {PAGE}")


def mla_decode(q_BTHZ: jax.Array, cache: jax.Array, lengths_B: jax.Array, *, scale: float,
               pages_BN: jax.Array | None = None, kv_rank: int = LATENT, return_lse: bool = False,
               splits: int = 0, num_sms: int = 132, interpret: compat.Interpret = False
               ) -> jax.Array | tuple[jax.Array, jax.Array]:
  """See `pallas_kernels.reference.mla_decode`.

  Args:
    splits: parts that a sequence's pages are divided into; 0 for `choose_splits`. The result
      depends on it in rounding alone.
    num_sms: thread blocks that run at once.
    interpret: see `compat`.

  Raises:
    NotImplementedError: widths other than 512 and 64, queries not in bfloat16, a cache neither in
      bfloat16 nor of records, pages not of 64 tokens.
    ValueError: operands that do not fit each other.
  """
  latent_cache.check(q_BTHZ, cache, lengths_B, pages_BN, kv_rank)
  _decline(q_BTHZ, cache, pages_BN, kv_rank)
  B, T, H, Z = q_BTHZ.shape
  records = cache.dtype == jnp.int32
  if pages_BN is None:
    pages = cache.shape[1] // PAGE
    cache = cache.reshape(B * pages, PAGE, cache.shape[-1])
    pages_BN = jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages)
  pad = -T * H % ROWS
  blocks = (T * H + pad) // ROWS
  splits = splits or choose_splits(B, blocks, pages_BN.shape[1], num_sms)

  q_BMZ = jnp.pad(q_BTHZ.reshape(B, T * H, Z), ((0, 0), (0, pad), (0, 0)))
  if records:
    q_BMZ = mla_records.reorder_query(q_BMZ)
  bf16, f32 = jnp.bfloat16, jnp.float32
  # Records are unpacked in chunks of 32 columns; all operands of the tensor core share one tiling.
  tile = compat.transforms(bf16, 32 if records else 64)
  scratch = dict(
      q_s=plgpu.SMEM((ROWS, LATENT), bf16, transforms=tile),
      q_rope_s=plgpu.SMEM((ROWS, ROPE), bf16, transforms=tile),
      k_s=plgpu.SMEM((STAGES, PAGE, Z), bf16, transforms=tile),
      p_s=plgpu.SMEM((PAGE, ROWS), bf16, transforms=tile),
      stats_s=plgpu.SMEM((2, 2, ROWS), f32),
      q_ready=plgpu.Barrier(num_arrivals=2),
      full=plgpu.Barrier(num_barriers=STAGES),
      empty=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      exchanged=plgpu.Barrier(num_arrivals=2), weighed=plgpu.Barrier(num_arrivals=2))
  body = functools.partial(_kernel, scale=scale, heads=H, tokens=T, splits=splits, records=records,
                           interpret=interpret)
  rows = blocks * ROWS
  o_sBMC, stats_sBkM = compat.kernel(
      body,
      out_type=[jax.ShapeDtypeStruct((splits, B, rows, LATENT), bf16 if splits == 1 else f32),
                jax.ShapeDtypeStruct((splits, B, 2, rows), f32)],
      # The last axis runs fastest: blocks that read the same pages run together.
      grid=(B, splits, blocks), grid_names=("b", "split", "rows"), num_threads=3, thread_name="wg",
      scratch_types=scratch, approx_math=True, reduction_scratch_bytes=512, interpret=interpret,
  )(q_BMZ, cache, pages_BN, lengths_B)

  o_BMC, lse_BM = _combine(o_sBMC, stats_sBkM)
  o_BMC = mla_records.restore(o_BMC) if records else o_BMC
  o_BTHC = o_BMC[:, :T * H].astype(q_BTHZ.dtype).reshape(B, T, H, LATENT)
  return (o_BTHC, lse_BM[:, :T * H].reshape(B, T, H)) if return_lse else o_BTHC
