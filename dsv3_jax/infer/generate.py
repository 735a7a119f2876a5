"""Completions of a batch of prompts: prefill once, then decode in compiled runs of rounds.

    generator = Generator(cfg.model, params, buffers)
    done = generator([[0, 5, 7], [0, 9]], 64, Sampling(temperature=0.8, top_p=0.95), stop=(1,))
    done[0].tokens, done[0].finish

Shapes are rounded up to a few sizes (prompt, room in the cache), so that calls of many lengths
compile a handful of programs; the cache is donated from call to call. Here all rows begin
together.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import decode, parameters, sampler
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.sampler import Sampling

_LEAST = 32  # smallest rounded size of a prompt and of a cache
_RUN = 32  # rounds in one call of the compiled function


@dataclasses.dataclass(frozen=True)
class Completion:
  """What was written after one prompt.

  Attributes:
    tokens: without the stop token.
    logprobs: natural logarithm of each token's probability under the model itself: temperature 1,
      nothing added or cut off.
    finish: "stop" (a stop token was drawn, or `on_tokens` said so) or "length".
    rounds: passes of the main model that drew them, the prompt's not counted.
    accepted: in how many of these the first draft was kept, the second one too, ...
  """

  tokens: list[int]
  logprobs: list[float]
  finish: str
  rounds: int = 0
  accepted: tuple[int, ...] = ()


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
    prepare = jax.jit(functools.partial(parameters.prepare, cfg=cfg, dtype=runtime.compute_dtype,
                                        impl=runtime.fp8_impl))
    self.weights: Parameters = prepare(params, buffers)

  def __call__(self, prompts: Sequence[Sequence[int]], steps: int,
               sampling: Sampling | Sequence[Sampling] = sampler.GREEDY, stop: Sequence[int] = (),
               bias_V: np.ndarray | None = None,
               on_tokens: Callable[[int, list[int]], bool | None] | None = None, drafts: int = 0
               ) -> list[Completion]:
    """Continues each prompt by up to `steps` tokens.

    Args:
      prompts: token ids, at least one each.
      steps: most new tokens, at least one.
      sampling: of all rows or one each.
      stop: tokens that end a completion.
      bias_V: added to the logits, -inf forbids a token; None: nothing.
      on_tokens: called with a row's number and its newest tokens, as they come; True ends the row.
      drafts: tokens that the MTP modules draft in each round (speculative decoding); the greedy
        tokens are the same (but where rounding decides between two), and others are drawn from the
        same distribution.

    Raises:
      ConfigError: no prompt, an empty one, a token outside the vocabulary, no step, another number
        of settings than prompts, or drafts of a model without MTP.
    """
    settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    self._check(prompts, steps, settings, drafts)
    r = sampler.rows(settings)
    B, longest = len(prompts), max(map(len, prompts))
    tokens_BT = np.zeros((B, rounded(longest)), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
      row[:len(prompt)] = prompt
    new_B = np.array([len(p) for p in prompts], np.int32)
    cache = cache_lib.make(self.cfg, B, rounded(longest + steps + drafts), self.cache_dtype)
    seen_BV = None
    if (r.repetition_B != 1).any():
      seen_BV = np.zeros((B, self.cfg.vocab_size), bool)
      for row, prompt in zip(seen_BV, prompts, strict=True):
        row[list(prompt)] = True
    ends = np.array(sorted(set(stop)), np.int32)
    static = dict(drafts=drafts, cfg=self.cfg, runtime=self.runtime)
    state, new = decode.prefill(self.weights, cache, tokens_BT, new_B, np.int32(steps), seen_BV, r,
                                bias_V, ends, **static)
    rows = [_Row(steps, frozenset(stop), drafts) for _ in prompts]
    _take(rows, new, on_tokens)
    for row in rows:  # the prompt's pass
      row.rounds = 0
    while not all(row.ended or row.full for row in rows):
      alive_B = np.array([not (row.ended or row.full) for row in rows])
      count = 1 if on_tokens is not None else _RUN
      state, new = decode.run(self.weights, state, alive_B, r, bias_V, ends, np.int32(count),
                              most=1 if on_tokens is not None else _RUN, **static)
      _take(rows, new, on_tokens)
    return [row.completion() for row in rows]

  def _check(self, prompts, steps: int, settings: list[Sampling], drafts: int) -> None:
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
    if drafts < 0:
      raise ConfigError(f"drafts={drafts} must not be negative")
    if drafts and not self.cfg.mtp_depth:
      raise ConfigError(f"drafts={drafts}: the model has no MTP module to draft with "
                        "(model.mtp_depth=0); leave drafts at 0")


class _Row:
  """What has come of one completion."""

  def __init__(self, steps: int, ends: frozenset[int], drafts: int):
    self.tokens: list[int] = []
    self.logprobs: list[float] = []
    self.ended, self.rounds = False, 0
    self._steps, self._ends, self._accepted = steps, ends, [0] * drafts

  @property
  def full(self) -> bool:
    return len(self.tokens) == self._steps

  def take(self, tokens: list[int], logprobs: list[float]) -> list[int]:
    """Takes a round's tokens; returns those that count."""
    self.rounds += 1
    for place in range(len(tokens) - 1):
      self._accepted[place] += 1
    before = len(self.tokens)
    for token, logprob in zip(tokens, logprobs, strict=True):
      if self.full:
        break
      if token in self._ends:
        self.ended = True
        break
      self.tokens.append(token)
      self.logprobs.append(logprob)
    return self.tokens[before:]

  def completion(self) -> Completion:
    return Completion(self.tokens, self.logprobs, "stop" if self.ended else "length", self.rounds,
                      tuple(self._accepted))


def _take(rows: list[_Row], new: decode.New, on_tokens) -> None:
  """Gives each row what `decode` drew for it."""
  count_NB, tokens_NBT, logprobs_NBT = (np.asarray(x) for x in new[:3])
  for b, row in enumerate(rows):
    fresh: list[int] = []
    for count, tokens_T, logprobs_T in zip(count_NB[:, b], tokens_NBT[:, b], logprobs_NBT[:, b],
                                           strict=True):
      if count and not (row.ended or row.full):
        fresh += row.take(tokens_T[:count].tolist(), logprobs_T[:count].tolist())
    if on_tokens is not None and fresh and on_tokens(b, fresh):
      row.ended = True
