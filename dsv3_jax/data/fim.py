"""Fill-in-the-middle, prefix-suffix-middle order, on whole documents before packing.

Report section 4.1: at a rate of 0.1 a document becomes

    <｜fim▁begin｜> prefix <｜fim▁hole｜> suffix <｜fim▁end｜> middle <eos>

The cuts fall between characters, not tokens, so that a model learns to continue within a word; the
three parts are encoded anew. A document keeps its bos in front and has its single eos at the end.
"""

from collections.abc import Sequence

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer


def rearrange(tokens: np.ndarray, tokenizer: Tokenizer, rng: np.random.Generator) -> np.ndarray:
  """A document in prefix-suffix-middle order, cut at two uniformly drawn character positions.

  Args:
    tokens: int32 [n], ids of the document's text, without bos and eos.
    tokenizer: decodes the text and encodes its parts.
    rng: gives the two positions.

  Returns:
    int32 [m], without bos and eos. The document as it is where it is no valid text, which happens
    to a piece of a very long document that was cut inside a character.
  """
  try:
    text = tokenizer.decode_bytes(tokens).decode("utf-8")
  except UnicodeDecodeError:
    return tokens
  first, second = sorted(rng.integers(0, len(text), size=2, endpoint=True).tolist())
  prefix, middle, suffix = text[:first], text[first:second], text[second:]
  return np.asarray(
      [tokenizer.fim_begin, *tokenizer.encode(prefix), tokenizer.fim_hole,
       *tokenizer.encode(suffix), tokenizer.fim_end, *tokenizer.encode(middle)], np.int32)


def prompt(prefix: Sequence[int], suffix: Sequence[int], tokenizer: Tokenizer) -> list[int]:
  """Ids after which a model trained with `rearrange` writes the middle, then eos.

  Args:
    prefix, suffix: ids of the text before and after the middle.
    tokenizer: has the special ids.
  """
  return [tokenizer.bos, tokenizer.fim_begin, *prefix, tokenizer.fim_hole, *suffix,
          tokenizer.fim_end]
