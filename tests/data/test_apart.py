"""Data prepared in a process of its own."""

import json

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, Data
from dsv3_jax.data import apart, pipeline


@pytest.fixture
def data(tmp_path):
  text = tmp_path / "texts"
  text.mkdir()
  for i in range(30):
    words = np.random.default_rng(i).integers(0, 500, 400)
    (text / f"{i}.txt").write_text(" ".join(f"word{w}" for w in words))
  return Data(sources=(str(text),), sequence_length=16)


def contents(corpus):
  return corpus.fingerprint, corpus.tokenizer.hash, corpus.summary


def test_the_same_corpus(data, tmp_path, monkeypatch):
  """Oracle: `pipeline.prepare` in this process; and progress comes through."""
  monkeypatch.setattr(apart, "LARGE", 1)
  want = pipeline.prepare(data, 512, str(tmp_path / "here"))
  seen, made = [], []
  monkeypatch.setattr(pipeline.tokenize, "train", lambda *_: pytest.fail("not left to the child"))
  found = apart.prepare(data, 512, str(tmp_path / "apart"), lambda *a: seen.append(a))
  assert contents(found) == contents(want)
  assert {stage for stage, *_ in seen} >= {"training the tokenizer", "tokenizing"}
  monkeypatch.setattr(apart, "_in_child", lambda *_: made.append(1))
  apart.prepare(data, 512, str(tmp_path / "apart"))
  assert not made  # it is all there


def test_small_corpora_stay_here(data, tmp_path, monkeypatch):
  """Law: no process for a few kilobytes."""
  monkeypatch.setattr(apart, "_in_child", lambda *_: pytest.fail("a process was started"))
  apart.prepare(data, 512, str(tmp_path / "run"))


def test_errors_are_those_of_the_pipeline(data, tmp_path, monkeypatch):
  """Oracle: `pipeline.prepare`'s message, though the child met the fault first."""
  monkeypatch.setattr(apart, "LARGE", 1)
  with pytest.raises(ConfigError, match="vocab_size=100"):
    apart.prepare(data, 100, str(tmp_path / "run"))


@pytest.mark.parametrize("says", ["import sys; sys.exit(3)", "print('not json')"])
def test_a_child_that_comes_to_nothing(data, tmp_path, monkeypatch, says):
  """Law: the caller prepares the data itself."""
  import sys
  popen = apart.subprocess.Popen
  monkeypatch.setattr(apart, "LARGE", 1)
  monkeypatch.setattr(apart.subprocess, "Popen",
                      lambda command, **kw: popen([sys.executable, "-c", says], **kw))
  corpus = apart.prepare(data, 512, str(tmp_path / "run"), lambda *_: None)
  assert corpus.summary["documents"] == 30
  assert json.dumps(corpus.summary)
