"""GRPO's objective and its gradient, and how outputs become a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.posttrain import groups, objective
from tests.model import small
from tests.quick import jit


def transcription(logprob, old, ref, advantage, lengths, cfg):
  """Eq. 26 and 27 in numpy, output after output; lists of arrays, one an output."""
  total, tokens = 0.0, sum(lengths)
  for lp, o, r, a in zip(logprob, old, ref, advantage):
    if cfg.ratio == "sequence":
      lp, o, r = (np.array([x.sum()]) for x in (lp, o, r))
    ratio, p = np.exp(lp - o), np.exp(r - lp)
    each = (np.minimum(ratio * a, np.clip(ratio, 1 - cfg.clip_low, 1 + cfg.clip_high) * a)
            - cfg.kl * (p - np.log(p) - 1))
    weight = 1 / (len(lengths) * len(each)) if cfg.mean == "sequence" else 1 / tokens
    total += weight * each.sum()
  return -total


LENGTHS = (3, 1, 4, 2)


def made(seed, spread):
  rng = np.random.default_rng(seed)
  old = [rng.normal(-2, 1, n) for n in LENGTHS]
  new = [o + rng.normal(0, spread, len(o)) for o in old]
  ref = [o + rng.normal(0, 0.3, len(o)) for o in old]
  return new, old, ref


def rows(parts, advantage, cfg):
  """The outputs in two rows with prompts and padding between: arrays [2, 12]."""
  outputs = [groups.Output([7] * (i + 1), [8] * n, o, r, a)
             for i, (n, o, r, a) in enumerate(zip(LENGTHS, parts[1], parts[2], advantage))]
  batch = groups.batch([[outputs[0], outputs[1]], [outputs[2], outputs[3]]], 2, 13, 0, cfg)
  new = np.zeros((2, 13), np.float32)
  new[batch["mask"] > 0] = np.concatenate(parts[0])
  return batch, new


@pytest.mark.parametrize("changes", [
    {}, {"ratio": "sequence"}, {"mean": "token"}, {"clip_high": 0.28, "clip_low": 0.1},
    {"kl": 0.0}])
@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_against_a_transcription(changes, spread):
  """Oracle: the equations in numpy, and their difference quotients; ratio 1 (spread 0), clipped on
  both sides (0.5), a group without variance (two advantages 0)."""
  cfg = config.replace(config.GRPO(), **changes)
  advantage = [1.3, -0.8, 0.0, -1.1]
  parts = made(1, spread)
  batch, new = rows(parts, advantage, cfg)

  def ours(new):
    loss, more = objective.grpo(new[:, 1:], *(batch[k][:, 1:] for k in (
        "old", "ref", "advantage", "weight", "segments")), cfg)
    return loss, more

  if cfg.mean == "token" and cfg.ratio == "token":
    np.testing.assert_allclose(batch["weight"][batch["mask"] > 0], 0.1)
  (loss, more), gradient = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(new))
  np.testing.assert_allclose(loss, transcription(*parts, advantage, LENGTHS, cfg), rtol=2e-5,
                             atol=1e-6)
  assert not gradient[np.asarray(batch["mask"]) == 0].any()
  found, eps = np.asarray(gradient)[batch["mask"] > 0], 1e-6
  flat = np.concatenate(parts[0])
  for i in range(len(flat)):
    ends = []
    for sign in (1, -1):
      moved = flat.copy()
      moved[i] += sign * eps
      moved = np.split(moved, np.cumsum(LENGTHS)[:-1])
      ends.append(transcription(moved, *parts[1:], advantage, LENGTHS, cfg))
    np.testing.assert_allclose(found[i], (ends[0] - ends[1]) / (2 * eps), rtol=1e-3, atol=2e-5)
  clipped = float(more["clipped_low"] + more["clipped_high"])
  assert (clipped == 0) == (spread == 0) and (more["drift"] == 0) == (spread == 0)


def test_advantages():
  """Oracle: eq. 28 by hand; rewards all alike have no advantage and no nan."""
  reward_NG = np.array([[1, 0, 0, 1], [1, 1, 1, 1], [0.1, 0.1, 0.1, 0.1], [1, 0, 0, 0]], float)
  found, some = groups.advantages(reward_NG, config.GRPO())
  np.testing.assert_allclose(found[0], [1, -1, -1, 1])
  assert not found[1:3].any() and some.tolist() == [True, False, False, True]
  np.testing.assert_allclose(found[3], np.array([3, -1, -1, -1]) / 3**0.5)
  plain, _ = groups.advantages(reward_NG, config.replace(config.GRPO(), normalize=False))
  np.testing.assert_allclose(plain[3], [0.75, -0.25, -0.25, -0.25])


def test_packing():
  """Law: each output is in one row, whole, and no row is longer than allowed."""
  rng = np.random.default_rng(0)
  outputs = [groups.Output([1] * int(a), [2] * int(b), [0.0] * int(b), [0.0] * int(b), 1.0)
             for a, b in rng.integers(1, 12, (40, 2))]
  found = groups.pack(outputs, 24)
  assert sorted(id(o) for row in found for o in row) == sorted(map(id, outputs))
  size = [sum(len(o.prompt) + len(o.tokens) for o in row) for row in found]
  assert max(size) <= 24 and len(found) <= 1.2 * sum(size) / 24 + 1
  with pytest.raises(ValueError, match="an output of 30 tokens does not fit a sequence of 24"):
    groups.pack([groups.Output([1] * 20, [2] * 10, [0.0] * 10, [0.0] * 10, 1.0)], 24)


def test_of_a_model():
  """Oracle: log_softmax of full logits, outputs each in a row of its own: packing changes nothing;
  at ratio 1 without KL the gradient is that of -advantage * weight * log-probability."""
  cfg = config.replace(config.GRPO(), temperature=0.7, kl=0.0)
  graphdef, params, buffers = small.split(small.build(small.BASE, seed=3))
  rng = np.random.default_rng(2)
  V = small.BASE.vocab_size
  outputs = [groups.Output(rng.integers(0, V, 3).tolist(), rng.integers(0, V, n).tolist(),
                           [0.0] * n, [0.0] * n, a)
             for n, a in zip(LENGTHS, [1.0, -1.0, 0.5, -0.5])]
  packed = groups.batch(groups.pack(outputs, 16), 2, 17, 0, cfg)
  apart = groups.batch([[o] for o in outputs], 4, 17, 0, cfg)
  quiet = config.Loss(sequence_balance=0.0)

  def loss(params, batch):
    model = nnx.merge(graphdef, params, buffers)
    own, _, _ = objective.predicted(model, batch, cfg, small.RUNTIME)
    old = jnp.pad(jax.lax.stop_gradient(own), ((0, 0), (1, 0)))
    batch = batch | {"old": old, "ref": old}
    total, aux = objective.loss_fn(model, batch, cfg=cfg, loss=quiet, mtp_weight=0.0,
                                   runtime=small.RUNTIME, denominator=1.0)
    plain = -jnp.sum(batch["weight"][:, 1:] * batch["advantage"][:, 1:] * own)
    return total, (aux, plain, own)

  def plain(params, batch):
    return loss(params, batch)[1][1]

  both = jit(lambda p, b: (jax.value_and_grad(loss, has_aux=True)(p, b), jax.grad(plain)(p, b)))
  results = [both(params, {k: jnp.asarray(v) for k, v in b.items()}) for b in (packed, apart)]
  ((_, (aux, _, own)), gradient), by_hand = results[1]
  assert aux["tokens"] == sum(LENGTHS) and abs(aux["more"]["drift"]) == 0
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, gradient, by_hand)
  jax.tree.map(close, gradient, results[0][0][1])
  close(results[0][0][0][1][0]["more"]["entropy"], aux["more"]["entropy"])
