"""Conversations packed into rows, and what training makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.posttrain.messages import Sample
from dsv3_jax.posttrain.samples import Samples, pack
from tests.model import small
from tests.quick import jit

V = small.BASE.vocab_size


class Tokenizer:
  pad, hash = 0, "h"

  def decode_bytes(self, tokens):
    return bytes(int(t) % 128 for t in tokens)


def samples(count, seed, most=9):
  rng = np.random.default_rng(seed)
  for _ in range(count):
    n = int(rng.integers(2, most + 1))
    mask = rng.random(n) < 0.6
    mask[-1] = True
    yield Sample(rng.integers(1, V, n).astype(np.int32), mask)


def made(count=23, length=20, **changes):
  return Samples(list(samples(count, 1)), list(samples(4, 2)), Tokenizer(), length,
                 **{"micro_batch": 2, "seed": 5} | changes)


def test_pack():
  """Law: each once, no row too long, few rows."""
  lengths = np.random.default_rng(0).integers(1, 50, 300)
  rows = pack(lengths, 64, range(300))
  assert sorted(i for row in rows for i in row) == list(range(300))
  sums = [sum(lengths[i] for i in row) for row in rows]
  assert max(sums) <= 64 and len(rows) < 1.1 * sum(lengths) / 64


def test_an_epoch_has_each_conversation_once():
  """Oracle: the conversations; two epochs differ in order."""
  corpus = made()
  whole = sorted(s.tokens.tobytes() + s.mask.tobytes() for s in samples(23, 1))
  orders = []
  for epoch in range(2):
    found = []
    for row in corpus.epoch(epoch):
      for k in range(row["segments"].max() + 1):
        here = row["segments"] == k
        found.append(row["tokens"][here].tobytes() + row["mask"][here].astype(bool).tobytes())
      assert not row["mask"][row["segments"] < 0].any()
    assert sorted(found) == whole
    orders.append(found)
  assert orders[0] != orders[1] and corpus.rows == len(list(corpus.epoch(0)))


def test_a_restart_goes_on():
  """Oracle: the uninterrupted iterator; other conversations are refused."""
  corpus = made()
  whole = corpus.train_iterator(lambda step: 4)
  first = [next(whole) for _ in range(2 * corpus.rows)]
  assert first[0]["tokens"].shape == (2, 2, 21) and whole.said()["epoch"] > 1
  for stop in (0, 1, 5):
    run = corpus.train_iterator(lambda step: 4)
    for _ in range(stop):
      next(run)
    again = corpus.train_iterator(lambda step: 4, rows=[1])
    again.set_state(run.get_state())
    got = next(again)
    for name, x in first[stop].items():
      np.testing.assert_array_equal(got[name], x[:, [1]])
  with pytest.raises(ValueError, match="trained on conversations"):
    made(count=22).train_iterator(lambda step: 4).set_state(whole.get_state())


def test_refusals():
  """Oracle: the messages."""
  with pytest.raises(ConfigError, match="a conversation has 9 tokens, and data.sequence_length=7"):
    made(length=7)
  with pytest.raises(ConfigError, match="no conversation to train on"):
    made(count=0)
  silent = [Sample(np.arange(3, dtype=np.int32), np.zeros(3, bool))]
  with pytest.raises(ConfigError, match="no conversation has an answer"):
    Samples(silent, [], Tokenizer(), 20, 1, 0)


def test_packed_equals_unpacked():
  """Law: loss and gradient of packed conversations are those of each in a row of its own, to 1e-5;
  a neighbour's text changes no bit of a conversation's representations."""
  corpus = made(count=6)
  cfg, quiet = small.BASE, config.Loss(sequence_balance=0.0)
  graphdef, params, buffers = small.split(small.build(cfg, seed=3))
  some = list(samples(6, 1))
  packed = [corpus.row(row, some) for row in pack([len(s.tokens) for s in some], 21, range(6))]
  apart = [corpus.row([i], some) for i in range(6)]
  stacked = lambda rows: {k: jnp.asarray(np.stack([r[k] for r in rows])) for k in rows[0]}

  def loss(params, batch):
    model = nnx.merge(graphdef, params, buffers)
    return loss_lib.loss_fn(model, batch, loss=quiet, mtp_weight=0.3, runtime=small.RUNTIME,
                            denominator=loss_lib.target_tokens(batch))[0]

  grad = jit(jax.value_and_grad(loss))
  (a, da), (b, db) = (grad(params, stacked(rows)) for rows in (packed, apart))
  np.testing.assert_allclose(a, b, rtol=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), da, db)

  def hidden(batch):
    model = nnx.merge(graphdef, params, buffers)
    return model.hidden(model.embed(batch["tokens"], small.RUNTIME), length=20,
                        segments_BT=batch["segments"][:, :20], runtime=small.RUNTIME,
                        valid_BT=loss_lib.not_padding(batch)[:, :20],
                        mtp_valid_KBT=jnp.zeros((cfg.mtp_depth, 1, 20)), balance=None,
                        axes=()).h_BTD

  row = next(r for r in packed if r["segments"].max() > 0)
  other = row | {"tokens": np.where(row["segments"] == 0, (row["tokens"] + 7) % V, row["tokens"])}
  run = jit(hidden)
  mine = row["segments"][:20] == 1
  np.testing.assert_array_equal(run(stacked([row]))[0][mine], run(stacked([other]))[0][mine])
