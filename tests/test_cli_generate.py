"""`dsv3 generate`, on a checkpoint of a small model."""

import io
import json
import re

import pytest

from dsv3_jax import cli
from dsv3_jax.cli import generate
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.infer.generate import Completion
from tests import saved_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run's folder with a checkpoint and a tokenizer."""
  folder = tmp_path_factory.mktemp("run")
  saved_run.make(folder)
  return folder


def objects(capsys, *words):
  assert cli.run(["generate", *map(str, words), "--json"]) == 0
  return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_text_is_that_of_the_tokens(workdir, capsys, monkeypatch):
  """Law: JSON, streamed text and the standard input's prompt agree; seeds differ, repeat, and do
  not depend on what else is asked for."""
  tokenizer = tokenizer_lib.Tokenizer.load(str(workdir / "tokenizer.json"))
  asked = [workdir, "--prompt=def ", "--tokens=9", "--temperature=1"]
  first, second = objects(capsys, *asked, "--n=2")
  assert first["text"] == tokenizer.decode(first["tokens"])
  assert len(first["tokens"]) == len(first["logprobs"]) <= 9
  assert first["seed"] == 0 and second["seed"] == 1 and first["tokens"] != second["tokens"]
  assert objects(capsys, *asked, "--seed=1")[0]["tokens"] == second["tokens"]
  monkeypatch.setattr("sys.stdin", io.StringIO("def "))
  assert cli.run(["generate", str(workdir), "--tokens=9", "--temperature=1"]) == 0
  assert capsys.readouterr().out == f"def {first['text']}\n"


def test_stop_and_infill(workdir, capsys):
  """Law: a stop string ends the text before itself; a suffix follows what fills the gap."""
  whole = objects(capsys, workdir, "--prompt=def ", "--tokens=9")[0]["text"]
  stop = whole[2:4]
  assert objects(capsys, workdir, "--prompt=def ", "--tokens=9", f"--stop={stop}")[0]["text"] == (
      whole[:whole.find(stop)])
  assert cli.run(["generate", str(workdir), "--prompt=a", "--suffix=\\nend", "--tokens=4"]) == 0
  out = capsys.readouterr().out
  assert out.startswith("a") and out.endswith("\nend\n")


def test_drafts(workdir, capsys):
  """Law: speculation leaves the greedy text as it is; what is said of drafts is their shares."""
  plain, = objects(capsys, workdir, "--prompt=def ", "--tokens=9")
  drafted, = objects(capsys, workdir, "--prompt=def ", "--tokens=9", "--drafts=2")
  assert drafted["tokens"] == plain["tokens"]
  assert len(drafted["tokens"]) <= 1 + drafted["rounds"] + sum(drafted["accepted"])
  done = [Completion([], [], "stop", 3, (2, 1)), Completion([], [], "stop", 1, (1, 0))]
  assert generate.acceptance(done) == (
      "drafts kept, first to last: 75%, 25% of 4 rounds; 2.00 tokens a pass of the model")


@pytest.mark.parametrize("words, message", [
    (["--n=0"], "--n=0"), (["--top-p=2"], "top_p=2.0"), (["--tokens=0"], "steps=0"),
    (["--stop="], "stop string is empty"), (["--cache=fp8"], "512 \\+ 64")])
def test_errors(workdir, capsys, words, message):
  """Law: bad input is said in one line."""
  assert cli.run(["generate", str(workdir), "--prompt=a", *words]) == 2
  assert re.search(message, capsys.readouterr().err)


def test_no_model(tmp_path, capsys):
  """Law: a folder without a model, or without a tokenizer, is named."""
  assert cli.run(["generate", str(tmp_path), "--prompt=a"]) == 2
  assert "neither checkpoints/ nor config.json" in capsys.readouterr().err
  (tmp_path / "checkpoints").mkdir()
  assert cli.run(["generate", str(tmp_path), "--prompt=a"]) == 2
  assert "no tokenizer.json" in capsys.readouterr().err
