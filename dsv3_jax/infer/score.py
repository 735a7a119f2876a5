"""Log-probabilities of given text: perplexity, multiple choice."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import forward
from dsv3_jax.infer.generate import Generator, rounded
from dsv3_jax.infer.parameters import Parameters

_LEAST = 64  # smallest rounded length
_BLOCK = 32  # positions whose logits exist at once; it divides every rounded length


class Score(NamedTuple):
  """What a model says about a continuation.

  Attributes:
    logprobs: natural logarithms of its tokens' probabilities.
    greedy: whether each was the most likely one.
    ranks: how many tokens were likelier than each.
  """

  logprobs: list[float]
  greedy: bool
  ranks: list[int]


def score(generator: Generator, asked: Sequence[tuple[Sequence[int], Sequence[int]]],
          rows: int = 8, say: Callable[[int], Any] = lambda done: None) -> list[Score]:
  """Scores continuations.

  Args:
    generator: has the model.
    asked: context and continuation, token ids; a context has at least one.
    rows: sequences in one pass; those of like length go together.
    say: called with how many are done.

  Raises:
    ConfigError: an empty context or continuation, or a token outside the vocabulary.
  """
  V = generator.cfg.vocab_size
  for i, (context, rest) in enumerate(asked):
    if not len(context) or not len(rest):
      raise ConfigError(f"pair {i} has an empty {'continuation' if len(context) else 'context'}; "
                        "begin a context with the token for a text's beginning")
    if not (0 <= min(min(context), min(rest)) and max(max(context), max(rest)) < V):
      raise ConfigError(f"pair {i} holds a token outside the vocabulary of {V}")
  found: list[Score | None] = [None] * len(asked)
  order = sorted(range(len(asked)), key=lambda i: -len(asked[i][0]) - len(asked[i][1]))
  for at in range(0, len(order), rows):
    group = order[at:at + rows]
    T = rounded(max(len(asked[i][0]) + len(asked[i][1]) for i in group), _LEAST)
    K = rounded(max(len(asked[i][1]) for i in group), _BLOCK)
    tokens_BT, length_B = np.zeros((rows, T), np.int32), np.ones(rows, np.int32)
    place_BK = np.zeros((rows, K), np.int32)
    for row, i in enumerate(group):
      whole, n = [*asked[i][0], *asked[i][1]], len(asked[i][1])
      tokens_BT[row, :len(whole)], length_B[row] = whole, len(whole)
      place_BK[row, :n] = len(asked[i][0]) - 1 + np.arange(n)
    logprobs_BK, best_BK, rank_BK = map(np.asarray, _score(
        generator.weights, tokens_BT, length_B, place_BK, cfg=generator.cfg,
        runtime=generator.runtime))
    for row, i in enumerate(group):
      n = len(asked[i][1])
      found[i] = Score(logprobs_BK[row, :n].tolist(), bool(best_BK[row, :n].all()),
                       rank_BK[row, :n].tolist())
    say(at + len(group))
  return [s for s in found if s is not None]


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"))
def _score(weights: Parameters, tokens_BT: jax.Array, length_B: jax.Array, place_BK: jax.Array,
           cfg: config.Model, runtime: config.Runtime) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of the token after each place: its log-probability, whether it is the likeliest, its rank.

  Logits are computed at the K places alone: a long context's cost as much as its layers.
  """
  B, T = tokens_BT.shape
  empty = cache_lib.make(cfg, B, T, runtime.compute_dtype)
  h_BTD, _, _ = forward.forward(weights, empty, tokens_BT, length_B, cfg, runtime, fresh=True)
  h_BKD = jnp.take_along_axis(h_BTD, place_BK[..., None], axis=1)
  next_BK = jnp.take_along_axis(jnp.roll(tokens_BT, -1, axis=1), place_BK, axis=1)

  def block(x):
    h_BSD, next_BS = x
    logits_BSV = forward.readout(weights, h_BSD, cfg)
    own_BS1 = jnp.take_along_axis(logits_BSV, next_BS[..., None], axis=2)
    return (own_BS1[..., 0] - jax.nn.logsumexp(logits_BSV, axis=-1),
            logits_BSV.argmax(-1) == next_BS, (logits_BSV > own_BS1).sum(-1))

  blocks = lambda x: jnp.moveaxis(x.reshape(B, -1, _BLOCK, *x.shape[2:]), 1, 0)
  found = jax.lax.map(block, (blocks(h_BKD), blocks(next_BK)))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, -1), found)
