"""The whole model and its loss against tests.oracles.deepseek_v3, the report in numpy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from tests.model import small
from tests.oracles import deepseek_v3 as oracle
from tests.oracles.tolerance import GRADIENT, assert_close

T = 9  # predicted positions of the main model
YARN = config.Yarn(factor=8, original_length=64, beta_fast=4, mscale=0.7, mscale_all_dim=1.0)
SEGMENTS = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1, -1, -1]], np.int32)
MASK = np.array([[0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]], np.int8)

# name: (changes to small.BASE, mean of the router biases, further keys of the batch)
CASES = {
    "base": ({}, 0.0, {}),
    "no_query_latent": (
        {"attention.q_rank": 0, "attention.yarn": YARN, "moe.gate": "softmax", "moe.shared": 2,
         "moe.normalize": False, "moe.groups": 1, "moe.active_groups": 1, "moe.scale": 1.0,
         "mtp_depth": 2}, 0.0, {}),
    "negative_biases": (
        {"moe.shared": 0, "moe.active_groups": 2, "moe.group_top": 1, "mtp_depth": 3,
         "mtp_input": "raw"}, -2.0, {}),
    "packed": ({"moe.groups": 2, "moe.active_groups": 1, "mtp_depth": 2, "dense_layers": 0,
                "layers": 2}, -0.5, {"segments": SEGMENTS, "mask": MASK}),
    "dense": ({"dense_layers": 2, "layers": 2, "mtp_depth": 0}, 0.0, {}),
}


@dataclasses.dataclass
class Case:
  cfg: config.Model
  model: nnx.Module
  batch: dict
  params: dict  # float64
  biases: dict
  loss: oracle.Loss

  def oracle_loss(self, params):
    return oracle.loss(params, self.biases, self.cfg, small.WEIGHTS, self.batch, small.MTP_WEIGHT)


@pytest.fixture(scope="module", params=CASES)
def case(request):
  changes, bias_mean, keys = CASES[request.param]
  cfg = config.replace(small.BASE, **changes)
  model = small.build(cfg, seed=3, bias_mean=bias_mean)
  batch = {"tokens": small.tokens(length=T + 1), **keys}
  made = Case(cfg, model, batch, *small.for_oracle(model), loss=None)
  made.loss = made.oracle_loss(made.params)
  return made


@pytest.fixture(scope="module")
def ours(case):
  """((total, aux), gradients) of dsv3_jax."""
  return small.loss_and_gradients(case.model, case.batch)


def test_logits(case):
  """Oracle: numpy transcription of eq. 1-16 and 21-23."""
  segments = case.batch.get("segments")
  out = small.forward(case.model, case.batch["tokens"][:, :T],
                      None if segments is None else segments[:, :T])
  assert out.logits_BTV.dtype == jnp.float32
  assert len(out.mtp_logits) == case.cfg.mtp_depth
  for b, expected in enumerate(case.loss.outputs):
    assert_close(out.logits_BTV[b], expected.logits)
    for k, mtp in enumerate(expected.mtp_logits, start=1):
      assert_close(out.mtp_logits[k - 1][b, :T - k], mtp)


def test_loss(case, ours):
  """Oracle: numpy transcription of eq. 17-20, 24, 25, and the ablations' balance losses."""
  (total, aux), _ = ours
  expected = case.loss
  assert_close(total, expected.total)
  assert_close(aux["loss_sum"] / expected.tokens, expected.main)
  assert_close(aux["mtp_loss_sum"] / expected.tokens, expected.mtp)
  for name in ("balance", "batch_balance", "expert_balance"):
    assert_close(aux[name], getattr(expected, name))
  assert int(aux["tokens"]) == expected.tokens
  assert aux["mtp_tokens"].tolist() == expected.mtp_tokens
  assert int(aux["correct"]) == expected.correct
  if case.cfg.moe_layers:
    np.testing.assert_array_equal(aux["counts_LE"], expected.counts)


def test_gradients(case, ours):
  """Oracle: central finite differences of the float64 loss, one random direction a parameter."""
  gradients = nnx.to_pure_dict(ours[1])
  leaves, tree = jax.tree.flatten(case.params)
  found, found_tree = jax.tree.flatten(gradients)
  assert tree == found_tree
  names = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(gradients)]
  rng, step = np.random.default_rng(1), 1e-6
  for i, (name, x, g) in enumerate(zip(names, leaves, found, strict=True)):
    direction = np.sign(np.asarray(g, np.float64)) * rng.uniform(0.5, 1.5, x.shape)
    ends = []
    for sign in (1, -1):
      moved = leaves[:i] + [x + sign * step * direction] + leaves[i + 1:]
      ends.append(case.oracle_loss(jax.tree.unflatten(tree, moved)).total)
    expected = (ends[0] - ends[1]) / (2 * step)
    actual = float(np.sum(np.asarray(g, np.float64) * direction))
    # The direction follows the gradient's signs, so nothing cancels in either number.
    assert expected > 0, f"{name} does not matter"
    assert abs(actual - expected) <= GRADIENT * expected, (name, actual, expected)
