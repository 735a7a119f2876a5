"""Conversations as tokens."""

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer as tokenizer_lib


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.train(["hello there, be brief\n" * 30], 300)


def test_printed_example(tokenizer):
  """Oracle: the released model's chat template, as its documentation prints it."""
  talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <｜User｜>"},
          {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"}]
  prompt = chat.prompt(talk, tokenizer)
  assert tokenizer.decode(prompt) == (
      "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi <｜User｜><｜Assistant｜>Hello"
      "<｜end▁of▁sentence｜><｜User｜>2+2?<｜Assistant｜>")
  assert prompt.count(tokenizer.user) == 2  # what the user typed is text
  parts = chat.parts(talk, tokenizer)
  assert [t for p in parts for t in p.tokens] == prompt[:-1]
  assert [tokenizer.decode(p.tokens) for p in parts if p.answer] == ["Hello<｜end▁of▁sentence｜>"]


@pytest.mark.parametrize("talk, words", [
    ([], "at least one"), ("hi", "must be a list"), ([3], r"messages\[0\] is no object"),
    ([{"role": "cat", "content": ""}], r"messages\[0\].role='cat'"),
    ([{"role": "user", "content": None}], r"messages\[0\].content=None")])
def test_errors(tokenizer, talk, words):
  """Law: what is no conversation is named."""
  with pytest.raises(ConfigError, match=words):
    chat.prompt(talk, tokenizer)
