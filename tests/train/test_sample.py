"""Sampling."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.train import sample, state
from tests.train import fakes

CFG = fakes.small_config()


@functools.cache
def _model():
  model = state.build_model(CFG.model, 1)
  model.head_DV[...] = 40 * model.head_DV[...]  # peaked, so that arg max has no ties
  return state.split(model)


@functools.cache
def _sampler():
  return sample.make_sampler(_model()[0], CFG.runtime)


def _logits(tokens):
  """fp32 [V] after `tokens`, by a plain forward pass of just that length."""
  forward = jax.jit(lambda variables, tokens_BT: nnx.merge(_model()[0], *variables)(tokens_BT))
  return forward(_model()[1:], np.array([tokens], np.int32)).logits_BTV[0, -1]


PROMPTS = [[5, 9, 11], [8], [20, 21, 22, 23, 24, 25]]


def test_greedy_is_the_rollout():
  """Oracle: forward passes over growing unpadded prompts, arg max of the last position."""
  _, params, buffers = _model()
  got = sample.generate(_sampler(), params, buffers, PROMPTS, 3, length=12)
  assert [len(new) for new in got] == [3, 3, 3]
  for prompt, new in zip(PROMPTS[:2], got, strict=False):
    tokens = list(prompt)
    for expected in new[:2]:
      assert int(_logits(tokens).argmax()) == expected
      tokens.append(expected)


def test_temperature_draws_from_the_softmax():
  """Oracle: frequencies of 4,096 draws against the softmax of the forward pass."""
  _, params, buffers = _model()
  prompts = [[5, 9, 11]] * 4096
  new = sample.generate(_sampler(), params, buffers, prompts, 1, temperature=2.0, length=4)
  counts = np.bincount([n[0] for n in new], minlength=64) / 4096
  np.testing.assert_allclose(counts, jax.nn.softmax(_logits([5, 9, 11]) / 2.0), atol=0.035)
  assert (counts > 0).sum() > 3


def test_padding_ids_are_never_drawn():
  """Oracle: the plain forward pass's arg max among the tokenizer's ids; draws stay among them."""
  graphdef, params, buffers = _model()
  logits_V = np.asarray(_logits([5, 9, 11]))
  size = int(logits_V.argmax())  # the most likely id is the first that pads
  assert size > 1
  sampler = sample.make_sampler(graphdef, CFG.runtime, size)
  draw = lambda prompts, temperature: sample.generate(sampler, params, buffers, prompts, 1,
                                                      temperature, length=4)
  assert draw([[5, 9, 11]], 0.0) == [[int(logits_V[:size].argmax())]]
  drawn = draw([[5, 9, 11]] * 512, 50.0)
  assert 0 <= min(drawn)[0] and max(drawn)[0] < size and len(set(map(tuple, drawn))) > 1


def test_rows_seeds_and_stops():
  """Law: a row does not depend on its neighbours; a seed repeats; a stop token cuts."""
  _, params, buffers = _model()
  draw = lambda prompts, **kw: sample.generate(_sampler(), params, buffers, prompts, 3,
                                               length=12, **({"temperature": 1.0} | kw))
  three = draw(PROMPTS)
  other = draw([PROMPTS[0], [1, 2, 3], [4]])
  assert three == draw(PROMPTS) and three[0] == other[0]
  assert three != draw(PROMPTS, seed=1)
  assert draw(PROMPTS, stop=[three[0][1]])[0] == three[0][:three[0].index(three[0][1])]
  with pytest.raises(ValueError, match="padded length 5"):
    sample.generate(_sampler(), params, buffers, PROMPTS, 3, length=5)
