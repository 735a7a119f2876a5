import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, NewlineSplit, Tokenizer

SPECIAL_TEXT = st.sampled_from(list(SPECIAL_TOKENS.values()))


def test_special_tokens_have_the_released_spelling_and_first_ids(tokenizer):
  """Oracle: facts 4.2 (full-width bars U+FF5C, low lines U+2581; bos 0, eos 1, pad 2)."""
  assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (0, 1, 2)
  spelling = [t["content"] for t in json.loads(tokenizer.to_json())["added_tokens"]]
  assert spelling[:3] == [
      "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
      "<\uff5c\u2581pad\u2581\uff5c>"]
  ids = [getattr(tokenizer, name) for name in SPECIAL_TOKENS]
  assert sorted(ids) == list(range(8))


@pytest.mark.parametrize("text, pieces", [
    ("abc12345", ["abc", "123", "45"]),
    ("x東京カナy", ["x", "東京カナ", "y"]),
    (".foo(bar)", [".foo", "(bar", ")"]),
    ("a b  c", ["a", " b", " ", " c"]),
    ("f();\n\n  x", ["f", "();\n\n", " ", " x"]),
    (" == \r\n", [" ==", " \r\n"]),
    ("a  \n\n b ", ["a", "  \n\n", " b", " "]),
    ("naïve été", ["naïve", " été"]),
    ("١٢٣٤", ["١٢٣", "٤"]),
])
def test_pretokenizer_cuts_in_the_order_of_the_release(tokenizer, text, pieces):
  """Oracle: facts 4.2, applied by hand: digits, CJK and kana, then the alternatives in order."""
  backend = tokenizers.Tokenizer.from_str(tokenizer.to_json()).pre_tokenizer
  spans = [span for _, span in backend.pre_tokenize_str(text)]
  assert [text[a:b] for a, b in spans] == pieces


@settings(deadline=None, max_examples=300)
@given(text=st.lists(st.text(max_size=20) | SPECIAL_TEXT, max_size=6).map("".join))
def test_text_survives_encoding_and_never_becomes_a_special_token(tokenizer, text):
  """Oracle: the text itself (decode o encode = identity), byte counts from str.encode."""
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert all(i >= len(SPECIAL_TOKENS) for i in ids)
  assert tokenizer.token_bytes_V[ids].sum() == len(text.encode())


def test_ids_are_those_of_the_tokenizers_library(tokenizer, texts, tmp_path):
  """Oracle: the tokenizers library reading the saved file, its own byte-level decoder included."""
  path = tmp_path / "tokenizer.json"
  path.write_text(tokenizer.to_json(), encoding="utf-8")
  peer = tokenizers.Tokenizer.from_file(str(path))
  ours = Tokenizer.load(str(path))
  assert ours.hash == tokenizer.hash
  for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
    assert ids == ours.encode(text) == peer.encode(text).ids
    assert ours.decode(ids) == peer.decode(ids, skip_special_tokens=False)


def test_training_is_deterministic_and_learns_combined_tokens(tokenizer, texts):
  """Oracle: a second training of the same texts; a corpus full of ');\\n\\n' must merge it."""
  assert tokenizer_lib.train(iter(texts), 420).hash == tokenizer.hash
  assert tokenizer.vocab_size == 420
  assert len(tokenizer.encode(");\n\n")) == 1


def test_padded_vocabulary_has_byte_counts_for_every_row(tokenizer):
  """Oracle: the lengths of single decoded tokens; added tokens and padding count 0."""
  padded = Tokenizer(tokenizer.to_json(), vocab_size=500)
  expected = [0 if i < 8 else len(tokenizer.decode_bytes([i])) for i in range(420)] + [0] * 80
  assert padded.token_bytes_V.tolist() == expected and padded.token_bytes_V.dtype == np.int32
  assert padded.decode([*padded.encode("text"), 420, 499]) == "text"


def test_every_combined_token_is_cut_between_punctuation_and_line_breaks(tokenizer, texts):
  """Oracle: the text, which must not change; a scan of the ids for tokens that hold both kinds."""
  split, rng = NewlineSplit(tokenizer), np.random.default_rng(0)
  tokens = np.asarray(tokenizer.encode("".join(texts)), np.int32)

  def combined(ids):
    pieces = [tokenizer.decode([i]) for i in ids]
    return sum(p.endswith("\n") and p.strip() != "" for p in pieces)

  assert combined(tokens) > 500
  for rate in (0.0, 0.3, 1.0):
    cut = split(tokens, rate, rng)
    assert tokenizer.decode(cut) == "".join(texts) and cut.dtype == np.int32
    n, expected = combined(cut), combined(tokens) * (1 - rate)
    assert abs(n - expected) <= 4 * np.sqrt(combined(tokens) * rate * (1 - rate))


def edited(tokenizer, edit):
  spec = json.loads(tokenizer.to_json())
  edit(spec)
  return json.dumps(spec)


def test_a_tokenizer_that_cannot_serve_is_refused_with_the_reason(tokenizer, tmp_path):
  """Oracle: the messages a user needs, each naming the file and what is wrong."""
  def without_hole(spec):
    spec["added_tokens"] = [t for t in spec["added_tokens"] if "hole" not in t["content"]]

  def whitespace(spec):
    spec["pre_tokenizer"] = {"type": "Whitespace"}

  with pytest.raises(ConfigError, match="mine.json lacks the special tokens <｜fim▁hole｜>"):
    Tokenizer(edited(tokenizer, without_hole), name="mine.json")
  with pytest.raises(ConfigError, match="not a byte-level tokenizer .*Whitespace"):
    Tokenizer(edited(tokenizer, whitespace))
  with pytest.raises(ConfigError, match=r"420 tokens, but model.vocab_size=400; set .* 420"):
    Tokenizer(tokenizer.to_json(), vocab_size=400)
  with pytest.raises(ConfigError, match="not a tokenizer.json"):
    Tokenizer("{}")
  with pytest.raises(ConfigError, match="data.tokenizer=.*absent.json"):
    Tokenizer.load(str(tmp_path / "absent.json"))
  with pytest.raises(ConfigError, match="model.vocab_size=200 .* at least 264"):
    tokenizer_lib.train(["a"], 200)


def test_ids_are_found_by_content_where_the_release_puts_them_last(tokenizer):
  """Oracle: a file edited to hold User behind the vocabulary, as the release does (128803)."""
  def move_to(place):
    def edit(spec):
      user, = (t for t in spec["added_tokens"] if t["content"] == SPECIAL_TOKENS["user"])
      user.update(id=place, special=False)
      spec["added_tokens"].sort(key=lambda t: t["id"])
      spec["model"]["vocab"]["zz"] = spec["model"]["vocab"].pop(SPECIAL_TOKENS["user"])
    return edit

  moved = Tokenizer(edited(tokenizer, move_to(420)), vocab_size=1000)
  assert moved.user == 420 and moved.vocab_size == 421 and moved.bos == 0
  assert moved.decode(moved.encode("a<｜User｜>b")) == "a<｜User｜>b"
  assert moved.user not in moved.encode("a<｜User｜>b")
  with pytest.raises(ConfigError, match="900 -> 420"):
    Tokenizer(edited(tokenizer, move_to(900)))
