"""The objective by hand on six tokens, and its laws: additive, blind to padding."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.model.loss import loss_fn, target_tokens, targets
from tests.model import small
from tests.oracles.tolerance import assert_close
from tests.quick import jit

# A model that is a table. Blocks add nothing, embeddings are one-hot, and the head turns token x
# into the logits -ln2 * BITS[x]: the next token y costs BITS[x][y] bits. The rows are proper
# distributions (1/2, 1/4, 1/8, 1/8), so the cross-entropy is exactly that number of bits.
BITS = np.array([[1, 2, 3, 3], [3, 1, 2, 3], [3, 3, 1, 2], [2, 3, 3, 1]])
TOKENS = np.array([[0, 1, 3, 2, 2, 0]], np.int32)
LAMBDA = 0.3
CFG = config.replace(small.BASE, **{"vocab_size": 4, "dim": 4, "layers": 1, "dense_layers": 1,
                                    "mtp_depth": 2, "norm_eps": 1e-12})


@pytest.fixture(scope="module")
def table():
  """(MTP inputs, batch) -> aux; an input is "embed" or "hidden" for each depth."""
  graphdef, params, buffers = small.split(small.abstract(CFG))

  def run(params, batch):
    model = nnx.merge(graphdef, params, jax.tree.map(jnp.zeros_like, buffers))
    return loss_fn(model, batch, loss=config.Loss(sequence_balance=0), mtp_weight=LAMBDA,
                   runtime=small.RUNTIME, denominator=target_tokens(batch))

  run = jit(run)

  def value(path, x, inputs):
    name = jax.tree_util.keystr(path)
    one = np.eye(4, dtype=np.float32)
    if "norm" in name:
      return jnp.ones(x.shape)
    if "embedding_VD" in name:
      return jnp.asarray(one)  # RMSNorm makes it 2 * one-hot
    if "head_DV" in name:
      return jnp.asarray(-math.log(2) * BITS / 2, jnp.float32)
    for source in ("embed", "hidden"):
      if f"w_{source}_DD" in name:
        return jnp.stack([one * (chosen == source) for chosen in inputs])
    return jnp.zeros(x.shape)

  def call(inputs, **batch):
    filled = jax.tree_util.tree_map_with_path(lambda p, x: value(p, x, inputs), params)
    return run(filled, {"tokens": TOKENS, **batch})

  return call


# tokens 0 1 3 2 2 0. Main, from t_i to t_{i+1}: 0>1 1>3 3>2 2>2 2>0 = 2+3+3+1+3 = 12 bits.
# Depth 1 predicts t_{i+2}; reading the embedding of t_{i+1}: 1>3 3>2 2>2 2>0 = 3+3+1+3 = 10;
#   reading h_i instead: 0>3 1>2 3>2 2>0 = 3+2+3+3 = 11.
# Depth 2 predicts t_{i+3}; reading the embedding of t_{i+2}: 3>2 2>2 2>0 = 3+1+3 = 7;
#   reading depth 1's state, which holds t_{i+1}: 1>2 3>2 2>0 = 2+3+3 = 8,
#   or, where depth 1 itself reads h_i, t_i: 0>2 1>2 3>0 = 3+2+2 = 7.
@pytest.mark.parametrize("inputs,bits", [
    (("embed", "embed"), (10, 7)), (("hidden", "embed"), (11, 7)), (("embed", "hidden"), (10, 8)),
    (("hidden", "hidden"), (11, 7))])
def test_six_tokens(table, inputs, bits):
  """Oracle: by hand, in bits (eq. 21-25). All depths are divided by the 5 main targets."""
  total, aux = table(inputs)
  ln2 = math.log(2)
  assert_close(aux["loss_sum"], 12 * ln2)
  assert_close(aux["mtp_loss_sum"], np.array(bits) * ln2)
  assert int(aux["tokens"]) == 5 and aux["mtp_tokens"].tolist() == [4, 3]
  assert_close(total, ln2 * (12 / 5 + LAMBDA / 2 * sum(bits) / 5))


def test_six_tokens_in_two_documents(table):
  """Oracle: by hand. 0 1 3 | 2 2 0: no label crosses the border, depth 2 has none left."""
  total, aux = table(("embed", "embed"), segments=np.array([[0, 0, 0, 1, 1, 1]], np.int32))
  ln2 = math.log(2)
  assert_close(aux["loss_sum"], (2 + 3 + 1 + 3) * ln2)
  assert_close(aux["mtp_loss_sum"], np.array([3 + 3, 0]) * ln2)  # 1>3 and 2>0
  assert int(aux["tokens"]) == 4 and aux["mtp_tokens"].tolist() == [2, 0]
  assert_close(total, ln2 * (9 / 4 + LAMBDA / 2 * 6 / 4))


def test_six_tokens_with_a_mask(table):
  """Oracle: by hand. Targets are tokens 1, 3 and 4 alone, at every depth."""
  total, aux = table(("embed", "embed"), mask=np.array([[1, 1, 0, 1, 1, 0]], np.int8))
  ln2 = math.log(2)
  assert_close(aux["loss_sum"], (2 + 3 + 1) * ln2)  # 0>1, 3>2, 2>2
  assert_close(aux["mtp_loss_sum"], np.array([3 + 1, 3 + 1]) * ln2)  # 3>2, 2>2 at both
  assert int(aux["tokens"]) == 3 and aux["mtp_tokens"].tolist() == [2, 2]
  assert_close(total, ln2 * (6 / 3 + LAMBDA / 2 * 8 / 3))


def test_six_tokens_with_padding(table):
  """Oracle: by hand. The last two tokens are padding."""
  _, aux = table(("embed", "embed"), segments=np.array([[0, 0, 0, 0, -1, -1]], np.int32))
  ln2 = math.log(2)
  assert_close(aux["loss_sum"], (2 + 3 + 3) * ln2)
  assert_close(aux["mtp_loss_sum"], np.array([3 + 3, 3]) * ln2)
  assert aux["counts_LE"].sum(1).tolist() == [2 * CFG.moe.active, 1 * CFG.moe.active]


def test_padding_counts_in_no_statistic():
  """Law: rows of padding change nothing, and padding at a row's end is what segment -1 says; a
  masked prompt counts as text."""
  graphdef, params, buffers = small.split(small.build())
  run = jit(lambda batch: loss_fn(
      nnx.merge(graphdef, params, buffers), batch, loss=config.Loss(), mtp_weight=LAMBDA,
      runtime=small.RUNTIME, denominator=1.0)[1])
  keys = ("counts_LE", "loss_sum", "mtp_loss_sum", "tokens", "mtp_tokens", "correct")
  pick = lambda aux: {k: aux[k] for k in keys}
  tokens = small.tokens(3)
  mask = np.ones((3, 9), np.int8)
  mask[0, :5] = 0  # a prompt
  padded = lambda x: np.concatenate([x, np.zeros((1, 9), x.dtype)])
  rows = pick(run({"tokens": tokens, "mask": mask, "valid": np.ones_like(mask)}))
  more = pick(run({"tokens": padded(tokens), "mask": padded(mask),
                   "valid": padded(np.ones_like(mask))}))
  chex.assert_trees_all_close(more, rows, rtol=1e-5)
  A, L = CFG.moe.active, small.BASE.moe_layers
  assert rows["counts_LE"].sum(1).tolist() == [3 * 8 * A] * L + [3 * 7 * A]
  text = np.ones_like(mask)
  text[2, 6:] = 0
  ends = pick(run({"tokens": tokens, "mask": mask * text, "valid": text}))
  segments = np.where(text, 0, -1).astype(np.int32)
  expected = pick(run({"tokens": tokens, "mask": mask, "segments": segments}))
  chex.assert_trees_all_close(ends, expected, rtol=1e-5)
  assert ends["counts_LE"].sum(1).tolist() == [(3 * 8 - 2) * A] * L + [(3 * 7 - 3) * A]


def test_targets():
  """Oracle: by hand."""
  batch = {"tokens": jnp.array([[5, 6, 7, 8, 9]]), "segments": jnp.array([[0, 0, 1, 1, -1]]),
           "mask": jnp.array([[1, 1, 1, 1, 1]])}
  plain = {"tokens": batch["tokens"]}
  assert [t.tolist() for t in targets(plain, 0)] == [[[6, 7, 8, 9]], [[1, 1, 1, 1]]]
  target, weight = targets(plain, 2)
  assert target[0, :2].tolist() == [8, 9] and weight.tolist() == [[1, 1, 0, 0]]
  assert targets(plain, 7)[1].tolist() == [[0, 0, 0, 0]]
  assert targets(batch, 0)[1].tolist() == [[1, 0, 1, 0]]
  assert targets(batch, 1)[1].tolist() == [[0, 0, 0, 0]]
  assert float(target_tokens(batch)) == 2


def test_micro_batches_add_up():
  """Law: totals and statistics of two halves sum to those of the whole."""
  graphdef, params, buffers = small.split(small.build())
  segments = np.array([[0] * 9, [0] * 4 + [1] * 3 + [-1] * 2], np.int32)
  batch = {"tokens": small.tokens(), "segments": segments}
  weights = config.Loss(sequence_balance=0.05, expert_balance=0.02)
  denominator = float(target_tokens(batch))

  def value(params, part, share):
    model = nnx.merge(graphdef, params, buffers)
    return loss_fn(model, part, loss=weights, mtp_weight=LAMBDA, runtime=small.RUNTIME,
                   denominator=denominator, share=share)

  run = jit(value)
  whole = run(params, batch, 1.0)
  parts = [run(params, {k: v[i:i + 1] for k, v in batch.items()}, 0.5) for i in range(2)]
  for a, *b in zip(*map(jax.tree.leaves, (whole, *parts)), strict=True):
    assert_close(a, np.sum(np.asarray(b, np.float64), axis=0))
