"""A context and what may follow it, as tokens.

The trap: a tokenizer cuts `context + continuation` in one way and the two apart in another, when a
token reaches over their border ("2 + 2 =" and " 4" are fine, "12" and "3" are not: "123" is one
token). Encoded apart they make a sequence that the model never saw in training, and is surprised
by, whatever the text says. lm-evaluation-harness encodes the whole, and cuts it after as many
tokens as the context has alone; where a token reaches over the border, what it scores then begins
in the wrong place, and may be empty.

Here the whole is encoded, each continuation with its context, and what is scored begins where the
sequences part: after the longest run of tokens that the context alone and all wholes begin with.
With a clean border that is the context, and the result is the harness's. Otherwise the last bit of
the context is scored as well, the same text for all, so that continuations compare as the
probabilities of their whole texts do.
"""

from collections.abc import Sequence
from typing import Any

from dsv3_jax.config import ConfigError


def encode(tokenizer: Any, context: str, continuations: Sequence[str]
           ) -> tuple[list[int], list[list[int]]]:
  """Token ids of what all have in common, bos in front, and of the rest of each.

  Args:
    tokenizer: `data.tokenizer.Tokenizer`.
    context: text, may be empty.
    continuations: texts that are not empty.
  """
  wholes = [tokenizer.encode(context + text) for text in continuations]
  alone, n = tokenizer.encode(context), 0
  while n < len(alone) and all(whole[n:n + 1] == alone[n:n + 1] for whole in wholes):
    n += 1
  return [tokenizer.bos, *alone[:n]], [whole[n:] for whole in wholes]


def fit(context: list[int], longest: int, window: int, name: str) -> list[int]:
  """A context that leaves room for what follows: a longer one loses its beginning.

  Args:
    context: token ids.
    longest: tokens that follow it.
    window: tokens that the model sees at most.
    name: of the record, for the error.

  Raises:
    ConfigError: what follows leaves no room for a single token of context.
  """
  if longest >= window:
    raise ConfigError(f"{name}: {longest} tokens are to follow the context, and the model sees "
                      f"{window} in all; raise --window, or shorten it")
  return context[-(window - longest):]
