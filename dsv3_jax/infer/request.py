"""What is asked of the engine, and what it says while it answers."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import sampler
from dsv3_jax.infer.sampler import Sampling

TOPS = 20  # most alternatives that are given with a token


class Constraint(Protocol):
  """Which tokens may come next; one object a request. What it raises ends that request."""

  def allowed(self) -> np.ndarray:
    """bool [V]."""

  def take(self, token: int) -> None:
    """Tells which token came."""


@dataclasses.dataclass(frozen=True)
class Request:
  """One completion.

  Attributes:
    prompt: token ids.
    most: new tokens at most.
    sampling: how they are chosen.
    stop: tokens that end it, and are not given.
    bias: token to what is added to its logit; -inf forbids it.
    presence, frequency: taken off the logit of a token that was written, once and each time.
    tops: likeliest tokens to give with each one.
    constraint: makes the request's constraint, or None.
    tag: for whoever reads the log.
  """

  prompt: tuple[int, ...]
  most: int
  sampling: Sampling = sampler.GREEDY
  stop: frozenset[int] = frozenset()
  bias: tuple[tuple[int, float], ...] = ()
  presence: float = 0.0
  frequency: float = 0.0
  tops: int = 0
  constraint: Callable[[], Constraint] | None = None
  tag: str = ""

  def check(self, cfg: config.Model, longest: int) -> None:
    """Raises ConfigError on what cannot be answered.

    Args:
      cfg: the model.
      longest: tokens that one request may have, prompt and new ones.
    """
    V = cfg.vocab_size
    if not self.prompt:
      raise ConfigError("the prompt has no token")
    if not 0 <= min(self.prompt) <= max(self.prompt) < V:
      raise ConfigError(f"the prompt holds token {max(self.prompt)} or {min(self.prompt)}, outside "
                        f"the vocabulary of {V}")
    if self.most < 1:
      raise ConfigError(f"max_tokens={self.most} must be at least 1")
    if len(self.prompt) + self.most > longest:
      raise ConfigError(f"the prompt's {len(self.prompt)} tokens and max_tokens={self.most} new "
                        f"ones are more than the {longest} that a request may have")
    if not 0 <= self.tops <= min(TOPS, V):
      raise ConfigError(f"logprobs={self.tops} must lie between 0 and {min(TOPS, V)}")
    for token, value in self.bias:
      if not 0 <= token < V:
        raise ConfigError(f"logit_bias names token {token}, outside the vocabulary of {V}")
      if value != value or value == float("inf"):
        raise ConfigError(f"logit_bias of token {token} is {value}; give a number")
    for name in ("presence", "frequency"):
      if not -2 <= getattr(self, name) <= 2:
        raise ConfigError(f"{name}_penalty={getattr(self, name)} must lie between -2 and 2")


@dataclasses.dataclass(frozen=True)
class Token:
  """A new token.

  Attributes:
    id: the token.
    logprob: natural logarithm of its probability under the model itself.
    tops: the likeliest tokens there with theirs.
  """

  id: int
  logprob: float
  tops: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
  """What became of a request since the last event.

  Attributes:
    tokens: new ones.
    finish: "" while it goes on, then "stop" (a stop token), "length", "error", or what it was
      cancelled with.
    error: in words, where finish is "error".
  """

  tokens: tuple[Token, ...] = ()
  finish: str = ""
  error: str = ""


class Job:
  """A request on its way; the engine's own but for `cancel`, `tokens` and `finish`.

  Attributes:
    request: what was asked.
    tokens: written so far.
    finish: as in `Event`.
    submitted, first, ended: times (`time.monotonic`), of the first token and the end, or None.
    preempted: how often its pages were taken away.
  """

  def __init__(self, request: Request, on_event: Callable[[Event], Any]):
    self.request, self.on_event = request, on_event
    self.tokens: list[int] = []
    self.finish = ""
    self.submitted = time.monotonic()
    self.first: float | None = None
    self.ended: float | None = None
    self.preempted = 0
    self.cancelled = ""
    self.rank = 0  # whose pages it has
    self.offer: Any = None  # of another engine, to take its pages from
    self.pages: list[int] = []
    self.written = 0  # tokens in the cache
    self.published = 0  # pages that others may find
    self.names: list[bytes] = []  # of its full pages, of `named` tokens
    self.named = 0
    self.bias_V: np.ndarray | None = None  # fp32 [V], what is added to its next logits
    self._fixed_V: np.ndarray | None = None
    self.constraint = request.constraint() if request.constraint else None

  @property
  def whole(self) -> list[int]:
    """Prompt and what was written."""
    return [*self.request.prompt, *self.tokens]

  @property
  def length(self) -> int:
    """Tokens of prompt and what was written."""
    return len(self.request.prompt) + len(self.tokens)

  @property
  def left(self) -> int:
    """Tokens that may still be written."""
    return self.request.most - len(self.tokens)

  @property
  def stepwise(self) -> bool:
    """Whether each token depends on host work about the one before."""
    r = self.request
    return bool(self.constraint or r.presence or r.frequency)

  @property
  def plain(self) -> bool:
    """Whether logits alone, a temperature and truncation decide, and no alternatives are told."""
    r = self.request
    return not (r.bias or self.stepwise or r.tops or r.sampling.repetition_penalty != 1)

  def set_bias(self, V: int) -> None:
    """Makes `bias_V` for the token that is next."""
    r = self.request
    if self._fixed_V is None:
      self._fixed_V = np.zeros(V, np.float32)
      for token, value in r.bias:
        self._fixed_V[token] += value
    self.bias_V = self._fixed_V
    if self.stepwise:
      self.bias_V = self._fixed_V.copy()
      if self.tokens and (r.presence or r.frequency):
        times = np.bincount(self.tokens, minlength=V)
        self.bias_V -= r.frequency * times + r.presence * (times > 0)
      if self.constraint is not None:
        self.bias_V[~self.constraint.allowed()] = -np.inf

  def cancel(self, finish: str = "cancelled") -> None:
    """Ends it before its time, with this `finish`; from any thread."""
    self.cancelled = self.cancelled or finish
