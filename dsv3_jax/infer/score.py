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

_BLOCK = 64  # positions whose logits exist at once


class Score(NamedTuple):
  """What a model says about a continuation.

  Attributes:
    logprobs: natural logarithms of its tokens' probabilities.
    greedy: whether each was the most likely one.
  """

  logprobs: list[float]
  greedy: bool


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
    T = rounded(max(len(asked[i][0]) + len(asked[i][1]) for i in group), _BLOCK)
    tokens_BT, length_B = np.zeros((rows, T), np.int32), np.ones(rows, np.int32)
    for row, i in enumerate(group):
      whole = [*asked[i][0], *asked[i][1]]
      tokens_BT[row, :len(whole)], length_B[row] = whole, len(whole)
    logprobs_BT, best_BT = map(np.asarray, _score(generator.weights, tokens_BT, length_B,
                                                  cfg=generator.cfg, runtime=generator.runtime))
    for row, i in enumerate(group):
      n = len(asked[i][0])
      place = slice(n - 1, n - 1 + len(asked[i][1]))
      found[i] = Score(logprobs_BT[row, place].tolist(), bool(best_BT[row, place].all()))
    say(at + len(group))
  return [s for s in found if s is not None]


@functools.partial(jax.jit, static_argnames=("cfg", "runtime"))
def _score(weights: Parameters, tokens_BT: jax.Array, length_B: jax.Array, cfg: config.Model,
           runtime: config.Runtime) -> tuple[jax.Array, jax.Array]:
  """Of the token after each position: its log-probability, and whether it is the likeliest."""
  B, T = tokens_BT.shape
  empty = cache_lib.make(cfg, B, T, runtime.compute_dtype)
  h_BTD, _, _ = forward.forward(weights, empty, tokens_BT, length_B, cfg, runtime, fresh=True)

  def block(x):
    h_BSD, next_BS = x
    logits_BSV = forward.readout(weights, h_BSD, cfg)
    own_BSV = jax.nn.log_softmax(logits_BSV, axis=-1)
    return (jnp.take_along_axis(own_BSV, next_BS[..., None], axis=2)[..., 0],
            logits_BSV.argmax(-1) == next_BS)

  blocks = lambda x: jnp.moveaxis(x.reshape(B, -1, _BLOCK, *x.shape[2:]), 1, 0)
  found = jax.lax.map(block, (blocks(h_BTD), blocks(jnp.roll(tokens_BT, -1, axis=1))))
  return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T), found)
