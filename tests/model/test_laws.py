"""Laws of the model: causality, isolation, what runtime settings and dtypes may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

T = 7
CFG = config.replace(small.BASE, mtp_depth=2)


@pytest.fixture(scope="module")
def model():
  return small.build(CFG, seed=1)


@pytest.fixture(scope="module")
def forward(model):
  """(tokens, segments) -> Output, compiled once a shape."""
  graphdef, params, buffers = small.split(model)
  run = jit(lambda tokens, segments: nnx.merge(graphdef, params, buffers)(
      tokens, segments, small.RUNTIME))
  return run


def test_causality_by_gradients(model):
  """Law: d logits[t] / d embedding[s] is 0 for s > t, and for s > t + k at MTP depth k."""
  graphdef, params, buffers = small.split(model)

  @jit
  def jacobian(embedded):
    def outputs(embedded):  # one number a depth and position
      whole = nnx.merge(graphdef, params, buffers)
      hidden = whole.hidden(embedded, length=T, runtime=small.RUNTIME)
      weight = jnp.cos(jnp.arange(CFG.vocab_size))
      return jnp.stack([whole.logits(h)[0] @ weight for h in (hidden.h_BTD, *hidden.mtp)])
    return jnp.abs(jax.jacrev(outputs)(embedded)[:, :, 0]).max(-1)  # [depth, T, S]

  seen = np.asarray(jacobian(np.random.default_rng(0).normal(size=(1, T + 1, CFG.dim)).astype(
      np.float32)))
  for k in range(CFG.mtp_depth + 1):
    for t in range(T):
      assert not seen[k, t, t + k + 1:].any(), (k, t)
      if t + k <= T:
        assert seen[k, t, t + k] > 0, f"depth {k} does not read token {t + k} at position {t}"


@pytest.mark.parametrize("t", [0, 3, 5])
def test_later_tokens_change_nothing(forward, t):
  """Law: logits up to t are bit-exact whatever follows, routing included."""
  tokens = small.tokens(length=T)
  other = tokens.copy()
  other[:, t + 1:] = (tokens[:, t + 1:] + 5) % CFG.vocab_size
  a, b = forward(tokens, None), forward(other, None)
  for k, (x, y) in enumerate(zip((a.logits_BTV, *a.mtp_logits), (b.logits_BTV, *b.mtp_logits))):
    np.testing.assert_array_equal(x[:, :max(t + 1 - k, 0)], y[:, :max(t + 1 - k, 0)])
    assert not np.array_equal(x, y)


def test_neighbouring_documents_change_nothing(forward):
  """Law: a packed document's logits are bit-exact whatever stands before and after it."""
  segments = np.array([[0, 0, 1, 1, 1, 2, 2]] * 2, np.int32)
  tokens = small.tokens(length=T)
  other = np.where(segments == 1, tokens, (tokens + 3) % CFG.vocab_size)
  a, b = forward(tokens, segments), forward(other, segments)
  for k, (x, y) in enumerate(zip((a.logits_BTV, *a.mtp_logits), (b.logits_BTV, *b.mtp_logits))):
    np.testing.assert_array_equal(x[:, 2:5 - k], y[:, 2:5 - k])
    assert not np.array_equal(x, y)


def test_packed_equals_alone(forward):
  """Law: a document gives the same logits in a packed sequence as at the start of its own."""
  tokens = small.tokens(batch=1, length=T)
  packed = forward(tokens, np.array([[0, 0, 0, 1, 1, 1, 1]], np.int32))
  alone = forward(np.concatenate([tokens[:, 3:], tokens[:, :3]], 1),
                  np.array([[0, 0, 0, 0, -1, -1, -1]], np.int32))
  assert_close(packed.logits_BTV[:, 3:], alone.logits_BTV[:, :4])
  for k in (1, 2):
    assert_close(packed.mtp_logits[k - 1][:, 3:T - k], alone.mtp_logits[k - 1][:, :4 - k])


# --- runtime settings ---------------------------------------------------------------------------

BATCH = {"tokens": small.tokens(length=T + 1)}


@pytest.fixture(scope="module")
def plain(model):
  return small.loss_and_gradients(model, BATCH)


@pytest.mark.parametrize("policy", ["report", "layer"])
def test_remat_changes_no_number(model, plain, policy):
  """Law: recomputation gives the same loss and gradients, to 1e-6."""
  runtime = config.replace(small.RUNTIME, remat=policy)
  for a, b in zip(*map(jax.tree.leaves, (small.loss_and_gradients(model, BATCH, runtime=runtime),
                                         plain)), strict=True):
    assert_close(a, b, factor=0.1)


def residual_bytes(policy, layers, length):
  """What the backward pass keeps besides its inputs, from the shapes of the vjp's closure."""
  cfg = config.replace(small.BASE, layers=layers)
  graphdef, params, buffers = small.split(small.abstract(cfg))

  def backward(params, buffers, tokens):
    run = small.objective(graphdef, buffers, {"tokens": tokens},
                          runtime=config.Runtime(remat=policy, attention_block=32))
    return jax.vjp(lambda p: run(p)[0], params)[1]

  kept = jax.eval_shape(backward, params, buffers, jax.ShapeDtypeStruct((1, length + 1), jnp.int32))
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_remat_saves_memory():
  """Law: the layer policy keeps a block's input alone, the report's more, no policy everything."""
  short, long = 64, 128
  grows = {policy: residual_bytes(policy, 4, long) - residual_bytes(policy, 4, short)
           for policy in ("none", "report", "layer")}  # the difference leaves out the weights
  assert grows["layer"] < grows["report"] < grows["none"] / 2
  two_layers = grows["layer"] - residual_bytes("layer", 2, long) + residual_bytes("layer", 2, short)
  assert two_layers == 2 * (long - short) * 4 * small.BASE.dim


@pytest.mark.parametrize("changes", [
    {"layer_unroll": 0}, {"head_chunk": 1024, "attention_block": 512},
    {"attention": "reference", "gemm": "reference"}, {"gemm": "ragged_dot"}])
def test_runtime_settings_change_no_number(model, plain, changes):
  """Law: implementations and tile sizes give the same loss and statistics, to 1e-6."""
  graphdef, params, buffers = small.split(model)
  runtime = config.replace(small.RUNTIME, **changes)
  got = jit(small.objective(graphdef, buffers, BATCH, runtime=runtime))(params)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(plain[0]), strict=True):
    assert_close(a, b, factor=0.1)


def test_bf16_computes_near_fp32(model, plain):
  """Oracle: the fp32 run. Losses, gradients and statistics stay fp32 while activations are bf16."""
  runtime = config.replace(small.RUNTIME, compute_dtype="bfloat16")
  (total, aux), gradients = small.loss_and_gradients(model, BATCH, runtime=runtime)
  assert {x.dtype for x in jax.tree.leaves((total, aux, gradients))} == {jnp.dtype("float32")}
  assert_close(total, plain[0][0], "bfloat16")
  # Routing flips where affinities nearly tie, so gradients are compared as a whole.
  a, b = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradients, plain[1]))
  assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.95


# --- the tree of parameters ---------------------------------------------------------------------

NAMED = config.replace(
    small.BASE, vocab_size=97, dim=14, layers=5, dense_layers=2, dense_ffn_dim=19, mtp_depth=2,
    **{"attention.heads": 3, "attention.q_rank": 11, "attention.kv_rank": 13,
       "attention.nope_dim": 5, "attention.rope_dim": 4, "attention.v_dim": 7,
       "moe.experts": 16, "moe.ffn_dim": 17, "moe.shared": 2})


def letter_sizes(path):
  """Size of each shape letter, for a variable at `path`."""
  a, m = NAMED.attention, NAMED.moe
  ffn = NAMED.dense_ffn_dim if path[0] == "dense" else m.shared * m.ffn_dim
  return {"V": 97, "D": 14, "E": 16, "H": 3, "Q": 11, "C": 13, "K": 9, "U": 7,
          "Z": a.kv_rank + a.rope_dim, "W": a.nope_dim + a.v_dim,
          "F": m.ffn_dim if path[-1].endswith(("EDF", "EFD")) else ffn}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_names_say_the_shapes(dtype):
  """Law: a name's letters are its shape, behind a layer axis in a stack; biases are always fp32."""
  model = small.abstract(NAMED, jnp.dtype(dtype))
  graphdef, params, buffers = nnx.split(model, nnx.Param, small.RouterBias)  # fails on other kinds
  layers = {"dense": (2,), "moe": (3,), "mtp": (2,)}
  names = set()
  for tree, expected in ((params, dtype), (buffers, "float32")):
    for path, x in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(tree)):
      keys = [p.key for p in path]
      sizes = letter_sizes(keys)
      shape = tuple(sizes[letter] for letter in keys[-1].rpartition("_")[2])
      assert x.shape == layers.get(keys[0], ()) + shape, keys
      assert x.dtype == jnp.dtype(expected), keys
      names.add(".".join(keys))
  block = {"attn_norm_D", "ffn_norm_D", "attn.w_dq_DQ", "attn.q_norm_Q", "attn.w_uq_QHK",
           "attn.w_dkv_DZ", "attn.kv_norm_C", "attn.w_ukv_CHW", "attn.w_o_HUD"}
  dense = {"w_gate_DF", "w_up_DF", "w_down_FD"}
  moe = block | {f"ffn.{n}" for n in ("w_router_DE", "bias_E", "w_gate_EDF", "w_up_EDF",
                                      "w_down_EFD")} | {f"ffn.shared.{n}" for n in dense}
  assert names == ({"embedding_VD", "head_DV", "final_norm_D"}
                   | {f"dense.{n}" for n in block | {f"ffn.{n}" for n in dense}}
                   | {f"moe.{n}" for n in moe} | {f"mtp.block.{n}" for n in moe}
                   | {f"mtp.{n}" for n in ("embed_norm_D", "hidden_norm_D", "w_embed_DD",
                                           "w_hidden_DD", "out_norm_D")})


def test_initialisation():
  """Law: weights N(0, init_std^2), each layer and matrix its own; gains 1, biases 0 (4.2)."""
  cfg = config.replace(NAMED, layers=1, dense_layers=1)

  def make():
    return nnx.split(small.Transformer(cfg, rngs=nnx.Rngs(0)), nnx.Param, small.RouterBias)[1:]

  params, buffers = map(nnx.to_pure_dict, jit(make)())
  assert not any(np.any(x) for x in jax.tree.leaves(buffers))
  drawn = []
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if "norm" in path[-1].key:
      assert (np.asarray(x) == 1).all(), path
    else:
      drawn.append(np.ravel(x))
      assert abs(np.mean(x)) < 5 * NAMED.init_std / x.size**0.5, path
      assert abs(np.std(x) / NAMED.init_std - 1) < 5 / (2 * x.size) ** 0.5, path
  drawn = np.concatenate(drawn)
  assert len(np.unique(drawn)) > 0.99 * len(drawn)  # no layer repeats another
