"""One linear layer: its three matmuls, what it keeps, its weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.fp8 import accumulate, feed_forward, linear, weights
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.fp8.formats import E4M3
from tests.fp8 import oracle
from tests.quick import jit

M, K, N = 200, 150, 140  # every tile of 128 has a ragged neighbour
OPERANDS = ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w", "wgrad_x", "wgrad_dy")
FP8_ARMS = ("v3", "v3_pow2", "per_tensor_current", "per_tensor_delayed", "hybrid_e5m2",
            "block_gradients")


def resolve(name, **changes):
  return recipe_lib.resolve(config.Runtime(recipe=name, fp8=config.FP8(**changes)))


def draw(*shape, seed=0, spread=1.5):
  """Normal numbers with rows of different sizes, as activations and gradients have them."""
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape) * np.exp(spread * rng.normal(size=(shape[0], 1)))
          ).astype(np.float32)


PREPARE = jax.jit(weights.prepare, static_argnums=1)
X, W, DY = draw(M, K), draw(K, N, seed=1, spread=0) * 0.05, draw(M, N, seed=2) * 1e-5


def values(x, operand, floor):
  """The oracle's dequantized operand, float64."""
  if operand.format is None:
    return x.astype(np.float64)
  codes, s = oracle.quantize(x, operand.format.name, operand.tile, operand.scale, floor)
  return (codes * oracle.spread_scales(s, x.shape, operand.tile)).astype(np.float64)


def metric(x, y):
  """DeepGEMM's: 1 - 2 <x, y> / (<x, x> + <y, y>)."""
  x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
  return 1 - 2 * np.sum(x * y) / np.sum(x * x + y * y)


def three(recipe, x=X, w=W, dy=DY, **kwargs):
  """y, dx and dw of one layer."""
  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: linear.linear(x, (w,), recipe, **kwargs)[0], x, w)
    return y, *pull(dy)

  return [np.asarray(z) for z in jit(run)(x, w, dy)]


def expected(r, cache=None):
  """The same in float64 on the oracle's operands; `cache`: how the input is kept."""
  x = values(X, r.fprop_x, r.floor)
  kept = x if cache is None else values(X, cache, r.floor)
  again = cache is not None or not linear.same_form(r.fprop_x, r.wgrad_x)
  x_t = values(kept.astype(np.float32), r.wgrad_x, r.floor) if again else kept
  dy = values(DY, r.dgrad_dy, r.gradient_floor)
  dy_t = dy if linear.same_form(r.dgrad_dy, r.wgrad_dy) else values(DY, r.wgrad_dy,
                                                                    r.gradient_floor)
  return (x @ values(W, r.fprop_w, r.floor), dy @ values(W, r.dgrad_w, r.floor).T, x_t.T @ dy_t)


@pytest.mark.parametrize("name", FP8_ARMS)
def test_three_matmuls_on_the_same_operands(name):
  """Oracle: float64 products of operands quantized by numpy and ml_dtypes, to 1e-6 of the largest.

  What is saved for Wgrad is the quantized input: the oracle reads that back and tiles it again.
  """
  for found, want in zip(three(resolve(name)), expected(resolve(name)), strict=True):
    assert np.abs(found - want).max() < 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", FP8_ARMS)
def test_three_matmuls_against_unquantized(name):
  """Oracle: float64 products of the operands as they were, DeepGEMM's metric under 1e-3."""
  limit = 2e-3 if name == "hybrid_e5m2" else 1e-3  # two mantissa bits
  x, w, dy = (z.astype(np.float64) for z in (X, W, DY))
  for found, want in zip(three(resolve(name)), (x @ w, dy @ w.T, x.T @ dy), strict=True):
    assert metric(found, want) < limit


def test_the_input_of_the_projection_after_attention():
  """Oracle: float64, with E4M3 and power-of-two scales forward and the E5M6 copy for Wgrad."""
  r = resolve("v3")
  found = three(r, site=linear.Site(r.output_x, r.output_cache))
  r = dataclasses.replace(r, fprop_x=r.output_x)
  for got, want in zip(found, expected(r, cache=r.output_cache), strict=True):
    assert np.abs(got - want).max() < 1e-6 * np.abs(want).max()


@pytest.mark.parametrize("name,dtype", [("fp32", "bfloat16"), ("bf16", "float32")])
def test_unquantized_recipes(name, dtype):
  """Oracle: float64 products of operands in the recipe's dtype, whatever the compute dtype."""
  r = recipe_lib.resolve(config.Runtime(recipe=name, compute_dtype=dtype))
  x, w, dy = (jnp.asarray(z, dtype) for z in (X, W, DY))
  x64, w64, dy64 = (np.asarray(jnp.asarray(z, "bfloat16"), np.float64) for z in (X, W, DY))

  def run(x, w, dy):
    y, pull = jax.vjp(lambda x, w: linear.linear(x, (w,), r)[0], x, w)
    return y, *pull(dy)

  for found, want in zip(jit(run)(x, w, dy), (x64 @ w64, dy64 @ w64.T, x64.T @ dy64), strict=True):
    rounding = 2.0**-8 if found.dtype == jnp.bfloat16 else 0
    assert np.abs(np.asarray(found, np.float64) - want).max() < (
        1e-6 + rounding) * np.abs(want).max()


def test_recipes_that_are_the_compute_dtype_are_no_recipe():
  """Law: then the model takes today's path, at no cost."""
  assert recipe_lib.resolve(config.Runtime()) is None
  assert recipe_lib.resolve(config.Runtime(recipe="fp32")) is None
  assert recipe_lib.resolve(config.Runtime(recipe="bf16", compute_dtype="bfloat16")) is None
  assert resolve("bf16") is not None and resolve("v3").quantized and not resolve("bf16").quantized


def test_every_recipe_exists_and_every_field_can_be_changed():
  """Oracle: the names and the fields of the config."""
  assert config.RECIPES == ("none", *recipe_lib.RECIPES)
  for name, full in recipe_lib.RECIPES.items():
    assert None not in dataclasses.asdict(full).values(), name
  for field in dataclasses.fields(config.FP8):
    other = {"interval": 64, "bits": 14, "floor": 1e-3, "gradient_floor": 1e-3, "history": 3}.get(
        field.name, "e5m2 1x64 pow2")
    changed, base = resolve("v3", **{field.name: other}), resolve("v3")
    assert [f.name for f in dataclasses.fields(base)
            if getattr(base, f.name) != getattr(changed, f.name)] == [field.name]


def test_weights_that_share_an_input_are_quantized_as_alone():
  """Law: two weights at once give what each gives alone; the gradients of the input add up."""
  r = resolve("v3")
  w2 = W[:, ::2]
  def both(x, w, w2):
    return linear.linear(x, (w, w2), r)
  def alone(x, w, w2):
    return linear.linear(x, (w,), r) + linear.linear(x, (w2,), r)
  found = [jit(lambda *args, f=f: (lambda out, pull: (out, pull((DY, DY[:, ::2]))))(
      *jax.vjp(f, *args)))(X, W, w2) for f in (both, alone)]
  for a, b in zip(*map(jax.tree.leaves, found), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_prepared_weights_give_the_same_bits_and_their_masters_the_gradient():
  """Law: quantizing before (stacked, as a scan sees it) or inside the layer is one."""
  r = resolve("v3")
  masters = {"w_uq_QHK": jnp.asarray(np.stack([W, 2 * W])).reshape(2, K, 4, N // 4),
             "w_router_DE": jnp.asarray(W), "final_norm_D": jnp.ones(3)}
  prepared = jit(lambda m: weights.prepare(m, r))(masters)
  assert isinstance(prepared["w_router_DE"], jax.Array)
  assert prepared["w_uq_QHK"].fprop.shape == (2, K, N)
  assert prepared["w_uq_QHK"].fprop.codes.dtype == jnp.float8_e4m3fn

  def run(w):
    def layer(x, w):
      y = linear.linear(x, (w,), r)[0].reshape(M, N)
      return jnp.pad(y, ((0, 0), (0, K - N))), y
    return jnp.sum(jax.lax.scan(layer, jnp.asarray(X), w)[1] * DY)

  plain = jit(jax.grad(run))(masters["w_uq_QHK"])
  through = jit(jax.grad(lambda m: run(weights.with_masters(
      prepared, m | {"w_router_DE": 0.0, "final_norm_D": 0.0})["w_uq_QHK"])))(
          {"w_uq_QHK": masters["w_uq_QHK"]})["w_uq_QHK"]
  assert plain.shape == through.shape == (2, K, 4, N // 4) and plain.dtype == jnp.float32
  np.testing.assert_allclose(plain, through, rtol=1e-6, atol=1e-12)


def test_what_is_kept_is_a_byte_an_element():
  """Oracle: the sizes: E4M3 codes and fp32 scales of 1x128 tiles, and nothing else of x."""
  r = resolve("v3")
  w = PREPARE({"w_gate_DF": W}, r)["w_gate_DF"]
  pull = jax.eval_shape(lambda x: jax.vjp(lambda x: linear.linear(x, (w,), r)[0], x)[1],
                        jax.ShapeDtypeStruct((4096, K), jnp.bfloat16))
  rows = [x for x in jax.tree.leaves(pull) if x.shape[:1] == (4096,)]
  assert sorted((x.dtype.name, x.shape) for x in rows) == [
      ("float32", (4096, 2)), ("uint8", (4096, K))]


def test_weights_without_masters_get_no_gradient_and_the_input_does():
  """Law: a model that computes from loaded FP8 weights can still be differentiated by its input."""
  r = resolve("v3")
  kept = dataclasses.replace(PREPARE({"w_gate_DF": W}, r)["w_gate_DF"],
                             master=None, dgrad=None)

  def run(x, kept, dy):
    y, pull = jax.vjp(lambda x: linear.linear(x, (kept,), r)[0], x)
    return y, *pull(dy)

  for a, b in zip(jit(run)(X, kept, DY), three(r)[:2], strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * np.abs(b).max())


def test_bits_add_as_the_emulated_tensor_core():
  """Oracle: accumulate.matmul on the quantized operands, in all three matmuls."""
  r = resolve("v3", bits=14)
  found = three(r)

  def emulated(X, W, DY):
    x, w = weights.hold(X, r.fprop_x, r.floor), weights.hold(W, r.fprop_w, r.floor)
    dy = weights.hold(DY, r.dgrad_dy, r.gradient_floor)
    x_t = weights.hold(x.dequantize(), r.wgrad_x, r.floor).mT
    dy_t = weights.hold(DY, r.wgrad_dy, r.gradient_floor)
    return [(accumulate.matmul(a.codes, b.codes, interval=128, bits=14, scale_a=a.scales,
                               tile_a=a.tile, scale_b=b.scales, tile_b=b.tile),
             a.dequantize() @ b.dequantize())
            for a, b in zip((x, dy, x_t), (w, w.mT, dy_t), strict=True)]

  for got, (want, fp32) in zip(found, jit(emulated)(X, W, DY), strict=True):
    np.testing.assert_array_equal(got, want)
    assert metric(got, fp32) > 1e-9  # it is not the fp32 sum


def test_delayed_scaling_uses_the_history_and_reports_what_it_saw():
  """Oracle: the contract: assumed amaxes scale (too small ones saturate), 0 means the present one,
  and the amaxes' "gradient" is what the tensors had."""
  r = resolve("per_tensor_delayed")
  w = PREPARE({"w_gate_DF": W}, r)["w_gate_DF"]

  def run(amax):
    y, pull = jax.vjp(lambda x, a: linear.linear(x, (dataclasses.replace(w, amax=a),), r)[0],
                      jnp.asarray(X), amax)
    return y, *pull(jnp.asarray(DY))

  run = jit(run)
  unknown, fresh = run(jnp.zeros(2)), run(jnp.array([np.abs(X).max(), np.abs(DY).max()]))
  np.testing.assert_array_equal(unknown[0], fresh[0])
  np.testing.assert_array_equal(unknown[1], fresh[1])
  np.testing.assert_allclose(fresh[2], [np.abs(X).max(), np.abs(DY).max()])
  small = 0.1 * np.abs(X).max()
  y = run(jnp.array([small, 0.0]))[0]
  codes, s = oracle.quantize(X, "e4m3", (0, 0), amax=np.full((1, 1), small, np.float32))
  want = (codes * s).astype(np.float64) @ values(W, r.fprop_w, r.floor)
  np.testing.assert_allclose(y, want, atol=1e-6 * np.abs(want).max())


def test_the_feed_forward_recomputes_its_hidden_units():
  """Oracle: float64 on the oracle's operands, the SwiGLU's inputs read back from their FP8 copies
  in the backward pass."""
  r = resolve("v3")
  q = lambda z, operand, floor=r.floor: values(np.asarray(z, np.float32), operand, floor)
  wg, wu, wd = (draw(*s, seed=i, spread=0) * 0.1 for i, s in enumerate(((K, N), (K, N), (N, K)), 3))
  dy = draw(M, K, seed=9) * 1e-5
  w64 = [q(w, r.fprop_w) for w in (wg, wu, wd)]
  silu = lambda z: z / (1 + np.exp(-z))
  x = q(X, r.fprop_x)
  g, u = x @ w64[0], x @ w64[1]
  y = q(silu(g) * u, r.fprop_x) @ w64[2]
  g, u = q(g, r.swiglu_cache), q(u, r.swiglu_cache)
  dq = lambda z, operand: q(z, operand, r.gradient_floor)
  h, dh = silu(g) * u, dq(dy, r.dgrad_dy) @ w64[2].T
  sigmoid = 1 / (1 + np.exp(-g))
  dg, du = dh * u * sigmoid * (1 + g * (1 - sigmoid)), dh * silu(g)
  dx = dq(dg, r.dgrad_dy) @ w64[0].T + dq(du, r.dgrad_dy) @ w64[1].T
  x_t = q(x, r.wgrad_x)
  want = (y, dx, x_t.T @ dq(dg, r.wgrad_dy), x_t.T @ dq(du, r.wgrad_dy),
          q(h, r.wgrad_x).T @ dq(dy, r.wgrad_dy))

  def run(x, *ws):
    y, pull = jax.vjp(lambda *a: feed_forward.feed_forward(*a, r), x, *ws)
    return y, *pull(jnp.asarray(dy))

  for name, a, b in zip(("y", "dx", "gate", "up", "down"), jit(run)(X, wg, wu, wd), want,
                        strict=True):
    # fp32 against float64 moves a few codes by one, nothing more.
    assert metric(a, b) < 1e-5, name


def test_errors():
  """Oracle: the messages name what is wrong and what would be right."""
  with pytest.raises(ValueError, match="inputs"):
    linear.linear(jnp.ones((4, 8)), (jnp.ones((9, 3)),), resolve("v3"))
  for field, value, words in (
      ("dgrad_dy", "e4m3 1x12.8 fp32", "e4m3 1x128 pow2"), ("fprop_x", "e5m6 1x128 fp32", "caches"),
      ("fprop_w", "e4m3 tensor fp32 delayed", "delayed"), ("interval", 33, "multiple of 32"),
      ("bits", 3, "4 to 36"), ("floor", 0.0, "1e-30"), ("history", 0, "positive")):
    with pytest.raises(config.ConfigError, match=f"runtime.fp8.{field}.*{words}"):
      config.FP8(**{field: value})
  with pytest.raises(config.ConfigError, match="runtime.recipe=none"):
    config.Runtime(fp8=config.FP8(interval=64))
  assert E4M3.max == 448
