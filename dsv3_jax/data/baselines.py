"""What a validation text costs without a language model, in bits per byte.

A model that is not clearly below these has learnt little: `unigram` knows how often each token
occurs and no context at all, gzip and xz know only the text itself.
"""

import gzip
import lzma

import numpy as np


def compression(text: bytes) -> dict[str, float]:
  """Bits per byte of `text` under `gzip -9` and under xz at its strongest preset (-9e).

  Raises:
    ValueError: the text is empty.
  """
  if not text:
    raise ValueError("the validation text is empty; raise data.validation_fraction or add sources")
  sizes = {"gzip -9": len(gzip.compress(text, compresslevel=9, mtime=0)),
           "xz": len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))}
  return {name: 8 * size / len(text) for name, size in sizes.items()}


def unigram(train_N: np.ndarray, text_N: np.ndarray, vocab_size: int, text_bytes: int) -> float:
  """Bits per byte of a text under token frequencies counted in training data.

  -sum_i log2 p(text_i) / text_bytes with p(v) = (count_v + 1) / (N + vocab_size): add-one
  smoothing, so that tokens unseen in training cost much, not infinitely much.

  Args:
    train_N: ids of training tokens (a sample of a million is plenty), any integer dtype.
    text_N: ids of the text's tokens.
    vocab_size: V, above every id.
    text_bytes: UTF-8 bytes that `text_N` stands for.

  Raises:
    ValueError: the text is empty.
  """
  if not text_bytes:
    raise ValueError("the validation text is empty; raise data.validation_fraction or add sources")
  counts_V = np.bincount(np.asarray(train_N, np.int64), minlength=vocab_size)
  bits_V = np.log2(counts_V.sum() + vocab_size) - np.log2(counts_V + 1)
  return float(bits_V[np.asarray(text_N, np.int64)].sum() / text_bytes)
