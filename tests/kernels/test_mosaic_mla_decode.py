"""MLA decode, kernel and XLA form, against numpy in float64 on the cache's (dequantized) tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsv3_jax import ops
from pallas_kernels import latent_cache, reference
from pallas_kernels.mosaic import compat, mla_decode
from pallas_kernels.xla import mla_decode as xla_mla_decode
from tests.oracles.tolerance import assert_close
from tests.quick import jit

# jax 0.10.2's interpreter hangs where others fail.
pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("no_race")]

SCALE = 0.06
E4M3 = jnp.dtype(jnp.float8_e4m3fn)
BF16 = jnp.dtype(jnp.bfloat16)
needs_speed = pytest.mark.skipif(
    not compat.NEW, reason="jax 0.10.2's interpreter takes too long for more than two blocks")


def pack(latent, rope):
  """Records by numpy, as bytes: FlashMLA's layout."""
  tiles = latent.astype(np.float32).reshape(-1, 4, 128)
  scales = np.maximum(np.abs(tiles).max(-1), np.float32(1e-4)) / np.float32(448)
  codes = (tiles / scales[..., None]).astype(E4M3)
  return np.concatenate([codes.view(np.uint8).reshape(-1, 512), scales.view(np.uint8),
                         rope.astype(BF16).view(np.uint8)], axis=1)


def unpack(data):
  """float64 tokens of records as bytes, the latent rounded to bf16 as the kernel multiplies it."""
  codes = data[:, :512].copy().view(E4M3).astype(np.float32).reshape(-1, 4, 128)
  scales = data[:, 512:528].copy().view(np.float32)
  latent = (codes * scales[..., None]).astype(BF16).astype(np.float64).reshape(-1, 512)
  return np.concatenate([latent, data[:, 528:].copy().view(BF16).astype(np.float64)], axis=1)


def attend(q_THZ, tokens_SZ, length, rank):
  """Output [T, H, C] and log-sum-exp [T, H] of one sequence, a query at a time."""
  T, H, _ = q_THZ.shape
  o, lse = np.zeros((T, H, rank)), np.full((T, H), -np.inf)
  for t in range(T):
    seen = tokens_SZ[:max(0, length - (T - 1 - t))]
    for h in range(H):
      if len(seen):
        s = SCALE * seen @ q_THZ[t, h]
        lse[t, h] = np.log(np.sum(np.exp(s - s.max()))) + s.max()
        o[t, h] = np.exp(s - lse[t, h]) @ seen[:, :rank]
  return o, lse


class Case:
  """Random sequences in a poisoned pool: NaN where there is no token, numbers of no page."""

  def __init__(self, rng, lengths, T, H, *, pages=0, page=64, rank=512, rope=64, dtype="bfloat16",
               records=False, paged=True):
    self.rank, self.lengths = rank, lengths
    B, Z, N = len(lengths), rank + rope, pages or max(1, -(-max(lengths) // page))
    self.q = jnp.asarray(rng.normal(size=(B, T, H, Z)), dtype)
    # Each sequence has a size of its own and a drift, so that mixed-up tokens show.
    tokens = rng.normal(size=(B, N * page, Z)) * (1 + np.arange(B)[:, None, None])
    tokens += np.linspace(-1, 1, N * page)[:, None]
    beyond = np.arange(N * page) >= np.array(lengths)[:, None]
    if records:
      data = pack(tokens[..., :512].reshape(-1, 512), tokens[..., 512:].reshape(-1, 64))
      self.tokens = unpack(data).reshape(B, N * page, Z)
      data = data.reshape(B, N * page, -1)
      data[beyond] = 0xFF  # NaN as code, as scale and as bf16
      cache = data.view(np.int32)
    else:
      cache = np.array(jnp.asarray(tokens, dtype))
      self.tokens = cache.astype(np.float64)
      cache[beyond] = np.nan
    self.table = None
    if paged:
      spare = 2
      where = rng.permutation(B * N + spare)[:B * N].reshape(B, N)
      pool = np.full((B * N + spare, page, cache.shape[-1]), -1 if records else np.nan, cache.dtype)
      pool[where] = cache.reshape(B, N, page, -1)
      cache = pool
      self.table = where.astype(np.int32)
      unused = np.arange(N) * page >= np.array(lengths)[:, None]
      self.table[unused] = rng.choice([-1, -7, 2**30], unused.sum())
      self.table = jnp.asarray(self.table)
    self.cache = jnp.asarray(cache)

  def run(self, function, **kwargs):
    call = functools.partial(function, scale=SCALE, kv_rank=self.rank, return_lse=True, **kwargs)
    got = jit(lambda q, cache, lengths, table: call(q, cache, lengths, pages_BN=table))(
        self.q, self.cache, jnp.asarray(self.lengths, jnp.int32), self.table)
    self.compare(*got)

  def compare(self, o, lse):
    q = np.asarray(self.q, np.float64)
    found = [attend(*a, self.rank) for a in zip(q, self.tokens, self.lengths, strict=True)]
    o_expected, lse_expected = (np.stack(a) for a in zip(*found, strict=True))
    assert o.dtype == self.q.dtype and lse.dtype == jnp.float32
    none = np.isinf(lse_expected)
    np.testing.assert_array_equal(np.isneginf(lse), none)
    np.testing.assert_array_equal(np.asarray(o, np.float32)[none], 0)
    dtype = "float32" if self.q.dtype == jnp.float32 else "bfloat16"
    for mine, other in zip(o, o_expected, strict=True):  # a sequence at a time: sizes differ
      assert_close(mine, other, dtype)
    assert_close(np.where(none, 0, lse), np.where(none, 0, lse_expected), "float32", 10)


# --- records ------------------------------------------------------------------------------------


def test_records_are_flash_mla_bytes(rng):
  """Oracle: numpy's own conversion to e4m3, to the byte; decoding: to the bit."""
  latent = rng.normal(size=(64, 512)) * np.exp(3 * rng.normal(size=(64, 1)))
  latent[0], latent[1, :128] = 0, 1e-6
  ties = np.arange(-127, 127).astype(np.uint8).view(E4M3).astype(np.float64)
  latent[2, :254] = np.nan_to_num(ties)
  latent[3, :253] = (latent[2, :253] + latent[2, 1:254]) / 2  # ties to even, of subnormals too
  rope = rng.normal(size=(64, 64))
  latent, rope = latent.astype(np.float32), rope.astype(np.float32)
  expected = pack(latent, rope)
  records = jax.jit(latent_cache.encode_record)(latent, rope)  # as any caller compiles it
  assert records.shape == (64, 164)
  np.testing.assert_array_equal(np.asarray(records).view(np.uint8), expected)
  np.testing.assert_array_equal(np.asarray(jit(latent_cache.decode_record)(records), np.float64),
                                unpack(expected))


def test_records_show_what_is_not_finite():
  """Law: a tile with NaN or infinity comes back as NaN, its neighbours as they were."""
  latent = jnp.ones((2, 512)).at[0, 5].set(jnp.nan).at[1, 200].set(-jnp.inf)
  values = jit(lambda x: latent_cache.decode_record(
      latent_cache.encode_record(x, jnp.ones((2, 64)))))(latent)
  bad = np.isnan(np.asarray(values, np.float32))
  assert bad[0, :128].all() and not bad[0, 128:].any()
  assert bad[1, 200] and not bad[1, :128].any() and not bad[1, 256:].any()


# --- definition and XLA form --------------------------------------------------------------------


@pytest.mark.parametrize("function", [
    reference.mla_decode, functools.partial(xla_mla_decode.mla_decode, block=16),
    functools.partial(xla_mla_decode.mla_decode, block=1000)], ids=["reference", "xla", "xla_one"])
@pytest.mark.parametrize("options", [
    dict(T=1, H=3), dict(T=2, H=4, paged=False), dict(T=3, H=2, page=5, pages=9),
    dict(T=2, H=2, dtype="bfloat16")], ids=str)
def test_any_shape(function, options, rng):
  """Oracle: numpy, float64; ragged lengths from none to all, small widths."""
  options = dict(dict(page=8, dtype="float32", rank=24, rope=6), **options)
  Case(rng, [40, 0, 17, 1], **options).run(function)


@pytest.mark.parametrize("function", [reference.mla_decode, xla_mla_decode.mla_decode])
@pytest.mark.parametrize("paged", [True, False])
def test_records_any_platform(function, paged, rng):
  """Oracle: numpy, float64, on the dequantized tokens."""
  Case(rng, [100, 0, 65], 2, 3, records=True, paged=paged).run(function)


def test_absorbed_equals_expanded(rng):
  """Law: absorbed attention over latents equals attention over the keys and values of all heads."""
  B, S, H, N, R, C, U = 2, 9, 3, 4, 2, 5, 6
  arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in (
      (B, S, H, N + R), (B, S, C), (B, S, R), (C, H, N), (C, H, U))]

  def expanded(q, c, k_rope, w_uk, w_uv):
    shared = jnp.broadcast_to(k_rope[:, :, None], (B, S, H, R))
    k = jnp.concatenate([jnp.einsum("bsc,chn->bshn", c, w_uk), shared], -1)
    return reference.attention(q, k, jnp.einsum("bsc,chu->bshu", c, w_uv), scale=SCALE)

  def absorbed(q, c, k_rope, w_uk, w_uv, T):
    q = jnp.concatenate([jnp.einsum("bthn,chn->bthc", q[..., :N], w_uk), q[..., N:]], -1)
    o = ops.mla_decode(q[:, -T:], jnp.concatenate([c, k_rope], -1), jnp.full((B,), S, jnp.int32),
                       scale=SCALE, kv_rank=C)
    return jnp.einsum("bthc,chu->bthu", o, w_uv)

  expected = jit(expanded)(*arrays)
  for T in 1, 3:
    assert_close(jit(functools.partial(absorbed, T=T))(*arrays), expected[:, -T:])


def test_xla_form_in_shard_map(rng):
  """Law: sequences spread over devices give what one device gives."""
  case = Case(rng, [40, 0, 17, 8], 2, 3, page=8, rank=24, rope=6, dtype="float32", paged=False)
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
  spread = jit(jax.shard_map(
      lambda q, cache, lengths: xla_mla_decode.mla_decode(
          q, cache, lengths, scale=SCALE, kv_rank=24, return_lse=True, block=16),
      mesh=mesh, in_specs=P("x"), out_specs=P("x")))
  case.compare(*spread(case.q, case.cache, jnp.asarray(case.lengths, jnp.int32)))


# --- the kernel ---------------------------------------------------------------------------------


def interpreted(case, **kwargs):
  case.run(mla_decode.mla_decode, interpret=True, num_sms=2, **kwargs)


def test_kernel_tail_and_split(rng):
  """Oracle: numpy; a ragged tail, two splits, two query tokens of few heads in one block."""
  interpreted(Case(rng, [70], 2, 16, pages=3), splits=2)


def test_kernel_records(rng):
  """Oracle: numpy on the dequantized tokens; a ragged tail, heads that do not fill a block."""
  interpreted(Case(rng, [40], 1, 16, records=True, pages=2), splits=1)


@needs_speed
def test_kernel_ragged_batch(rng):
  """Oracle: numpy; no token, fewer tokens than queries, whole pages; more pages than the ring."""
  interpreted(Case(rng, [0, 1, 192], 2, 64), splits=1)


@needs_speed
def test_kernel_block_of_several_tokens(rng):
  """Oracle: numpy; blocks that straddle tokens, a page that only the last token sees."""
  interpreted(Case(rng, [65], 3, 48, paged=False), splits=2)


@needs_speed
def test_kernel_records_ragged_batch(rng):
  """Oracle: numpy on the dequantized tokens; ring reuse, two blocks of heads."""
  interpreted(Case(rng, [150, 0], 1, 128, records=True), splits=1)


@needs_speed
def test_kernel_more_splits_than_pages(rng):
  """Oracle: numpy on the dequantized tokens."""
  interpreted(Case(rng, [70], 2, 16, records=True), splits=3)


@needs_speed
def test_ops_interpret(rng):
  """Oracle: numpy; on a CPU pallas is the interpreted kernel."""
  Case(rng, [50], 1, 64).run(functools.partial(ops.mla_decode, impl="pallas"))


def test_ops_choose(rng):
  """Law: on a CPU auto is the XLA form."""
  case = Case(rng, [50], 1, 4)
  args = case.q, case.cache, jnp.asarray(case.lengths, jnp.int32)
  run = lambda impl: jit(functools.partial(ops.mla_decode, scale=SCALE, impl=impl))(
      *args, pages_BN=case.table)
  np.testing.assert_array_equal(*(np.asarray(run(i), np.float32) for i in ("auto", "xla")))
  with pytest.raises(ValueError, match="no implementation"):
    run("cudnn")


def test_splits():
  """Law: one split where sequences fill the device, many where they do not; no empty ones."""
  choose = mla_decode.choose_splits
  assert choose(128, 2, 64, 132) == 1
  assert choose(1, 2, 1, 132) == 1
  assert choose(1, 2, 1024, 132) == 64
  assert choose(70, 2, 500, 132) == 10  # 1400 blocks: the last wave is nearly full too
  for batch in 1, 3, 16, 40, 70:
    for pages in 1, 7, 64, 500:
      assert 1 <= choose(batch, 2, pages, 132) <= pages


def test_other_shapes_are_declined():
  """Law: what the kernel cannot take is NotImplementedError, what nobody can is ValueError."""
  zeros = lambda *shape, dtype=jnp.bfloat16: jnp.zeros(shape, dtype)
  lengths, table = zeros(1, dtype=jnp.int32), zeros(1, 2, dtype=jnp.int32)

  def call(q, cache, lengths=lengths, table=table, rank=512):
    return jax.eval_shape(functools.partial(
        mla_decode.mla_decode, scale=1.0, kv_rank=rank), q, cache, lengths, pages_BN=table)

  q, cache = zeros(1, 1, 8, 576), zeros(4, 64, 576)
  assert call(q, cache).shape == (1, 1, 8, 512)
  for wrong in ((q, zeros(4, 32, 576)), (q.astype(jnp.float32), cache),
                (q, cache.astype(jnp.float16)), (q, zeros(1, 100, 576), lengths, None),
                (q, cache, lengths, table, 448),
                (q[..., :192], cache[..., :192], lengths, table, 128)):
    with pytest.raises(NotImplementedError):
      call(*wrong)
  for wrong in ((q, zeros(4, 64, 512)), (q, cache, zeros(2, dtype=jnp.int32)), (q, cache[0]),
                (q, zeros(4, 64, 164, dtype=jnp.int8)), (q, cache, lengths, None),
                (q, zeros(4, 64, 576, dtype=jnp.int32)), (q, cache, lengths, table[0]),
                (q[..., :560], zeros(4, 64, 164, dtype=jnp.int32)),
                (q, cache, lengths, table, 600)):
    with pytest.raises(ValueError):
      call(*wrong)
  with pytest.raises(ValueError, match="512"):
    latent_cache.encode_record(zeros(2, 500), zeros(2, 64))
  with pytest.raises(ValueError, match="int32"):
    latent_cache.decode_record(zeros(2, 656))
