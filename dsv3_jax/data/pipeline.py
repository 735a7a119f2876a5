"""From `config.Data` to batches: `prepare` finds or makes tokenizer and shards, `Corpus` serves.

    corpus = prepare(config.data, config.model.vocab_size, workdir)
    batches = corpus.train_iterator(batch_schedule)      # see loader.py
    for batch in corpus.validation_batches(8, limit=4): ...
"""

import hashlib
import os
from collections.abc import Callable, Sequence

import numpy as np

from dsv3_jax import config, files
from dsv3_jax.config import ConfigError
from dsv3_jax.data import packing, tokenize, units
from dsv3_jax.data import shards as shards_lib
from dsv3_jax.data import sources as sources_lib
from dsv3_jax.data.tokenizer import Tokenizer


class Corpus:
  """Tokenized text, split into training and validation.

  Attributes:
    folders: of the shards, one a source.
    fingerprint: identifies the contents.
    tokenizer: see `Tokenizer`; token_bytes_V has the model's vocabulary size.
    summary: counts for a person: documents, tokens, bytes, train_tokens, validation_tokens,
      skipped (by reason), and note, "" or what a reader of results should know.
  """

  def __init__(self, data: config.Data, tokenizer: Tokenizer, folders: list[str]):
    self.tokenizer, self._data, self.folders = tokenizer, data, tuple(folders)
    self._shards = [shards_lib.Shards(f) for f in folders]
    for s in self._shards:
      s.check_tokenizer(tokenizer)
    every = units.of(self._shards)
    train, self._validation, was_cut = units.split(every, data.validation_fraction)
    self.fingerprint = hashlib.sha256(" ".join(
        [tokenizer.hash, *(s.index["content"] for s in self._shards)]).encode()).hexdigest()[:16]
    skipped: dict[str, int] = {}
    for s in self._shards:
      for reason, n in s.index.get("skipped", {}).items():
        skipped[reason] = skipped.get(reason, 0) + n
    self.summary = {
        "documents": len(every), "tokens": int(every.length.sum()),
        "bytes": sum(s.index["bytes"] for s in self._shards),
        "train_tokens": int(train.length.sum()),
        "validation_tokens": int(self._validation.length.sum()), "skipped": skipped,
        "note": "too few documents to hold some out: parts of documents are held out" if was_cut
                else ""}
    if self.summary["train_tokens"] < data.sequence_length + 1:
      raise ConfigError(f"data.sources={data.sources} give {self.summary['train_tokens']} training "
                        f"tokens, less than one sequence (data.sequence_length="
                        f"{data.sequence_length}); add text or lower data.sequence_length")
    if was_cut and not len(self._validation):
      raise ConfigError(f"data.sources={data.sources} hold too little text to set "
                        f"data.validation_fraction={data.validation_fraction} aside; add text or "
                        "set data.validation_fraction=0")
    for i in range(len(data.sources) if data.weights else 0):
      if not (train.source == i).any():
        raise ConfigError(f"data.sources: {data.sources[i]!r} has no training document; lower "
                          f"data.validation_fraction={data.validation_fraction} or add documents")

  def describe(self) -> str:
    """The summary as one line."""
    s = self.summary
    parts = [f"{s['documents']:,} documents, {s['tokens']:,} tokens, "
             f"{s['validation_tokens']:,} of them held out"]
    if s["skipped"]:
      parts.append(f"left out: {tokenize.counts(s['skipped'])}")
    return "; ".join(parts + [s["note"]] * bool(s["note"]))

  def train_iterator(self, batch_schedule: Callable[[int], int],
                     rows: Sequence[int] | None = None):
    """Endless training batches: a `loader.TrainIterator`, restartable at any step.

    Args:
      batch_schedule: step -> sequences of its batch.
      rows: those of each micro-batch that are wanted; all where None.
    """
    from dsv3_jax.data import loader

    recipe = loader.Recipe(self._data, self.folders, self.tokenizer)
    return loader.TrainIterator(recipe, self.fingerprint, batch_schedule, rows)

  def validation_batches(self, batch_size: int, limit: int = 0) -> list[dict[str, np.ndarray]]:
    """Fixed batches of held-out text, without FIM and token cuts.

    Args:
      batch_size: B, sequences of a batch.
      limit: batches at most; 0 for all.

    Returns:
      A list of {"tokens": int32 [B, S], "mask": int8 [B, S], and with isolation "segments": int32
      [B, S], otherwise "valid": int8 [B, S]}. mask is 1 where a token is a target that counts, so
      that sums over batches meet each held-out token once; what fills up the last batch has mask 0,
      token pad, segment -1 and valid 0.
    """
    def document(i: int) -> np.ndarray:
      return np.concatenate([[self.tokenizer.bos], self._unit(i), [self.tokenizer.eos]]).astype(
          np.int32)

    return packing.fixed_batches(
        document, len(self._validation), length=self._data.sequence_length + 1,
        isolate=self._data.isolate, pad=self.tokenizer.pad, batch_size=batch_size, limit=limit)

  def validation_text(self, limit_bytes: int = 0) -> bytes:
    """Held-out text in the order of `validation_batches`, for compressors and unigram baselines.

    Args:
      limit_bytes: stop after this many bytes; 0 for all.
    """
    parts, size = [], 0
    for i in range(len(self._validation)):
      if limit_bytes and size >= limit_bytes:
        break
      parts.append(self.tokenizer.decode_bytes(self._unit(i)))
      size += len(parts[-1])
    return b"".join(parts)[:limit_bytes or None]

  def trained_on(self, hashes: np.ndarray) -> np.ndarray:
    """Which texts are in the training part, if only with a piece of theirs.

    Args:
      hashes: uint64 [n], `shards.content_hash` of whole documents.

    Returns:
      bool [n].
    """
    every = units.of(self._shards)
    train = units.split(every, self._data.validation_fraction)[0]
    seen = [s.records["hash"][np.unique(train.document[train.source == i])]
            for i, s in enumerate(self._shards)]
    return np.isin(np.asarray(hashes, np.uint64), np.concatenate(seen))

  def _unit(self, i: int) -> np.ndarray:
    v = self._validation
    return self._shards[int(v.source[i])].tokens(
        int(v.document[i]), int(v.start[i]), int(v.length[i]))


def prepare(data: config.Data, vocab_size: int, workdir: str,
            progress: tokenize.Progress | None = None) -> Corpus:
  """Makes a corpus ready: checks the sources, then trains or loads the tokenizer, then tokenizes.

  What exists is used again: `workdir/tokenizer.json`, and under `workdir/data` the shards of equal
  files (by path, size and time) and an equal tokenizer.

  Args:
    data: the config section.
    vocab_size: rows of the model's embedding.
    workdir: created if need be.
    progress: called with (stage, bytes done, bytes in all or 0).

  Raises:
    ConfigError: see `sources.resolve`, `sources.documents`, `Tokenizer`, `shards.Shards`; an
      unwritable workdir; too little text.
  """
  resolved = [sources_lib.resolve(spec, data.max_document_bytes) for spec in data.sources]
  ready = {s.spec: shards_lib.Shards(s.spec.removeprefix("shards:"))
           for s in resolved if s.kind == "shards"}
  try:
    os.makedirs(os.path.join(workdir, "data"), exist_ok=True)
    tokenizer = _tokenizer(data, vocab_size, workdir, resolved, list(ready.values()), progress)
    for shards in ready.values():
      shards.check_tokenizer(tokenizer)
    folders = []
    for source in resolved:
      if source.kind == "shards":
        folders.append(ready[source.spec].folder)
        continue
      name = tokenize.fingerprint(source, tokenizer, data.text_key, data.max_document_bytes)
      folder = os.path.join(workdir, "data", name)
      tokenize.tokenize([source], tokenizer, folder, text_key=data.text_key,
                        max_document_bytes=data.max_document_bytes, progress=progress)
      folders.append(folder)
  except OSError as error:
    raise ConfigError(f"the workdir {workdir} cannot be written: {error}") from None
  return Corpus(data, tokenizer, folders)


def reopen(data: config.Data, vocab_size: int, workdir: str, folders: Sequence[str]) -> Corpus:
  """The corpus that `prepare` has made ready in another process; needs no source.

  Args:
    data, vocab_size, workdir: as `prepare`'s.
    folders: of that corpus, absolute or relative to the workdir.
  """
  tokenizer = Tokenizer.load(os.path.join(workdir, "tokenizer.json"), vocab_size)
  return Corpus(data, tokenizer, [os.path.join(workdir, folder) for folder in folders])


def _tokenizer(data: config.Data, vocab_size: int, workdir: str,
               resolved: list[sources_lib.Source], ready: list[shards_lib.Shards],
               progress: tokenize.Progress | None) -> Tokenizer:
  """The workdir's tokenizer; made there first if it has none."""
  path = os.path.join(workdir, "tokenizer.json")
  given = Tokenizer.load(data.tokenizer, vocab_size) if data.tokenizer else None
  if os.path.exists(path):
    tokenizer = Tokenizer.load(path, vocab_size)
    if given is not None and given.hash != tokenizer.hash:
      raise ConfigError(f"{path} differs from data.tokenizer={data.tokenizer!r}; take another "
                        "workdir, or set data.tokenizer to the workdir's")
    return tokenizer
  if given is not None:
    tokenizer = given
  elif ready:
    tokenizer = ready[0].tokenizer(vocab_size)
  else:
    def keep(text: bytes) -> bool:
      return not units.held_out(shards_lib.content_hash(text), data.validation_fraction)

    tokenizer = tokenize.train(resolved, vocab_size, data.text_key, data.max_document_bytes, keep,
                               progress)
  files.write_atomic(path, tokenizer.to_json())
  return tokenizer
