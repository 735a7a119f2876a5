"""Completions of prompts."""

import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer.generate import Generator, rounded
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.interop import huggingface
from tests.model import small
from tests.quick import jit

# torch multiplies groups whose rows are whole 16 bytes.
CFG = config.replace(small.BASE, **{"moe.ffn_dim": 8})
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7, 9]]
STEPS = 12


@pytest.fixture(scope="module")
def model():
  return small.build(CFG, seed=5)


@pytest.fixture(scope="module")
def generator(model):
  _, params, buffers = small.split(model)
  return Generator(CFG, params, buffers, small.RUNTIME)


def test_greedy_equals_rollout(model, generator):
  """Oracle: the argmax of whole forward passes, row by row of a ragged batch."""
  graphdef, params, buffers = small.split(model)
  whole = jit(lambda tokens: nnx.merge(graphdef, params, buffers)(tokens, None, small.RUNTIME))
  found = generator(PROMPTS, STEPS)
  assert [f.finish for f in found] == ["length"] * 3
  for prompt, f in zip(PROMPTS, found):
    tokens, logprobs, padded = list(prompt), [], np.zeros((1, 24), np.int32)
    for _ in range(STEPS):
      padded[0, :len(tokens)] = tokens  # what is right of a position cannot reach it
      logits_V = np.asarray(whole(padded).logits_BTV)[0, len(tokens) - 1]
      tokens.append(int(logits_V.argmax()))
      logprobs.append(logits_V.max() - np.log(np.exp(logits_V).sum()))
    assert f.tokens == tokens[len(prompt):]
    np.testing.assert_allclose(f.logprobs, logprobs, atol=1e-5)


def test_greedy_equals_transformers(model, generator, tmp_path):
  """Oracle: transformers' generate on the exported model, token for token."""
  torch = pytest.importorskip("torch")
  from transformers import DeepseekV3ForCausalLM

  huggingface.save(model, tmp_path)
  theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
  found = generator(PROMPTS, STEPS)
  for prompt, f in zip(PROMPTS, found):
    out = theirs.generate(torch.tensor([prompt]), max_new_tokens=STEPS, do_sample=False,
                          pad_token_id=0, eos_token_id=None)
    assert f.tokens == out[0, len(prompt):].tolist()


def test_batched_equals_solo(generator):
  """Law: a request's tokens, drawn or not, do not depend on its neighbours."""
  settings = [Sampling(1.0, seed=1), Sampling(0.7, top_k=5, seed=2), Sampling()]
  together = generator(PROMPTS, STEPS, settings)
  for prompt, s, f in zip(PROMPTS, settings, together):
    assert generator([prompt], STEPS, s)[0].tokens == f.tokens
  again = generator(PROMPTS, STEPS, settings)
  assert again == together


def test_stop_and_stream(generator):
  """Law: a stop token ends its row alone and is not given; streamed tokens are those returned."""
  plain = generator(PROMPTS, STEPS)
  stop = plain[0].tokens[4]
  streamed = [[] for _ in PROMPTS]
  found = generator(PROMPTS, STEPS, stop=[stop],
                    on_tokens=lambda row, tokens: streamed[row].extend(tokens))
  for before, f, s in zip(plain, found, streamed):
    end = before.tokens.index(stop) if stop in before.tokens else STEPS
    assert f.tokens == before.tokens[:end] == s
    assert f.finish == ("stop" if stop in before.tokens else "length")


def test_bfloat16_and_repetition(model):
  """Law: other dtypes and a penalty run; a penalty repeats less than none."""
  _, params, buffers = small.split(model)
  made = Generator(CFG, params, buffers, config.replace(small.RUNTIME, compute_dtype="bfloat16"))
  plain = made(PROMPTS, STEPS)[0].tokens
  penalised = made(PROMPTS, STEPS, Sampling(repetition_penalty=100.0))[0].tokens
  assert len(plain) == len(penalised) == STEPS
  assert len(set(penalised)) == STEPS and not set(penalised) & set(PROMPTS[0])


def test_sizes():
  """Printed example of the rounding, and its law: few sizes, at most a third too large."""
  assert [rounded(n) for n in (1, 32, 33, 48, 49, 65, 97, 1000)] == [32, 32, 48, 48, 64, 96, 128,
                                                                    1024]
  assert all(n <= rounded(n) <= max(32, n * 1.5) for n in range(1, 3000))


@pytest.mark.parametrize("args, words", [
    (([], 1), "no prompts"), (([[1], []], 1), "prompt 1 is empty"), (([[1]], 0), "steps=0"),
    (([[23]], 1), "vocabulary of 23"), (([[1]], 1, [Sampling()] * 2), "2 sampling settings")])
def test_errors(generator, args, words):
  """Law: what cannot be is said."""
  with pytest.raises(ConfigError, match=words):
    generator(*args)
