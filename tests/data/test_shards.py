import os

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import shards, tokenize, units
from dsv3_jax.data.tokenizer import Tokenizer
from tests.data.conftest import make_text


def test_documents_come_back_from_several_token_files(tokenizer, texts, folder, tmp_path):
  """Oracle: the tokenizer's encoding of each text; sizes and hashes of the texts themselves."""
  out = tokenize.tokenize([str(folder)], tokenizer, str(tmp_path / "out"), shard_tokens=2000)
  assert len(out.index["shards"]) > 3 and len(out) == len(texts)
  for i, text in enumerate(texts):
    ids = tokenizer.encode(text)
    got = out.tokens(i)
    assert got.dtype == np.int32 and got.tolist() == ids
    assert out.tokens(i, 3, 5).tolist() == ids[3:8]
    record = out.records[i]
    assert record["bytes"] == len(text.encode())
    assert record["hash"] == shards.content_hash(text.encode())
  assert out.index["bytes"] == sum(len(t.encode()) for t in texts)
  assert out.tokenizer().hash == tokenizer.hash
  assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, "<u2"), (2**16 + 1, "<u4")])
def test_ids_take_two_bytes_where_they_fit(tokenizer, tmp_path, vocab_size, dtype):
  """Oracle: the largest id of the vocabulary, written and read."""
  class Wide:
    hash = "wide"
    to_json = tokenizer.to_json

  Wide.vocab_size = vocab_size
  with shards.Writer(str(tmp_path / "out"), Wide()) as writer:
    writer.add([0, vocab_size - 1], b"ab")
    out = writer.finish()
  assert out.index["dtype"] == dtype
  assert out.tokens(0).tolist() == [0, vocab_size - 1]


def test_an_interrupted_write_leaves_nothing_and_a_complete_one_is_used_again(
    tokenizer, folder, tmp_path, monkeypatch):
  """Oracle: the folder's listing and modification time."""
  out = str(tmp_path / "out")

  def stop(stage, done, total):
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    tokenize.tokenize([str(folder)], tokenizer, out, progress=stop)
  assert os.listdir(tmp_path) == []
  tokenize.tokenize([str(folder)], tokenizer, out)
  monkeypatch.setattr(shards.Writer, "add", stop)  # must not write again
  assert len(tokenize.tokenize([str(folder)], tokenizer, out)) == 100
  with pytest.raises(ConfigError, match="holds shards of other files, settings or another"):
    tokenize.tokenize([str(folder / "001.txt")], tokenizer, out)


def test_damaged_or_foreign_shards_are_refused(tokenizer, folder, tmp_path):
  """Oracle: one byte less, another tokenizer, another format: each named."""
  out = tmp_path / "out"
  made = tokenize.tokenize([str(folder)], tokenizer, str(out))
  other = Tokenizer(tokenizer.to_json().replace('"dropout":null', '"dropout":0.0'))
  with pytest.raises(ConfigError, match="with another tokenizer .*set data.tokenizer"):
    made.check_tokenizer(other)
  tokens = out / "tokens-00000.bin"
  os.truncate(tokens, tokens.stat().st_size - 1)
  with pytest.raises(ConfigError, match="not a complete shard folder: tokens-00000.bin has"):
    shards.Shards(str(out))
  index = out / "index.json"
  index.write_text(index.read_text().replace('"format": 1', '"format": 9'))
  with pytest.raises(ConfigError, match="shard format 9; this version reads 1"):
    shards.Shards(str(out))


def test_no_tokenizer_trains_one_and_no_text_is_an_error(folder, tmp_path):
  """Oracle: issue 2: `dsv3 tokenize` works from text alone; empty input is one clear error."""
  made = tokenize.tokenize([str(folder)], "", str(tmp_path / "out"), vocab_size=300)
  assert made.tokenizer().vocab_size == 300
  (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
  with pytest.raises(ConfigError, match="gave no text"):
    tokenize.tokenize([str(tmp_path / "blank.jsonl")], made.tokenizer(), str(tmp_path / "o2"))
  with pytest.raises(ConfigError, match="tokenized already"):
    tokenize.tokenize([f"shards:{tmp_path / 'out'}"], made.tokenizer(), str(tmp_path / "o3"))


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(tokenizer):
  """Oracle: the tokenizer on the whole text, over texts full of white space and line breaks."""
  for seed in range(5):
    text = make_text(seed, 3000) + "\n \n\t x" + "no line break" * 50
    cut = tokenize.pieces(text, 200)
    assert len(cut) > 20 and "".join(cut) == text
    assert [t for p in cut for t in tokenizer.encode(p)] == tokenizer.encode(text)
  assert tokenize.pieces("x" * 1000, 100) == ["x" * 1000]
  assert tokenize.pieces("\n" * 1000, 100) == ["\n" * 1000]


def fake_units(lengths, hashes):
  n = len(lengths)
  return units.Units(np.zeros(n, int), np.arange(n), np.zeros(n, int), np.asarray(lengths),
                     np.ones(n, bool), np.asarray(hashes, np.uint64))


def test_the_split_depends_on_contents_alone():
  """Oracle: shuffled order and doubled documents give the same held-out set; its share is right."""
  rng = np.random.default_rng(0)
  hashes = rng.integers(0, 2**64, 4000, dtype=np.uint64)
  order = rng.permutation(np.repeat(np.arange(4000), 2))
  train, validation, was_cut = units.split(fake_units(np.full(4000, 10), hashes), 0.1)
  train2, validation2, _ = units.split(fake_units(np.full(8000, 10), hashes[order]), 0.1)
  assert not was_cut and 330 < len(validation) < 470 and len(train) + len(validation) == 4000
  assert set(validation.hash) == set(validation2.hash)
  assert not set(train2.hash) & set(validation2.hash)
  everything, nothing, _ = units.split(fake_units(np.full(9, 10), hashes[:9]), 0.0)
  assert (len(everything), len(nothing)) == (9, 0)


def test_cut_units_cover_each_token_once():
  """Oracle: a count of tokens; a single long document is divided between both sides."""
  whole = fake_units([5, 1000, 333, 100], [1, 2, 3, 4])
  cut = units.cut(whole, 100)
  seen = [np.zeros(n, int) for n in whole.length]
  for i in range(len(cut)):
    seen[cut.document[i]][cut.start[i]:cut.start[i] + cut.length[i]] += 1
  assert all((s == 1).all() for s in seen) and cut.length.max() <= 100
  ends = cut.start + cut.length == whole.length[cut.document]
  np.testing.assert_array_equal(cut.last, ends)
  train, validation, was_cut = units.split(fake_units([100_000], [7]), 0.05)
  assert was_cut and 0 < validation.length.sum() < 0.15 * 100_000
  assert train.length.sum() + validation.length.sum() == 100_000
