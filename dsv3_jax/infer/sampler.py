"""From logits to tokens: penalties, temperature, truncations, draws. Every row by its own settings.

The order is transformers': bias, repetition penalty, temperature, top-k, top-p, min-p. A draw
depends on a row's seed and on the place of the token that is drawn, on nothing else, so that a
request gives the same text alone, in any batch and after having been interrupted.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How one request's tokens are chosen."""

  temperature: float = 0.0  # 0: the most likely token
  top_k: int = 0  # only the k most likely; 0: all
  top_p: float = 1.0  # only the most likely that together have this probability
  min_p: float = 0.0  # only those with this share of the most likely one's probability
  repetition_penalty: float = 1.0  # of tokens seen: divides positive logits, multiplies others
  seed: int = 0

  def __post_init__(self):
    def need(ok: bool, name: str, what: str) -> None:
      if not ok:
        raise ConfigError(f"{name}={getattr(self, name)} must {what}")

    # Bounds keep the arithmetic, which is fp32, away from 0 and infinity.
    need(self.temperature == 0 or 1e-3 <= self.temperature <= 100, "temperature",
         "be 0 or lie between 0.001 and 100")
    need(0 <= self.top_k < 2**31, "top_k", "not be negative, and be less than 2^31")
    need(1e-6 <= self.top_p <= 1, "top_p", "lie between 1e-6 and 1")
    need(0 <= self.min_p <= 1, "min_p", "lie between 0 and 1")
    need(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "lie between 0.01 and 100")
    need(0 <= self.seed < 2**32, "seed", "lie between 0 and 2^32 - 1")


GREEDY = Sampling()


class Rows(NamedTuple):
  """`Sampling` of B rows, as arrays."""

  temperature_B: np.ndarray
  top_k_B: np.ndarray
  top_p_B: np.ndarray
  min_p_B: np.ndarray
  repetition_B: np.ndarray
  seed_B: np.ndarray


def rows(settings: list[Sampling]) -> Rows:
  """The settings of a batch's rows."""
  column = lambda name, dtype: np.array([getattr(s, name) for s in settings], dtype)
  return Rows(column("temperature", np.float32), column("top_k", np.int32),
              column("top_p", np.float32), column("min_p", np.float32),
              column("repetition_penalty", np.float32), column("seed", np.uint32))


def scores(logits_BV: jax.Array, r: Rows, seen_BV: jax.Array | None = None,
           bias_BV: jax.Array | None = None) -> jax.Array:
  """Log-probabilities fp32 [B, V] of what may be drawn, -inf where it may not.

  A row of temperature 0 keeps its most likely token alone.

  Args:
    logits_BV: fp32.
    r: settings.
    seen_BV: bool, tokens that the repetition penalty is for; None: there are none.
    bias_BV: added to the logits first; -inf forbids a token.
  """
  if bias_BV is not None:
    logits_BV = logits_BV + bias_BV
  if seen_BV is not None:
    penalty_B1 = r.repetition_B[:, None]
    penalised = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    logits_BV = jnp.where(seen_BV, penalised, logits_BV)
  greedy_B1 = (r.temperature_B == 0)[:, None]
  cooled_BV = logits_BV / jnp.where(greedy_B1, 1.0, r.temperature_B[:, None])
  truncates = jnp.any((r.top_k_B > 0) | (r.top_p_B < 1) | (r.min_p_B > 0))
  kept_BV = jax.lax.cond(truncates, _truncated, lambda x, r: x, cooled_BV, r)
  best_BV = jax.nn.one_hot(jnp.argmax(logits_BV, -1), logits_BV.shape[1], dtype=bool)
  chosen_BV = jnp.where(greedy_B1, jnp.where(best_BV, 0.0, -jnp.inf), kept_BV)
  return jax.nn.log_softmax(chosen_BV, axis=-1)


def _truncated(logits_BV: jax.Array, r: Rows) -> jax.Array:
  """Logits with -inf for what top-k, top-p and min-p cut off."""
  V = logits_BV.shape[1]
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  k_B = jnp.where(r.top_k_B > 0, jnp.minimum(r.top_k_B, V), V)
  least_B1 = jnp.take_along_axis(sorted_BV, (k_B - 1)[:, None], axis=1)
  in_k_BV = sorted_BV >= least_B1
  p_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, -jnp.inf), axis=-1)
  # A token stays as long as those before it have not reached top_p; the first one always does. A
  # sum may round up to 1.
  top_p_B1 = jnp.where(r.top_p_B < 1, r.top_p_B, jnp.inf)[:, None]
  stays_BV = in_k_BV & (jnp.cumsum(p_BV, -1) - p_BV < top_p_B1)
  least_B1 = jnp.min(jnp.where(stays_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
  # Shares of the most likely one do not depend on what was cut off.
  floor_B1 = sorted_BV[:, :1] + jnp.log(r.min_p_B)[:, None]
  return jnp.where(logits_BV >= jnp.maximum(least_B1, floor_B1), logits_BV, -jnp.inf)


def draw(scores_BV: jax.Array, seed_B: jax.Array, position_B: jax.Array) -> jax.Array:
  """One token of each row, int32 [B].

  Args:
    scores_BV: of `scores`.
    seed_B: uint32.
    position_B: place in its sequence of the token that is drawn.
  """
  def one(scores_V, seed, position):
    key = jax.random.fold_in(jax.random.key(seed), position)
    return jax.random.categorical(key, scores_V)

  # Noise for a vocabulary takes a quarter of a small model's step on a CPU.
  return jax.lax.cond(certain(scores_BV), lambda s, *_: jnp.argmax(s, -1), jax.vmap(one),
                      scores_BV, seed_B, position_B).astype(jnp.int32)


def certain(scores: jax.Array) -> jax.Array:
  """Whether one token has probability 1 in each row of [..., V], as in greedy ones."""
  return (scores.max(-1) == 0).all()
