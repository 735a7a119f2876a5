"""Conversations: files, tokens and mask."""

import gzip
import json

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.posttrain import messages, tasks
from dsv3_jax.posttrain.problems import Problem


def turns(*texts, system=""):
  """User and assistant in turns."""
  start = [{"role": "system", "content": system}] if system else []
  return start + [{"role": ("user", "assistant")[i % 2], "content": t}
                  for i, t in enumerate(texts)]


TALKS = [
    turns("Hi", "Hello there"), turns("2+2?", "4", "Sure?", "Yes, 4.", system="Be brief."),
    turns("<｜Assistant｜>", "a <｜end▁of▁sentence｜> b", "", " \n4 \n", "ü€😀", "😀")]


@pytest.fixture(scope="module")
def tokenizer():
  texts = [json.dumps(t, ensure_ascii=False) for t in TALKS] * 20
  return tokenizer_lib.train(texts, 330)


@pytest.mark.parametrize("talk", TALKS)
def test_mask(tokenizer, talk):
  """Oracle: the masked tokens, decoded, are the answers' texts each with its end token, and the end
  tokens in between are the template's own; the rest is the template without the answers."""
  sample = messages.encode(talk, tokenizer)
  assert sample.tokens.dtype == np.int32 and sample.mask.dtype == bool
  eos = tokenizer.decode([tokenizer.eos])
  answers = [m["content"] for m in talk if m["role"] == "assistant"]
  assert tokenizer.decode(sample.tokens[sample.mask]) == "".join(a + eos for a in answers)
  ends = sample.tokens == tokenizer.eos
  assert ends.sum() == len(answers) and (sample.mask >= ends).all()
  others = "".join({"user": "<｜User｜>", "assistant": "<｜Assistant｜>", "system": ""}[m["role"]]
                   + (m["content"] if m["role"] != "assistant" else "") for m in talk)
  assert tokenizer.decode(sample.tokens[~sample.mask]) == "<｜begin▁of▁sentence｜>" + others


@pytest.mark.parametrize("talk", TALKS)
def test_prompt_is_inference_s(tokenizer, talk):
  """Law: before each answer stands, token by token, what `chat.prompt` gives the engine and the
  server for the conversation up to there."""
  sample = messages.encode(talk, tokenizer)
  starts = np.flatnonzero(np.diff(sample.mask.astype(int)) == 1) + 1
  answers = [i for i, m in enumerate(talk) if m["role"] == "assistant"]
  assert len(starts) == len(answers)
  for start, i in zip(starts, answers, strict=True):
    assert sample.tokens[:start].tolist() == chat.prompt(talk[:i], tokenizer)


def test_too_long(tokenizer):
  """Oracle: by hand. Cut behind the last answer that fits, dropped where none does, counted."""
  talk = TALKS[1]
  whole = messages.encode(talk, tokenizer)
  first = len(messages.encode(talk[:3], tokenizer).tokens)
  for longest, expected in ((len(whole.tokens), (len(whole.tokens), 0, 0)),
                            (len(whole.tokens) - 1, (first, 1, 0)), (first, (first, 1, 0)),
                            (first - 1, (0, 0, 1))):
    found = messages.encode_all([talk, TALKS[0]], tokenizer, longest)
    size, cut, dropped = expected
    assert (found.cut, found.dropped) == (cut, dropped)
    assert len(found.samples) == 2 - dropped
    if size:
      np.testing.assert_array_equal(found.samples[0].tokens, whole.tokens[:size])
      np.testing.assert_array_equal(found.samples[0].mask, whole.mask[:size])
      assert found.samples[0].tokens[-1] == tokenizer.eos


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_files(tmp_path, suffix):
  """Law: what was written is read."""
  path = messages.write(tmp_path / f"a.{suffix}", TALKS)
  assert messages.read(path) == TALKS


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_other_files(tmp_path, suffix):
  """Oracle: by hand. Pairs, ids, empty lines, and compression by other programs."""
  compress = gzip.compress if suffix == "gz" else pytest.importorskip("zstandard").compress
  lines = ['{"prompt": "Hi", "response": "Hello there"}', "",
           '{"id": 7, "system": "S", "prompt": "a", "response": "b"}']
  expected = [TALKS[0], turns("a", "b", system="S")]
  data = "\n".join(lines).encode()
  (tmp_path / f"a.jsonl.{suffix}").write_bytes(compress(data))
  assert messages.read(tmp_path / f"a.jsonl.{suffix}") == expected


def test_no_other_compression_is_written(tmp_path):
  """Law: nothing is written that could not be read."""
  with pytest.raises(ConfigError, match="only .jsonl and .jsonl.gz are written"):
    messages.write(tmp_path / "b.jsonl.zst", TALKS)


def talk(*roles):
  return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize("record, words", [
    ("{", "not a JSON object in UTF-8"), ("[1]", "a record is an object, not list"),
    ({}, "needs messages, or prompt and response; it has nothing"),
    ({"prompt": "a"}, "needs messages, or prompt and response; it has prompt"),
    ({"prompt": "a", "respnse": "b"}, "unknown key 'respnse'.*did you mean 'response'"),
    ({"prompt": 3, "response": "b"}, "prompt is int, not text"),
    ({"prompt": "a", "response": " "}, "response is empty"),
    ({"messages": []}, "at least one message"), ({"messages": "hi"}, "must be a list"),
    ({"messages": [], "response": "b"}, "unknown key 'response'"),
    (talk("user"), r"messages\[0\].role='user': the last turn must be the assistant's"),
    (talk("assistant"), r"messages\[0\].role='assistant' must be system or user"),
    (talk("user", "user", "assistant"), r"messages\[1\].role='user' must be assistant"),
    (talk("user", "assistant", "assistant"), r"messages\[2\].role='assistant' must be user"),
    (talk("user", "system", "assistant"), r"messages\[1\].role='system' must be assistant"),
    (talk("system", "system", "user", "assistant"), r"messages\[1\].role='system' must be user"),
    (talk("user", "tool"), r"messages\[1\].role='tool' must be one of"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, r"content=\['x'\] must be a string"),
    ({"messages": turns("a", "\n")}, r"messages\[1\].content is empty"),
    ({"messages": turns("a", "\ud800")}, r"messages\[1\].content is no valid Unicode"),
    ({"messages": [{"role": "user", "content": "x", "weight": 0}]},
     r"messages\[0\]: unknown key 'weight'")])
def test_mistakes(tmp_path, record, words):
  """Law: each is told with file and line, several of them at once."""
  path = tmp_path / "talks.jsonl"
  bad = record if isinstance(record, str) else json.dumps(record)
  path.write_text("\n".join([json.dumps({"messages": TALKS[0]}), bad, "", "3"]))
  with pytest.raises(ConfigError, match=f"talks.jsonl:2: .*{words}") as caught:
    messages.read(path)
  assert "talks.jsonl:4: a record is an object, not int" in str(caught.value)


def test_unreadable_files(tmp_path):
  """Law: a missing, empty or damaged file is an error; many bad lines are counted."""
  with pytest.raises(ConfigError, match="cannot be read"):
    messages.read(tmp_path / "none.jsonl")
  path = tmp_path / "a.jsonl"
  path.write_text("\n\n")
  with pytest.raises(ConfigError, match="has no records"):
    messages.read(path)
  path.write_bytes(b"\xff\n" * 10)
  with pytest.raises(ConfigError, match="a.jsonl:1: not a JSON object in UTF-8(.|\n)*and 2 more"):
    messages.read(path)
  short = tmp_path / "a.jsonl.gz"
  short.write_bytes(gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 9)[:-12])
  with pytest.raises(ConfigError, match="cannot be read after line"):
    messages.read(short)


def test_problems():
  """Oracle: report 5.1's two samples, <problem, response> and <system prompt, problem, long
  response>."""
  (problem,) = tasks.make("add", 0, 1, 0)
  short, long = messages.from_problems([problem], "both")
  assert short == turns("92 + 51 = ?", problem.worked)
  assert long == turns("92 + 51 = ?", problem.worked_long, system=messages.REFLECTION)
  assert messages.from_problems([problem]) == [short]
  assert messages.from_problems([problem], "answer") == [turns("92 + 51 = ?", "\\boxed{143}")]
  assert messages.from_problems([problem], "long", reflection="") == [
      turns("92 + 51 = ?", problem.worked_long)]
  own = Problem("a", "b", system="Be brief.", worked_long="c")
  assert messages.from_problems([own], "long") == [
      turns("b", "c", system=f"Be brief.\n\n{messages.REFLECTION}")]
  with pytest.raises(ConfigError, match="the problem a has no short worked solution"):
    messages.from_problems([own])
  with pytest.raises(ConfigError, match="style='medium' must be one of answer, short, long, both"):
    messages.from_problems([own], "medium")
