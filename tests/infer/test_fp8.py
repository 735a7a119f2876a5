"""Decoding from FP8 weights: the same arithmetic as training's forward pass, a byte a weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.fp8 import recipes
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import decode, forward, matmul, parameters
from dsv3_jax.infer.engine import Engine, Settings
from dsv3_jax.infer.generate import Generator
from dsv3_jax.infer.request import Request
from dsv3_jax.interop import fp8_blocks, names
from dsv3_jax.model import mla, moe
from tests import quick
from tests.fp8.test_linear import draw, metric, values
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

# Heads and widths that are no multiples of 128: blocks hold columns of several heads, and gate's
# last block is cut short. Every token goes to every expert, so that rounding moves no token.
CFG = config.Model(
    vocab_size=64, dim=160, layers=1, dense_layers=0, dense_ffn_dim=136, init_std=0.05,
    attention=config.Attention(heads=3, q_rank=130, kv_rank=140, nope_dim=40, rope_dim=16,
                               v_dim=40),
    moe=config.MoE(experts=4, active=4, shared=1, ffn_dim=130, groups=1, active_groups=1),
    mtp_depth=0)
# Each head's part of the up-projection within one block, as in the release.
WITHIN = config.replace(CFG, **{"attention.heads": 2, "attention.nope_dim": 64,
                                "attention.v_dim": 64, "attention.q_rank": 0})
FP8 = config.Runtime(**recipes.for_inference(), attention_block=4)
ALONE = config.Runtime(attention_block=4)  # FP8 weights, activations as they are
B, T = 3, 17


@functools.cache
def model(cfg=CFG):
  """(graph, parameters with FP8 weights, buffers) and the same for decoding."""
  graphdef, params, buffers = small.split(small.build(cfg, seed=3))

  def both(params, buffers):
    held = parameters.quantized(params)
    return held, parameters.prepare(held, buffers, cfg)

  held, weights = jit(both)(params, buffers)
  nnx.replace_by_pure_dict(params, held)
  return (graphdef, params, buffers), weights


@functools.cache
def whole(cfg, runtime):
  """Training's forward pass, compiled: tokens to logits."""
  graphdef, params, buffers = model(cfg)[0]
  run = jit(lambda p, b, tokens: nnx.merge(graphdef, p, b)(tokens, None, runtime).logits_BTV)
  return lambda tokens: np.asarray(run(params, buffers, tokens))


def logits(cfg, runtime, tokens, fresh):
  """Of decoding's forward pass: over an empty cache the expanded form or the absorbed one."""
  def run(w, tokens):
    cache = cache_lib.make(cfg, B, T)
    h_BTD, _, _ = forward.forward(w, cache, tokens, jnp.full(B, T), cfg, runtime, fresh)
    return forward.readout(w, h_BTD, cfg)

  return np.asarray(jit(run)(model(cfg)[1], tokens))


@pytest.mark.parametrize("cfg, forms", [(CFG, (False, True)), (WITHIN, (False,))],
                         ids=["straddling", "within"])
def test_logits_of_fp8_weights(cfg, forms):
  """Oracle: training's forward pass of the same FP8 weights. With activations left alone the
  absorbed and the expanded form agree to rounding: no column met another block's scale."""
  tokens = small.tokens(B, T, cfg.vocab_size)
  want = whole(cfg, ALONE)(tokens)
  for fresh in forms:
    assert_close(logits(cfg, ALONE, tokens, fresh), want, "float32")


def test_logits_under_the_recipe(monkeypatch):
  """Oracle: training's forward pass under the same recipe; for the absorbed form with one matrix
  left out of it: what multiplies the latents. The order of sums differs, which now and then rounds
  a code the other way, by 2^-4 of that number; that is far less than what the recipe does."""
  tokens = small.tokens(B, T, CFG.vocab_size)
  want, alone = (whole(CFG, runtime)(tokens) for runtime in (FP8, ALONE))
  noise = metric(want, alone)
  assert noise > 1e-5
  assert metric(logits(CFG, FP8, tokens, True), want) < noise / 20
  expand, bare = mla.expand, recipe_lib.resolve(ALONE, held=True)
  monkeypatch.setattr(mla, "expand", lambda w, latents, nope, _: expand(w, latents, nope, bare))
  want = whole(CFG, config.replace(FP8, head_chunk=7))(tokens)  # no setting that was traced before
  assert metric(logits(CFG, FP8, tokens, False), want) < noise / 20


@pytest.mark.parametrize("P", [2, 64])
def test_products_against_float64(P):
  """Oracle: numpy in float64 on the dequantized operands, of few rows and of many: a linear layer
  whose rotary columns straddle blocks, gate and up side by side, and the experts of some tokens."""
  recipe, rng = recipe_lib.resolve(FP8), np.random.default_rng(1)
  E, A, D, F, H, N, R = 5, 2, 150, 130, 3, 100, 20
  shapes = {"w_q_DHK": (1, D, H * (N + R)), "w_gate_EDF": (E, D, F), "w_up_EDF": (E, D, F),
            "w_down_EFD": (E, F, D)}
  masters = {k: rng.normal(size=shape).astype(np.float32) for k, shape in shapes.items()}
  exact = {k: np.stack([values(x, recipe.fprop_w, recipe.floor) for x in masters[k]])
           for k in shapes}
  masters["w_q_DHK"] = masters["w_q_DHK"].reshape(D, H, N + R)
  w = jit(parameters.quantized)(masters)
  both = parameters.beside(w["w_gate_EDF"], w["w_up_EDF"])
  assert both.fprop.shape == (E, D, 256 + F)
  x_PD, expert_PA = draw(P, D), rng.integers(0, E - 1, (P, A)).astype(np.int32)

  def run(x):
    p = moe.plan(jnp.asarray(expert_PA), E, matmul.block_rows(P * A, E, both, FP8))
    y_MF = matmul.grouped(matmul.spread(matmul.read(x, both, FP8), p), both, p, FP8, x.dtype)
    gate, up = matmul.split_gate(y_MF, w["w_down_EFD"])
    down = matmul.grouped(gate, w["w_down_EFD"], p, FP8, x.dtype)
    return matmul.rotary(x, w["w_q_DHK"], N, FP8), *(y[p.row_PA] for y in (gate, up, down))

  def times(x, w):
    x = values(x, recipe.fprop_x, recipe.floor)
    return np.einsum("pai,paio->pao", x.reshape(P, -1, x.shape[-1]), np.broadcast_to(
        w, (P, len(x) // P, *w.shape[-2:])))

  q, gate, up, down = map(np.asarray, jit(run)(x_PD))
  want = times(x_PD, exact["w_q_DHK"]).reshape(P, H, N + R)
  assert_close(q[..., :N], want[..., :N], "float32")
  assert_close(q[..., N:], np.concatenate([want[..., N::2], want[..., N + 1::2]], -1), "float32")
  for got, name in ((gate, "w_gate_EDF"), (up, "w_up_EDF")):
    assert_close(got, times(np.repeat(x_PD, A, 0), exact[name][expert_PA]), "float32")
  assert_close(down, times(gate.reshape(-1, F), exact["w_down_EFD"][expert_PA]), "float32")


def test_bytes():
  """Oracle: the released folder's tensors: a byte a weight and 4 a block; the others bf16, but for
  the fp32 biases of the router. In sizes of which gate's blocks are whole, nothing is added."""
  cfg = config.replace(config.preset("v3_671b"), layers=5, dense_layers=2, vocab_size=256,
                       **{"moe.experts": 16, "moe.groups": 4, "moe.active_groups": 2})
  _, params, buffers = small.split(small.abstract(cfg))
  made = jax.eval_shape(lambda p, b: parameters.prepare(parameters.quantized(p), b, cfg,
                                                        "bfloat16"), params, buffers)
  want = 0
  for slot in names.slots(cfg):
    count = int(np.prod(slot.shape))
    scales = np.prod(fp8_blocks.scale_shape(slot.shape, (128, 128))) if slot.quantized else 0
    want += count + 4 * scales if slot.quantized else (4 if slot.float32 else 2) * count
  assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made)) == want


PROMPTS, STEPS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]], 8


def rollouts(runtime, written):
  """Logits at each new place [row, STEPS, V] of full forward passes, and what was written there."""
  tokens = np.zeros((B, T), np.int32)
  for row, prompt, more in zip(tokens, PROMPTS, written):
    row[:len(prompt) + STEPS] = [*prompt, *more]
  at = np.array([len(p) for p in PROMPTS])[:, None] + np.arange(STEPS)
  rows = np.arange(B)[:, None]
  out = whole(CFG, runtime)(tokens)
  return out[rows, at - 1][:len(written)], tokens[rows, at][:len(written)]


def test_greedy_equals_rollout(monkeypatch):
  """Oracle: full forward passes of the FP8 model over what was written. Each token is the argmax,
  where it leads by more than the recipe's rounding. And a law: what a run of steps needs besides
  weights and cache is less than a third of the weights in fp32; dequantized before the loop or all
  at a step's begin, they would be there whole."""
  monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=quick.options()))
  (_, params, buffers), _ = model()
  generator, needed, run = Generator(CFG, params, buffers, FP8), [], decode.run

  def measured(*args, **kwargs):
    needed.append(run.lower(*args, **kwargs).compile().memory_analysis().temp_size_in_bytes)
    return run(*args, **kwargs)

  monkeypatch.setattr(decode, "run", measured)
  out, token = rollouts(FP8, [found.tokens for found in generator(PROMPTS, STEPS)])
  best, second = np.sort(out, -1)[..., :-3:-1].transpose(2, 0, 1)
  sure = best - second > 0.15 * out.std()
  assert sure.sum() > STEPS and (out.argmax(-1) == token)[sure].all()
  assert max(needed) < 4 / 3 * sum(x.size for x in jax.tree.leaves(generator.weights.layers))


def test_engine():
  """Oracle: the argmax of full forward passes, activations left alone."""
  made, written = Engine(CFG, model()[1], Settings(8, 8, 32, 2, 8, run=8), ALONE), []
  for prompt in PROMPTS[:2]:
    written.append([])
    made.submit(Request(tuple(prompt), STEPS),
                lambda event, to=written[-1]: to.extend(t.id for t in event.tokens))
  while made.step():
    pass
  out, token = rollouts(ALONE, written)
  assert (out.argmax(-1) == token).all()
