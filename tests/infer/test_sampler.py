"""Choosing tokens from logits."""

import numpy as np
import pytest
from scipy import stats

from dsv3_jax.config import ConfigError
from dsv3_jax.infer import sampler
from dsv3_jax.infer.sampler import Sampling
from tests.quick import jit

V = 17


def logits(rows, seed=0):
  return np.random.default_rng(seed).normal(size=(rows, V)).astype(np.float32) * 3


@pytest.mark.parametrize("settings", [
    Sampling(temperature=0.7), Sampling(temperature=1.5, top_k=4), Sampling(1.0, top_p=0.6),
    Sampling(1.0, min_p=0.2), Sampling(0.9, top_k=6, top_p=0.8, min_p=0.1),
    Sampling(1.0, top_p=1e-6), Sampling(1.0, repetition_penalty=1.7),
    Sampling(0.8, top_k=5, repetition_penalty=0.5)])
def test_against_transformers(settings):
  """Oracle: transformers' logits processors, in its order."""
  torch = pytest.importorskip("torch")
  from transformers.generation import logits_process as theirs

  x = logits(3)
  seen = np.random.default_rng(1).integers(0, V, (3, 6))
  scores = torch.tensor(x)
  if settings.repetition_penalty != 1:
    scores = theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)(
        torch.tensor(seen), scores)
  scores = theirs.TemperatureLogitsWarper(settings.temperature)(None, scores)
  if settings.top_k:
    scores = theirs.TopKLogitsWarper(settings.top_k)(None, scores)
  if settings.top_p < 1:
    scores = theirs.TopPLogitsWarper(settings.top_p)(None, scores)
  if settings.min_p:
    scores = theirs.MinPLogitsWarper(settings.min_p)(None, scores)
  seen_BV = np.zeros((3, V), bool)
  np.put_along_axis(seen_BV, seen, True, axis=1)
  found = np.asarray(sampler.scores(x, sampler.rows([settings] * 3), seen_BV))
  expected = torch.log_softmax(scores, -1).numpy()
  assert (np.isfinite(found) == np.isfinite(expected)).all()
  kept = np.isfinite(expected)
  np.testing.assert_allclose(found[kept], expected[kept], rtol=1e-4, atol=1e-5)


def test_rows_have_their_own_settings():
  """Law: a row of a mixed batch is what it is alone; greedy rows keep one token."""
  settings = [Sampling(), Sampling(1.0, top_k=3), Sampling(0.5), Sampling(2.0, top_p=0.5)]
  x = logits(4)
  both = np.asarray(sampler.scores(x, sampler.rows(settings)))
  for i, s in enumerate(settings):
    np.testing.assert_allclose(both[i], sampler.scores(x[i:i + 1], sampler.rows([s]))[0], rtol=1e-6)
  assert np.flatnonzero(np.isfinite(both[0])).tolist() == [x[0].argmax()]
  assert np.isfinite(both[1]).sum() == 3


def test_frequencies():
  """Oracle: a chi-square test of 20,000 draws against the softmax, p above 1e-4."""
  settings = Sampling(temperature=1.3, top_k=9, seed=5)
  scores_1V = np.asarray(sampler.scores(logits(1, seed=2), sampler.rows([settings])))
  n = 20_000
  draws = np.asarray(jit(sampler.draw)(
      np.broadcast_to(scores_1V, (n, V)), np.full(n, 5, np.uint32), np.arange(n)))
  kept = np.isfinite(scores_1V[0])
  counts = np.bincount(draws, minlength=V)
  assert counts[~kept].sum() == 0
  expected = np.exp(scores_1V[0][kept].astype(np.float64))
  assert stats.chisquare(counts[kept], n * expected / expected.sum()).pvalue > 1e-4


def test_a_draw_depends_on_seed_and_place_alone():
  """Law: the same request draws the same token in any row of any batch."""
  x = np.asarray(sampler.scores(logits(1), sampler.rows([Sampling(1.0)])))
  alone = sampler.draw(x, np.array([9], np.uint32), np.array([30]))
  many = sampler.draw(np.repeat(x, 4, 0), np.array([3, 9, 9, 9], np.uint32),
                      np.array([30, 30, 31, 30]))
  assert many[1] == alone[0] == many[3]
  draws = sampler.draw(np.repeat(x, 64, 0), np.full(64, 9, np.uint32), np.arange(64))
  assert len(set(np.asarray(draws).tolist())) > 1


def test_bias_forbids():
  """Law: -inf in the bias forbids a token to greedy and to drawn rows."""
  x = logits(2)
  bias = np.zeros((1, V), np.float32)
  bias[0, x.argmax(-1)] = -np.inf
  found = np.asarray(sampler.scores(x, sampler.rows([Sampling(), Sampling(1.0)]), None, bias))
  assert not np.isfinite(found[:, x.argmax(-1)]).any()
  assert np.isfinite(found).any(1).all()


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1},
                                     {"min_p": 1.5}, {"repetition_penalty": 0.0}, {"seed": -1}])
def test_errors(changes):
  """Law: what cannot be is said, with its name and value."""
  with pytest.raises(ConfigError, match=f"{next(iter(changes))}="):
    Sampling(**changes)
