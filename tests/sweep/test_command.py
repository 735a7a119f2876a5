"""`dsv3 sweep` as it is typed."""

import functools
import json

import pytest

from dsv3_jax import cli, config
from dsv3_jax.cli import sweep as command
from dsv3_jax.sweep import job, local, pool
from tests.sweep import sweeping

EXPERIMENT = '''"""Does x help?

More text.
"""
from dsv3_jax.config import Config, replace
from dsv3_jax.sweep import arm


def get_config(arg=None):
  return replace(Config(), **{"data.sequence_length": 8, "data.batch_size": 2,
                              "train.tokens": 16 * 20})


def sweep(arg=None):
  return arm.seeds({"base": {}, "x, twice": {"optim.lr": 0.5}, "bad": {"optim.lr": 0.666}}, 2)
'''


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
  """Runs `dsv3 sweep` with options over the stub trainer; returns (exit code, output, errors)."""
  (tmp_path / "ablate_x.py").write_text(EXPERIMENT)
  monkeypatch.setattr(local, "Local", functools.partial(local.Local, command=sweeping.command()))
  put_back = sweeping.no_text()

  def run(*options):
    code = cli.run(["sweep", f"--config={tmp_path / 'ablate_x.py'}",
                    f"--workdir={tmp_path / 'pool'}", *options])
    captured = capsys.readouterr()
    return code, captured.out, captured.err

  yield run
  put_back()


def test_plan_comes_first(run, tmp_path):
  """Oracle: the experiment: its question, arms, seeds, changes; nothing is made by --dry-run."""
  code, out, _ = run("--dry-run", "--hardware=h800")
  assert code == 0 and not (tmp_path / "pool").exists()
  assert "Does x help?" in out and "optim.lr=0.5" in out and "6 arms" in out and "0,1" in out
  assert "cost model, H800" in out and "device-hours, $" in out
  code, out, _ = run("--dry-run", "--hardware=h100", "--seeds=5,7,9", "--only=x, twice,base")
  assert "6 arms" in out and "5,7,9" in out and "bad" not in out
  code, out, _ = run("--dry-run", "--hardware=h100", "--price=3", "--config.model.dim=128")
  assert "at $3 an hour" in out


def test_a_sweep_from_plan_to_table(run, tmp_path):
  """Oracle: the stub's numbers in the table, its error at the end, exit code 1; then 0."""
  code, out, err = run("--only=base,bad", "--seeds=0", "--config.optim.lr=0.25")
  assert code == 1
  assert "measured here" in out and "0.5000" in out and "1 done, 1 failed" in out
  assert "bad, seed 0: failed" in err and "  dsv3: error: the loss was not finite" in err
  code, out, err = run("--only=base", "--seeds=0,1", "--config.optim.lr=0.25")
  assert code == 0 and "2 done" in out and not err
  starts = {p.parent.name[:7]: len(p.read_text().splitlines())
            for p in tmp_path.glob("pool/arms/*/starts")}
  assert starts == {"base-s0": 1, "base-s1": 1, "bad-s0-": 1}
  plan = json.loads((tmp_path / "pool" / "sweeps" / "ablate_x.json").read_text())
  assert [(a["name"], a["seed"]) for a in plan["arms"]] == [("base", 0), ("base", 1), ("bad", 0)]


@pytest.mark.parametrize("options, message", [
    (["--only=bass"], "did you mean 'base'?"), (["--seeds=a"], "whole numbers"),
    (["--seeds="], "at least one seed"), (["--jobs=0"], "--jobs=0 must be positive"),
    (["--nodes=2"], "--nodes goes with --launcher=slurm"),
    (["--address=x"], "--address goes with --launcher=ray"),
    (["--launcher=ray", "--jobs=2"], "--jobs goes with --launcher=local or slurm"),
    (["--slurm.qos=high"], "--slurm.qos=high goes with --launcher=slurm"),
    (["--launcher=slurm", "--slurm.qos"], "--slurm.KEY=VALUE is expected"),
    (["--launcher=slurm", "--nodes=0"], "--nodes=0 must be positive"),
    (["--hardware=h10"], "--hardware=h10"), (["--price=-1"], "must not be negative"),
    (["--config.optim.lrr=1"], "did you mean"), (["--workdir=/dev/null/x"], "cannot be written"),
    (["--records=/dev/null/x"], "--records=/dev/null/x cannot be written")])
def test_mistakes(run, options, message):
  """Law: exit code 2, and the message names the option and what would be right."""
  code, _, err = run(*options)
  assert code == 2 and message in err


@pytest.mark.parametrize("text, message", [
    ("yield {'arm': 'a', 'optim.lr': 0.1, 'train.seed': 0}\n"
     "  yield {'arm': 'a', 'optim.lr': 0.2, 'train.seed': 1}", "differ in more than their seeds"),
    ("pass", "sweep returned None; it should yield a dictionary"),
    ("yield {'arm': 0.1, 'optim.lr': 0.1}", 'write "arm": "0.1"'),
    ("yield {3: 0.1}", 'such as "optim.lr"'), ("return [('optim.lr', 0.1)]", "not a tuple"),
    ("yield {}\ndef sweep(arg):\n  yield {}", "ablate_x.py:ARG, or write sweep(arg=None)"),
    ("return ()", "yields no arms")])
def test_sweeps_that_cannot_be(run, tmp_path, text, message):
  """Law: exit code 2, and the message says what sweep() should yield."""
  path = tmp_path / "ablate_x.py"
  path.write_text(f"{EXPERIMENT.partition('def sweep')[0]}def sweep(arg=None):\n  {text}\n")
  code, _, err = run("--dry-run")
  assert code == 2 and message in err


def test_what_an_arm_runs(tmp_path, capsys):
  """Oracle: `dsv3 train --print-config` of the very command gives the arm's config."""
  arm = sweeping.arm("a", 3, optim_lr=0.125, model_dim=128)
  folder = pool.Pool(tmp_path).add(arm)
  argv = job.command(folder)
  assert argv[1:3] == ["-m", "dsv3_jax.cli"] and f"--workdir={folder}" in argv
  assert cli.run([*argv[3:], "--print-config"]) == 0
  assert config.from_json(capsys.readouterr().out) == arm.config


@pytest.mark.parametrize("only, expected", [
    ("a,b", ["a,b"]), ("a, b,c", ["a,b", "c"]), ("c,x, twice", ["c", "x, twice"]),
    ("x,twice,c", ["x, twice", "c"])])
def test_names_with_commas(only, expected):
  """Oracle: by hand: a name that holds commas is one name, with spaces or without."""
  assert command._listed(only, ["c", "a,b", "x, twice"]) == expected


def test_seeds_are_an_axis():
  """Oracle: by hand: all arms of a seed before the next, each with its own identity."""
  its = command.select(sweeping.sweep(), "4,2", None)
  assert [(a.name, a.seed) for a in its.arms] == [
      ("base", 4), ("more", 4), ("base", 2), ("more", 2)]
  assert all(a.config.train.seed == a.seed and a.id == config.fingerprint(a.config)
             for a in its.arms)
  assert len({a.id for a in its.arms}) == 4
