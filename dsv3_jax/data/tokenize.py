"""Text to shards, in bounded memory: what `dsv3 tokenize` runs."""

import collections
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data import shards, sources
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.data.tokenizer import train as train_tokenizer

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all (0: unknown)

PIECE = 2**18  # characters encoded at once
BATCH = 2**22  # characters handed to the tokenizer's threads together
TRAIN_BYTES_PER_TOKEN = 2048  # text that a tokenizer is trained on, for each entry it will have


def fingerprint(source: sources.Source, tokenizer: Tokenizer, text_key: str,
                max_document_bytes: int) -> str:
  """Names the shards of a source: equal files, tokenizer and settings give an equal name."""
  facts = [shards.FORMAT, source.fingerprint(), tokenizer.hash, text_key, max_document_bytes]
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def tokenize(specs: Sequence[str | sources.Source], tokenizer: Tokenizer | str, out_dir: str, *,
             text_key: str = "text", max_document_bytes: int = 64 * 2**20, vocab_size: int = 8192,
             shard_tokens: int = shards.SHARD_TOKENS, progress: Progress | None = None
             ) -> shards.Shards:
  """Tokenizes sources into a shard folder, to be used as `data.sources=shards:OUT_DIR`.

  The folder appears when it is complete. One that was made from the same files with the same
  tokenizer is returned as it is.

  Args:
    specs: `data.sources` entries; documents keep their order.
    tokenizer: a tokenizer, or the path of a tokenizer.json, or "" to train one on the sources.
    out_dir: where to write.
    text_key: field of records that holds the text.
    max_document_bytes: limit of one document.
    vocab_size: of a tokenizer to be trained.
    shard_tokens: tokens at which a token file is closed.
    progress: called with (stage, bytes done, bytes in all or 0).

  Raises:
    ConfigError: unusable sources or tokenizer, no text at all, an unwritable or occupied folder.
  """
  resolved = [s if isinstance(s, sources.Source) else sources.resolve(s, max_document_bytes)
              for s in specs]
  for source in resolved:
    if source.kind == "shards":
      raise ConfigError(f"{source.spec!r} is tokenized already; name text sources")
  progress = progress or (lambda *_: None)
  if isinstance(tokenizer, str):
    tokenizer = (Tokenizer.load(tokenizer) if tokenizer else
                 train(resolved, vocab_size, text_key, max_document_bytes, progress=progress))
  made_from = [fingerprint(s, tokenizer, text_key, max_document_bytes) for s in resolved]
  if os.path.exists(os.path.join(out_dir, "index.json")):
    existing = shards.Shards(out_dir)
    if existing.index.get("made_from") != made_from:
      raise ConfigError(f"{out_dir} holds shards of other files, settings or another tokenizer; "
                        "name another folder or remove it")
    return existing

  total = sum(s.size for s in resolved)
  skipped = collections.Counter()
  done = 0
  with shards.Writer(out_dir, tokenizer, shard_tokens) as writer:
    for source in resolved:
      documents = sources.documents(source, text_key, max_document_bytes, skipped)
      for batch in _batches(documents):
        for document, ids in zip(batch, _encode(batch, tokenizer), strict=True):
          data = document.text.encode("utf-8")
          writer.add(ids, data)
          done += len(data)
        progress("tokenizing", done, total)
    if not done:
      raise ConfigError(f"data.sources: {', '.join(s.spec for s in resolved)} gave no text "
                        f"({counts(skipped) or 'no documents'})")
    return writer.finish(made_from=made_from, skipped=dict(skipped),
                         sources=[s.spec for s in resolved])


def train(resolved: Sequence[sources.Source], vocab_size: int, text_key: str,
          max_document_bytes: int, keep: Callable[[bytes], bool] = lambda _: True,
          progress: Progress | None = None) -> Tokenizer:
  """Trains a tokenizer on a sample of sources, an equal share of bytes from each.

  Args:
    resolved: text sources.
    vocab_size: entries wanted; `TRAIN_BYTES_PER_TOKEN` of text are read for each.
    text_key, max_document_bytes: as for `tokenize`.
    keep: whether a document's UTF-8 text may be used; leaves validation documents out.
    progress: as for `tokenize`.
  """
  budget = TRAIN_BYTES_PER_TOKEN * vocab_size
  share = -(-budget // len(resolved))
  done = 0

  def texts() -> Iterator[str]:
    nonlocal done
    for source in resolved:
      taken = 0
      for document in sources.documents(source, text_key, max_document_bytes, mixed=True):
        data = document.text.encode("utf-8")
        if not keep(data):
          continue
        taken, done = taken + len(data), done + len(data)
        yield from pieces(document.text)
        if progress:
          progress("training the tokenizer", min(done, budget), budget)
        if taken >= share:
          break

  tokenizer = train_tokenizer(texts(), vocab_size)
  if not done:  # a corpus of few documents may have all of them held out by `keep`
    keep = lambda _: True  # noqa: E731
    tokenizer = train_tokenizer(texts(), vocab_size)
  if not done:
    raise ConfigError(f"data.sources: {', '.join(s.spec for s in resolved)} gave no text to train "
                      "a tokenizer on")
  return tokenizer


def pieces(text: str, limit: int = PIECE) -> list[str]:
  """Cuts a long text at line starts, where the pretokenizer cuts in any case.

  A line break followed by anything but white space ends a pretoken, so that the ids of the pieces
  joined are the ids of the text. Bounds the memory of an encoding and lets cores share a document.
  A text without such places stays whole.
  """
  if len(text) <= limit:
    return [text]
  result, start = [], 0
  while len(text) - start > limit:
    end = start + limit
    while (end := text.find("\n", end) + 1) and end < len(text) and text[end].isspace():
      pass
    if not end or end >= len(text):
      break
    result.append(text[start:end])
    start = end
  return result + [text[start:]]


def _batches(documents: Iterator[sources.Document]) -> Iterator[list[sources.Document]]:
  batch, size = [], 0
  for document in documents:
    batch.append(document)
    size += len(document.text)
    if size >= BATCH:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def _encode(batch: list[sources.Document], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
  """Ids of each document of a batch, int32 [n]."""
  cut = [pieces(document.text) for document in batch]
  ids: list[np.ndarray] = []
  # A batch may end in a long document, so it is encoded in bounded groups of pieces.
  group, size = [], 0
  for piece in (piece for parts in cut for piece in parts):
    group.append(piece)
    size += len(piece)
    if size >= BATCH:
      ids += [np.asarray(x, np.int32) for x in tokenizer.encode_batch(group)]
      group, size = [], 0
  ids += [np.asarray(x, np.int32) for x in tokenizer.encode_batch(group)]
  at = 0
  for parts in cut:
    yield np.concatenate(ids[at:at + len(parts)])
    at += len(parts)


def counts(skipped: Mapping[str, int]) -> str:
  """What was left out, for a person: "2 binary, 1 empty"."""
  return ", ".join(f"{n:,} {reason}" for reason, n in sorted(skipped.items()))
