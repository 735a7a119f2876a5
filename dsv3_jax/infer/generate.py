"""Completions of a batch of prompts: prefill once, then decode in compiled runs of steps.

    generator = Generator(cfg.model, params, buffers)
    done = generator([[0, 5, 7], [0, 9]], 64, Sampling(temperature=0.8, top_p=0.95), stop=(1,))
    done[0].tokens, done[0].finish

Shapes are rounded up to a few sizes (prompt, room in the cache), so that calls of many lengths
compile a handful of programs; the cache is donated from step to step. The engine that serves many
requests at once is another matter (`infer/engine.py`): here all rows begin together.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import forward as forward_lib
from dsv3_jax.infer import parameters, sampler
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.sampler import Rows, Sampling

_LEAST = 32  # smallest rounded size of a prompt and of a cache
_RUN = 32  # decode steps in one call of the compiled function


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was written after one prompt.

  Attributes:
    tokens: without the stop token.
    logprobs: natural logarithm of each token's probability under what it was drawn from.
    finish: "stop" (a stop token was drawn) or "length".
  """

  tokens: list[int]
  logprobs: list[float]
  finish: str


class State(NamedTuple):
  """Between two runs of steps."""

  cache: Cache
  token_B: jax.Array  # int32, drawn and not yet in the cache
  alive_B: jax.Array  # bool
  seen_BV: jax.Array | None  # bool, for the repetition penalty


def rounded(size: int, least: int = _LEAST) -> int:
  """The next power of two, or three quarters of one: a few sizes for all lengths."""
  power = max(least, 1 << (max(size, 1) - 1).bit_length())
  return power * 3 // 4 if power * 3 // 4 >= max(size, least) else power


class Generator:
  """A model that writes.

  Args:
    cfg: the model.
    params, buffers: of `nnx.split(model, nnx.Param, RouterBias)`.
    runtime: implementations; runtime.compute_dtype is that of weights and cache.
    cache_dtype: float32, bfloat16 or fp8 in place of it.
  """

  def __init__(self, cfg: config.Model, params: Any, buffers: Any,
               runtime: config.Runtime = config.Runtime(), cache_dtype: str = ""):
    self.cfg, self.runtime = cfg, runtime
    self.cache_dtype = cache_dtype or runtime.compute_dtype
    prepare = jax.jit(functools.partial(parameters.prepare, cfg=cfg, dtype=runtime.compute_dtype))
    self.weights: Parameters = prepare(params, buffers)

  def __call__(self, prompts: Sequence[Sequence[int]], steps: int,
               sampling: Sampling | Sequence[Sampling] = sampler.GREEDY, stop: Sequence[int] = (),
               bias_V: np.ndarray | None = None,
               on_tokens: Callable[[int, list[int]], bool | None] | None = None
               ) -> list[Completion]:
    """Continues each prompt by up to `steps` tokens.

    Args:
      prompts: token ids, at least one each.
      steps: most new tokens, at least one.
      sampling: of all rows or one each.
      stop: tokens that end a completion.
      bias_V: added to the logits, -inf forbids a token; None: nothing.
      on_tokens: called with a row's number and its newest tokens, as they come; True ends the row.

    Raises:
      ConfigError: no prompt, an empty one, a token outside the vocabulary, no step, or another
        number of settings than prompts.
    """
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    self._check(prompts, steps, settings)
    r = sampler.rows(settings)
    B, longest = len(prompts), max(map(len, prompts))
    tokens_BT = np.zeros((B, rounded(longest)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
      row[:len(prompt)] = prompt
    new_B = np.array([len(p) for p in prompts], np.int32)
    cache = cache_lib.make(self.cfg, B, rounded(longest + steps), self.cache_dtype)
    seen_BV = None
    if (r.repetition_B != 1).any():
      seen_BV = np.zeros((B, self.cfg.vocab_size), bool)
      for row, prompt in zip(seen_BV, prompts, strict=True):
        row[list(prompt)] = True
    stop_S = np.array(sorted(set(stop)), np.int32)
    state, token_B, logprob_B = _prefill(self.weights, cache, tokens_BT, new_B, seen_BV, r, bias_V,
                                         stop_S, self.cfg, self.runtime)
    found: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[float]] = [[] for _ in prompts]
    ended = [False] * B
    ends = frozenset(stop)

    def take(tokens_NB, logprobs_NB) -> None:
      for b in range(B):
        fresh = []
        for token, logprob in zip(tokens_NB[:, b].tolist(), logprobs_NB[:, b].tolist(),
                                  strict=True):
          if ended[b] or len(found[b]) == steps:
            break
          if token in ends:
            ended[b] = True
            break
          fresh.append(token)
          found[b].append(token)
          logprobs[b].append(logprob)
        if on_tokens is not None and fresh and on_tokens(b, fresh):
          ended[b] = True

    take(np.asarray(token_B)[None], np.asarray(logprob_B)[None])
    done = 1
    while done < steps and not all(ended):
      count = min(1 if on_tokens is not None else _RUN, steps - done)
      state, tokens_NB, logprobs_NB, ran = _decode(
          self.weights, state, r, bias_V, stop_S, np.int32(count), self.cfg, self.runtime,
          _RUN if on_tokens is None else 1)
      ran = int(ran)
      take(np.asarray(tokens_NB)[:ran], np.asarray(logprobs_NB)[:ran])
      done += count
    return [Completion(t, p, "stop" if e else "length")
            for t, p, e in zip(found, logprobs, ended, strict=True)]

  def _check(self, prompts, steps: int, settings: list[Sampling]) -> None:
    if not prompts:
      raise ConfigError("no prompts; give at least one")
    if steps < 1:
      raise ConfigError(f"steps={steps} must be at least 1")
    if len(settings) != len(prompts):
      raise ConfigError(f"{len(settings)} sampling settings for {len(prompts)} prompts; give one, "
                        "or one each")
    for i, prompt in enumerate(prompts):
      if not len(prompt):
        raise ConfigError(f"prompt {i} is empty; begin it with the token for a text's beginning")
      if not 0 <= min(prompt) <= max(prompt) < self.cfg.vocab_size:
        raise ConfigError(f"prompt {i} holds token {max(prompt)} or {min(prompt)}, outside the "
                          f"vocabulary of {self.cfg.vocab_size}")


def _chosen(logits_BV, r: Rows, seen_BV, bias_V, position_B):
  """Token [B] and its log-probability [B]."""
  bias_BV = None if bias_V is None else bias_V[None]
  scores_BV = sampler.scores(logits_BV, r, seen_BV, bias_BV)
  token_B = sampler.draw(scores_BV, r.seed_B, position_B)
  return token_B, jnp.take_along_axis(scores_BV, token_B[:, None], axis=1)[:, 0]


def _marked(seen_BV, token_B):
  if seen_BV is None:
    return None
  return seen_BV.at[jnp.arange(token_B.shape[0]), token_B].set(True)


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"), donate_argnames=("cache",))
def _prefill(weights, cache: Cache, tokens_BT, new_B, seen_BV, r: Rows, bias_V, stop_S,
             cfg: config.Model, runtime: config.Runtime):
  h_BTD, _, cache = forward_lib.forward(weights, cache, tokens_BT, new_B, cfg, runtime, fresh=True)
  logits_BV = forward_lib.readout(weights, forward_lib.last(h_BTD, new_B), cfg)
  token_B, logprob_B = _chosen(logits_BV, r, seen_BV, bias_V, new_B)
  alive_B = ~(token_B[:, None] == stop_S).any(1)
  return State(cache, token_B, alive_B, _marked(seen_BV, token_B)), token_B, logprob_B


@functools.partial(jax.jit, static_argnames=("cfg", "runtime", "most"), donate_argnames=("state",))
def _decode(weights, state: State, r: Rows, bias_V, stop_S, count, cfg: config.Model,
            runtime: config.Runtime, most: int):
  """Up to `count` <= `most` steps, fewer when no row is alive: state, [most, B] twice, steps."""
  B = state.token_B.shape[0]

  def step(carry):
    i, state, tokens_NB, logprobs_NB = carry
    new_B = state.alive_B.astype(jnp.int32)
    h_BTD, _, cache = forward_lib.forward(weights, state.cache, state.token_B[:, None], new_B, cfg,
                                          runtime)
    logits_BV = forward_lib.readout(weights, h_BTD[:, 0], cfg)
    token_B, logprob_B = _chosen(logits_BV, r, state.seen_BV, bias_V, cache.lengths_B)
    token_B = jnp.where(state.alive_B, token_B, state.token_B)
    alive_B = state.alive_B & ~(token_B[:, None] == stop_S).any(1)
    state = State(cache, token_B, alive_B, _marked(state.seen_BV, token_B))
    return i + 1, state, tokens_NB.at[i].set(token_B), logprobs_NB.at[i].set(logprob_B)

  start = (jnp.int32(0), state, jnp.zeros((most, B), jnp.int32), jnp.zeros((most, B)))
  ran, state, tokens_NB, logprobs_NB = jax.lax.while_loop(
      lambda c: (c[0] < count) & c[1].alive_B.any(), step, start)
  return state, tokens_NB, logprobs_NB, ran
