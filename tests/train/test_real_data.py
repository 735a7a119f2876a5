"""Runs on the real data pipeline, and what the command line makes of their workdirs."""

import hashlib
import json
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dsv3_jax import cli, train
from dsv3_jax import config as config_lib
from dsv3_jax.data import shards, units
from dsv3_jax.train import metrics
from tests.data.conftest import make_text
from tests.train import fakes, runs


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """FIM, cut tokens, a batch ramp in micro-batches, the EMA and two balance losses; ten steps."""
  folder = tmp_path_factory.mktemp("corpus")
  for i in range(60):
    (folder / f"{i:02d}.txt").write_text(make_text(i, 60), encoding="utf-8")
  (folder / "picture").write_bytes(b"\0\1\2")
  return fakes.small_config(**{
      "model.vocab_size": 320, "data.sources": (str(folder),), "data.fim_rate": 0.5,
      "data.split_rate": 0.5, "data.validation_fraction": 0.2, "data.batch_size": 4,
      "data.batch_start": 2, "data.microbatch": 2, "data.batch_ramp_until": 0.5,
      "data.batch_ramp_stages": 2, "data.prefetch": 3, "optim.ema_decay": 0.9,
      "optim.ema_every": 3, "loss.sequence_balance": 0.0, "loss.batch_balance": 1e-3,
      "loss.expert_balance": 1e-3, "train.tokens": 16 * 34, "train.checkpoint_every": 100})


def _run(config, folder, ui=None) -> train.RunResult:
  return train.run(config, str(folder), ui=ui or metrics.Silent())


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  """The workdir of a run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("finished")
  assert _run(config, folder).finished
  return folder


def test_an_interrupted_run_on_real_data(config, finished, tmp_path):
  """Oracle: the uninterrupted run, bit for bit, after signals in the ramp and behind it."""
  steps = [r for r in runs.records(finished) if r["kind"] == "train"]
  assert {r["batch_size"] for r in steps} == {2, 4} and len(steps) > 8
  assert all(r["batch_balance"] > 0 and r["expert_balance"] > 0 and "balance" not in r
             for r in steps)
  ui = runs.Interrupt(2)
  ends = [_run(config, tmp_path, ui).step, _run(config, tmp_path, runs.Interrupt(6)).step]
  assert "60 documents, " in ui.notes[0] and "left out: 1 binary" in ui.notes[0]
  assert 2 <= ends[0] < 6 <= ends[1] < len(steps)
  assert _run(config, tmp_path).finished
  runs.assert_same(finished, tmp_path)


def _eval(folder, capsys, *words) -> dict:
  assert cli.run(["eval", str(folder), *words]) == 0
  return json.loads(capsys.readouterr().out)


def test_eval_repeats_the_runs_own_numbers(finished, capsys):
  """Oracle: the last validation of the run and its summary; all of the text gives more bytes."""
  final = json.loads((finished / "summary.json").read_text())["final"]
  last = [r for r in runs.records(finished) if r["kind"] == "eval"][-1]
  found = _eval(finished, capsys)
  assert found["step"] == last["step"]
  for name in ("loss", "bits_per_byte", "max_vio", "accuracy"):
    assert found[name] == pytest.approx(final[name], rel=1e-5), name
  assert _eval(finished, capsys, "--ema")["loss"] == pytest.approx(final["ema_loss"], rel=1e-5)
  assert _eval(finished, capsys, "--batches=0")["bytes"] > found["bytes"]


def test_eval_refuses_what_it_cannot_compare(config, finished, tmp_path, capsys):
  """Oracle: exit code 2 and the reason, where no text is held out and where the text changed."""
  folder = tmp_path / "run"
  shutil.copytree(finished, folder)
  sidecar = max((folder / "checkpoints").glob("*/checkpoint.json"))
  meta = json.loads(sidecar.read_text())

  def refuse(key, value) -> str:
    changed = config_lib.replace(config, **{key: value})
    sidecar.write_text(json.dumps(meta | {"config": config_lib.to_dict(changed)}))
    assert cli.run(["eval", str(folder)]) == 2
    return capsys.readouterr().err

  assert "no text is held out (data.validation_fraction=0" in refuse("data.validation_fraction", 0)
  other = tmp_path / "other.txt"
  other.write_text(make_text(1000, 3000), encoding="utf-8")
  assert "the files of data.sources" in refuse("data.sources", (str(other),))


@pytest.fixture
def library(tmp_path, monkeypatch):
  """A standard library of modules and one table, without tests."""
  root = tmp_path / "lib"
  root.mkdir()
  for i in range(6):
    (root / f"m{i}.py").write_text(f'"""{make_text(90 + i, 60)}"""\n' + "x = def_of(12345)\n" * 40)
  (root / "table.py").write_text("t = [" + "1, 'a', " * 200 + "]\n")
  monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})


def test_eval_by_domain(config, finished, library, tmp_path, capsys):
  """Oracle: the whole path: files of the run's own corpus are known as trained on or held out."""
  out = tmp_path / "out"
  words = ["eval", str(finished), "--domains", f"--domain=mine={config.data.sources[0]}",
           "--tokens=600", f"--out={out}", "--layers=MTP 1"]
  assert cli.run(words) == 0
  printed = capsys.readouterr()
  assert "tests: skipped, this Python's library has no such files" in printed.err
  assert printed.out.splitlines()[-1] == str(out / "domains.html")
  made = json.loads((out / "domains.json").read_text())
  assert made["domains"] == ["code", "docstrings", "tables", "mine"]
  run = made["runs"][0]
  assert run["id"] == config_lib.fingerprint(config) and run["layers"] == ["layer 0", "MTP 1"]
  for name, facts in run["domains"].items():
    assert name in printed.out and 500 < facts["tokens"] < 600 and 3 < facts["loss"] < 7, name
    assert np.mean(run["load"][name]) == pytest.approx(1, abs=1e-3)
  held = [run["domains"][name]["held_out"] for name in made["domains"]]
  texts = [f.read_bytes() for f in sorted(
      Path(config.data.sources[0]).glob("*.txt"),
      key=lambda f: hashlib.sha256(f.name.encode()).digest())][:run["domains"]["mine"]["documents"]]
  kept = units.held_out([shards.content_hash(text) for text in texts], 0.2)
  sizes = np.array([len(text) for text in texts])
  assert held == [1, 1, 1, pytest.approx(sizes[kept].sum() / sizes.sum())] and 0 < kept.sum() < 60
  assert "mine (" in printed.out and "trained on" in printed.out
  assert ">MTP 1: " in (out / "domains_layers.svg").read_text()
  assert "layer 0: " not in (out / "domains_layers.svg").read_text()

  joined = ["eval", str(out / "domains.json"), str(out / "domains.json")]
  assert cli.run([*joined, f"--out={tmp_path / 'two'}"]) == 0
  capsys.readouterr()
  assert len(json.loads((tmp_path / "two" / "domains.json").read_text())["runs"]) == 2


@pytest.mark.parametrize("words,named", [
    (["RUN", "--domains=docstring"], "did you mean 'docstrings'?"),
    (["--domains", "RUN"], "give the workdir of a run, before --domains"),
    (["RUN", "--domains="], "names no domain"),
    (["RUN", "--domain=poems"], "--domain=poems: write NAME=PATH"),
    (["RUN", "--domains", "--domain=code=x"], "two domains are called 'code'"),
    (["RUN", "--domain=mine=EMPTY"], "--domain=mine=EMPTY: the folder 'EMPTY' has no files"),
    (["RUN", "--domain=mine=SHORT"], "domain 'mine' has too little text: "),
    (["RUN", "--domains", "--layers=9"], "'9' is no MoE layer of the run; there are layer 0"),
    (["RUN", "--domains", "--batches=2"], "--tokens says how much"),
    (["RUN", "--domains", "--tokens=-1"], "--tokens=-1 must not be negative"),
    (["RUN", "RUN"], "add --domains"), (["RUN", "RUN", "--domains"], "--out=DIR"),
    (["RUN", "--tokens=5"], "--tokens goes with --domains"),
    (["SHORT", "--out=x"], "no domains.json of this version"),
    (["SHORT", "--domains"], "was measured already"),
])
def test_mistakes_with_domains(finished, library, tmp_path, capsys, words, named):
  """Oracle: exit code 2 and the words that help."""
  (tmp_path / "empty").mkdir()
  (tmp_path / "short.txt").write_text("short")
  for name, path in (("RUN", finished), ("EMPTY", tmp_path / "empty"),
                     ("SHORT", tmp_path / "short.txt")):
    words = [word.replace(name, str(path)) for word in words]
    named = named.replace(name, str(path))
  assert cli.run(["eval", *words]) == 2
  assert named in capsys.readouterr().err
