"""Bits per byte of any text.

A document is bos, its tokens, eos. Every token but bos is predicted once, from what its window
shows. The first window is the document's first `window` tokens; each later one predicts the next
`stride` tokens and shows the `window - stride` or more before them: so a token that is not in the
first window sees at least that many. A small stride costs more (window / stride times the tokens)
and flatters less: with `stride = window - 1` some tokens are predicted from one alone.

Bits per byte: the bits of all predictions over the UTF-8 bytes that they stand for. eos has no
bytes, but its bits count, as in training's validation; they are returned apart too, since
lm-evaluation-harness, for one, does not predict it. Its windows are those of the largest stride.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.evals import spread
from dsv3_jax.infer import score
from dsv3_jax.infer.generate import Generator


def spans(tokens: int, window: int, stride: int) -> list[tuple[int, int, int]]:
  """(begin, first, end) of each window over a document of `tokens` ids, bos the first of them.

  Ids begin to first - 1 are shown, ids first to end - 1 are shown and predicted.

  Raises:
    ConfigError: window below 2, or a stride that is not from 1 to window - 1.
  """
  if window < 2:
    raise ConfigError(f"--window={window} must be at least 2")
  if not 1 <= stride < window:
    raise ConfigError(f"--stride={stride} must be from 1 to {window - 1}: a window of {window} "
                      "tokens shows at least one that it does not predict")
  found, first = [], 1
  while first < tokens:
    end = min(tokens, window if first == 1 else first + stride)
    found.append((max(0, end - window), first, end))
    first = end
  return found


def measure(generator: Generator, tokenizer: Any, documents: Sequence[tuple[str, str]],
            window: int, stride: int = 0, tokens: int = 0, rows: int = 8,
            say: Callable[[int, int], Any] = lambda done, all: None) -> dict[str, Any]:
  """Bits per byte of documents.

  Args:
    generator: has the model.
    tokenizer: `data.tokenizer.Tokenizer`.
    documents: name and text of each.
    window: tokens that the model sees at once.
    stride: tokens that a later window predicts; 0: half of `window`.
    tokens: to predict in all, after which the text is cut off; 0: all.
    rows: windows in one pass.
    say: called with the number of windows done, and of all.

  Returns:
    bits_per_byte and its standard error over documents, error (None for a single one); loss (nats
    a token), perplexity (of a token), bytes, tokens, end_bits (those of eos), window, stride; and
    documents: name, bytes, tokens, bits, end_bits of each.

  Raises:
    ConfigError: no text, or a window and stride that do not fit each other.
  """
  stride = stride or window // 2
  spans(0, window, stride)
  asked, owner, read, left = [], [], [], tokens or math.inf
  for name, text in documents:
    if left <= 0:
      break
    ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
    ids = ids[:int(min(len(ids), 1 + left))]
    left -= len(ids) - 1
    for begin, first, end in spans(len(ids), window, stride):
      asked.append((ids[begin:first], ids[first:end]))
      owner.append(len(read))
    read.append((name, ids))
  if not asked:
    raise ConfigError("there is no text to measure on")
  scores = score.score(generator, asked, rows, lambda done: say(done, len(asked)))
  nats = [[] for _ in read]
  for i, found in zip(owner, scores, strict=True):
    nats[i] += found.logprobs
  each = [_document(name, ids, nats_T, tokenizer)
          for (name, ids), nats_T in zip(read, nats, strict=True)]
  total = lambda key: sum(d[key] for d in each)
  if not total("bytes"):
    raise ConfigError("there is no text to measure on")
  value, error = spread.ratio([d["bits"] for d in each], [d["bytes"] for d in each])
  loss = total("bits") * math.log(2) / total("tokens")
  return {"bits_per_byte": value, "error": error, "loss": loss,
          "perplexity": math.exp(min(loss, 700.0)),
          "bytes": total("bytes"), "tokens": total("tokens"), "end_bits": total("end_bits"),
          "window": window, "stride": stride, "documents": each}


def _document(name: str, ids: list[int], logprobs: list[float], tokenizer: Any) -> dict[str, Any]:
  bits_T = -np.asarray(logprobs) / math.log(2)
  end = float(bits_T[-1]) if ids[-1] == tokenizer.eos else 0.0
  return {"name": name, "bytes": int(tokenizer.token_bytes_V[ids[1:]].sum()),
          "tokens": len(bits_T), "bits": float(bits_T.sum()), "end_bits": end}
