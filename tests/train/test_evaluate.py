"""Validation numbers."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.train import evaluate
from tests.train import fakes


def test_averages_and_bits_per_byte():
  """Oracle: by hand: 2 batches of unequal weight."""
  batches = [{"tokens": np.full((2, 3), 7, np.int32),
              "mask": np.array([[0, 1, 1], [0, 1, 0]], np.int8)},
             {"tokens": np.full((2, 3), 9, np.int32),
              "mask": np.array([[0, 1, 0], [0, 0, 0]], np.int8)}]
  sizes = np.zeros(10, np.int32)
  sizes[[7, 9]] = 2, 5
  n_bytes = sum(evaluate.target_bytes(b, sizes) for b in batches)
  assert n_bytes == 3 * 2 + 1 * 5

  def sums(params, buffers, batch):
    n = float(batch["mask"].sum())
    return {"loss_sum": jnp.float32(n * params[int(batch["tokens"][0, 0])]), "tokens": n,
            "mtp_loss_sum": jnp.array([n]), "mtp_tokens": jnp.array([n / 2]), "correct": n / 2,
            "counts_LE": jnp.array([[n, 0.0]])}

  found = evaluate.evaluate(sums, {7: 1.0, 9: 3.0}, None, batches, n_bytes)
  assert found["loss"] == pytest.approx((3 * 1 + 1 * 3) / 4)
  assert found["bits_per_byte"] == pytest.approx(6 / np.log(2) / 11)
  assert found["mtp_loss"] == [pytest.approx(2.0)] and found["accuracy"] == pytest.approx(0.5)
  assert found["max_vio"] == pytest.approx(1.0)


def test_the_real_model_uniform_logits():
  """Oracle: a model whose head is zero has loss ln V, log2(V) bits a byte of one-byte tokens."""
  import jax

  from dsv3_jax.train import optim, state

  cfg = fakes.small_config()
  graphdef, _, init = state.initializer(lambda: state.build_model(cfg.model, 0),
                                        optim.make_optimizer(cfg.optim))
  made = init()
  params = dict(made.params, head_DV=jnp.zeros_like(made.params["head_DV"]))
  batch = jax.device_put(fakes.FakeCorpus(cfg).validation_batches(4, 1)[0])
  found = evaluate.evaluate(evaluate.make_evaluate(graphdef, cfg), params, made.buffers, [batch],
                            4 * 16)
  assert found["loss"] == pytest.approx(np.log(fakes.VOCABULARY), rel=1e-6)
  assert found["bits_per_byte"] == pytest.approx(np.log2(fakes.VOCABULARY), rel=1e-6)
  assert found["counts_LE"].sum(-1).tolist() == [4 * 16 * 2, 4 * 15 * 2]
