"""A small corpus of many alphabets and much punctuation, and a tokenizer trained on it."""

import random

import pytest

from dsv3_jax.data import tokenizer as tokenizer_lib

WORDS = ("def return value the of latent expert 12345 7 naïve 東京 カナ привет :\n }\n\n ); \t x=1 "
         "... -- // foo.bar 🙂 é").split(" ")


def make_text(seed: int, words: int) -> str:
  """Text of `words` random words; equal for equal seeds."""
  rng = random.Random(seed)
  lines = (rng.choice(WORDS) + rng.choice([" ", " ", "\n", ":\n", ");\n\n", ".\n"])
           for _ in range(words))
  return f"document {seed}\n" + "".join(lines)


@pytest.fixture(scope="session")
def texts():
  return [make_text(i, 20 + 13 * i % 200) for i in range(100)]


@pytest.fixture(scope="session")
def tokenizer(texts):
  return tokenizer_lib.train(texts, 420)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, texts):
  """The texts as files of a folder."""
  path = tmp_path_factory.mktemp("corpus")
  for i, text in enumerate(texts):
    (path / f"{i:03d}.txt").write_bytes(text.encode())
  return path
