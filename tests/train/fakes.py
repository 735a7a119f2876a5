"""A corpus that costs nothing, and the smallest model with every mechanism on."""

import numpy as np

from dsv3_jax import config

VOCABULARY = 64


def small_config(**changes) -> config.Config:
  """One MoE layer and one MTP depth, a few thousand parameters."""
  base = {
      "model.vocab_size": VOCABULARY, "model.dim": 16, "model.layers": 1, "model.dense_layers": 0,
      "model.dense_ffn_dim": 16, "model.attention.heads": 2, "model.attention.q_rank": 8,
      "model.attention.kv_rank": 8, "model.attention.nope_dim": 4, "model.attention.rope_dim": 4,
      "model.attention.v_dim": 4, "model.moe.experts": 4, "model.moe.active": 2,
      "model.moe.groups": 2, "model.moe.active_groups": 1, "model.moe.ffn_dim": 8,
      "model.init_std": 0.05, "optim.lr": 1e-2, "optim.warmup_steps": 4,
      "data.sequence_length": 16, "data.batch_size": 4, "data.workers": 0,
      "train.tokens": 16 * 4 * 12, "train.eval_every": 4, "train.eval_batches": 2,
      "train.checkpoint_every": 4, "train.sample_tokens": 0}
  return config.replace(config.Config(), **(base | changes))


class FakeTokenizer:
  bos, eos, pad, fim_begin, fim_hole, fim_end = range(6)
  vocab_size = VOCABULARY
  token_bytes_V = np.where(np.arange(VOCABULARY) < 6, 0, 1)

  def encode(self, text: str) -> list[int]:
    return [6 + ord(c) % (VOCABULARY - 6) for c in text]

  def decode(self, tokens) -> str:
    return "".join(chr(97 + int(t) % 26) for t in tokens)


class FakeIterator:
  """Batches that are a function of the step; arithmetic sequences, so there is much to learn."""

  def __init__(self, schedule, rows: int, length: int, wanted=None):
    self._schedule, self._rows, self._length = schedule, rows, length
    self._wanted = list(range(rows) if wanted is None else wanted)
    self._step = 0

  def __next__(self):
    rng = np.random.Generator(np.random.Philox(key=[7, self._step]))
    micros = self._schedule(self._step) // self._rows
    shape = (micros, self._rows)
    start, stride = rng.integers(0, 58, shape), rng.integers(1, 4, shape)
    tokens = 6 + (start[..., None] + stride[..., None] * np.arange(self._length + 1)) % 58
    self._step += 1
    return {"tokens": tokens.astype(np.int32)[:, self._wanted]}

  def start(self):
    pass

  def follow(self, state):
    del state

  def said(self):
    return {}

  def get_state(self):
    return {"version": 1, "corpus": "fake", "rows": self._rows, "step": self._step,
            "lanes": {str(row): [self._step] for row in self._wanted}}

  def set_state(self, state):
    self._step = state["step"]

  def close(self):
    pass


class FakeCorpus:
  tokenizer = FakeTokenizer()

  def __init__(self, cfg: config.Config):
    self._data = cfg.data

  def _iterator(self, schedule, rows=None):
    return FakeIterator(schedule, self._data.microbatch or self._data.batch_size,
                        self._data.sequence_length, rows)

  def train_iterator(self, schedule, rows=None):
    return self._iterator(schedule, rows)

  def validation_batches(self, batch_size, limit):
    batches = self._iterator(lambda step: batch_size)
    batches._rows, batches._wanted = batch_size, list(range(batch_size))
    batches.set_state({"step": 10**6})
    return [{"tokens": next(batches)["tokens"][0]} for _ in range(limit)]

  def validation_text(self, limit_bytes):
    return (b"the quick brown fox jumps over it\n" * 400)[:max(limit_bytes, 4000)]
