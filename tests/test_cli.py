"""The command line: what people type, and what they get wrong."""

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax import cli, train
from dsv3_jax import config as config_lib
from dsv3_jax.config import ConfigError
from dsv3_jax.train import launch, schedules
from tests.analysis import synthetic

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "experiments" / "tiny.py")
EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


def dsv3(*words: str, **kwargs) -> subprocess.CompletedProcess:
  """Runs the command in a process of its own, from the repository's root."""
  return subprocess.run([sys.executable, "-m", "dsv3_jax.cli", *words], cwd=ROOT, text=True,
                        capture_output=True, check=False, **kwargs)


def experiment(tmp_path: Path, body: str) -> str:
  path = tmp_path / "experiment.py"
  path.write_text(body)
  return str(path)


# --- examples -----------------------------------------------------------------------------------


def _train_examples() -> list[list[str]]:
  """Every `dsv3 train` that the README, the help and the experiments show."""
  helps = [dsv3(command, "--help").stdout for command in ("train", "tokenize")]
  texts = [(ROOT / "README.md").read_text(), *helps, *(p.read_text() for p in EXPERIMENTS)]
  joined = re.sub(r"\\\n\s*", "", "\n".join(texts))
  return [shlex.split(line, comments=True) for line in
          re.findall(r"dsv3 (train --config=experiments.*?)(?:   .*)?$", joined, re.M)]


def test_examples_with_overrides_have_a_workdir_of_their_own(monkeypatch):
  """Oracle: the commands themselves: each gives a config, and no two configs share a workdir."""
  monkeypatch.chdir(ROOT)
  made = {}
  for words in _train_examples():
    parsed, rest = cli._parser().parse_known_args(words)
    made.setdefault(parsed.workdir or str(cli.default_workdir(parsed.config)), []).append(
        (cli.load_config(parsed.config, cli.configs.pair_overrides(rest)), words))
  assert len(made) > 8
  for workdir, found in made.items():
    configs = {config for config, _ in found}
    assert len(configs) == 1, (workdir, [words for _, words in found])


def test_readmes_notebook_example_leaves_the_warm_up(monkeypatch, tmp_path):
  """Oracle: the learning rate of the example's last step is its schedule's last one."""
  monkeypatch.chdir(ROOT)
  example = re.search(r"```python\n(from dsv3_jax import config.*?)```",
                      (ROOT / "README.md").read_text(), re.S)[1]
  monkeypatch.syspath_prepend(str(ROOT))
  given = []
  monkeypatch.setattr(train, "run", lambda config, workdir: given.append(config))
  exec(example, {})
  config, = given
  batches = schedules.batch_schedule(config.data, config.train.tokens)
  last = batches.total_steps - 1
  rate = schedules.learning_rate(config.optim, config.train.tokens)
  assert rate(batches.tokens_before(last), last + 1) == pytest.approx(config.optim.lr_last)


def test_flags_of_several_processes_go_to_the_run(monkeypatch, tmp_path):
  """Oracle: the values given; process 0 alone writes command.txt; a missing flag is bad input."""
  words = ["train", f"--config={TINY}", f"--workdir={tmp_path}"]
  assert cli.run([*words, "--processes=2", "--process=1"]) == 2
  given = []

  def run(config, workdir, launch=None):
    given.append(launch)
    return train.RunResult(workdir, 1, 1, False, 143, {}, first=launch is None)

  monkeypatch.setattr(train, "run", run)
  monkeypatch.setattr("dsv3_jax.analysis.report.write", lambda workdir: workdir)
  more = ["--coordinator=h:1", "--processes=3", "--process=1", "--patience=5"]
  assert cli.run([*words, *more]) == 143
  assert given == [launch.Launch("h:1", 3, 1, None, 5.0, 300.0)]
  assert not (tmp_path / "command.txt").exists()
  assert cli.run([*words, "--processes=1"]) == 143 and given[1] is None
  assert (tmp_path / "command.txt").exists()


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key, text, value", [
    ("optim.lr", "3e-4", 3e-4), ("optim.lr", "1", 1.0), ("train.tokens", "1_000", 1000.0),
    ("model.layers", "5", 5), ("train.checkpoint_every", "1e3", 1000),
    ("optim.decay_vectors", "true", True), ("optim.decay_vectors", "0", False),
    ("data.tokenizer", "a=b.json", "a=b.json"), ("data.tokenizer", "12", "12"),
    ("data.sources", "a,b c/*.txt", ("a", "b c/*.txt")), ("data.sources", "one", ("one",)),
    ("data.sources", "['x,y', 'z']", ("x,y", "z")), ("data.weights", "1,2.5", (1.0, 2.5)),
    ("data.weights", "(1, 2)", (1.0, 2.0)), ("data.weights", "", ())])
def test_override_has_the_fields_type(key, text, value):
  """Oracle: the Python value, of exactly the declared type."""
  parsed = cli.parse_value(key, text)
  assert parsed == value
  assert type(parsed) is type(value)
  if isinstance(value, tuple):
    assert [type(p) for p in parsed] == [type(v) for v in value]


@pytest.mark.parametrize("key, text", [
    ("optim.lr", "fast"), ("optim.lr", ""), ("model.layers", "2.5"), ("model.layers", "true"),
    ("optim.decay_vectors", "yes"), ("data.weights", "1,x"), ("data.weights", "(1,"),
    ("data.weights", "(1, f())"), ("train.checkpoint_every", "inf"),
    ("train.checkpoint_every", "nan")])
def test_override_of_a_wrong_type_is_one_clear_line(key, text):
  """Oracle: the option as typed, and the type that was expected."""
  with pytest.raises(ConfigError, match="is expected") as error:
    cli.parse_value(key, text)
  assert str(error.value).startswith(f"--config.{key}={text}")
  assert "\n" not in str(error.value)


def test_overrides_reach_the_config_and_later_ones_win():
  """Oracle: the config that `replace` gives."""
  config = cli.load_config(TINY, [("optim.lr", "1"), ("model.moe.experts", "32"),
                                  ("optim.lr", "2"), ("data.sources", "a,b")])
  expected = config_lib.replace(cli.load_config(TINY), **{
      "optim.lr": 2.0, "model.moe.experts": 32, "data.sources": ("a", "b")})
  assert config == expected


def test_overrides_are_judged_together():
  """Law: 3 groups of 6 experts are valid, each half of that change alone is not."""
  pairs = [("model.moe.experts", "6"), ("model.moe.groups", "3"), ("model.moe.active_groups", "3")]
  assert cli.load_config(TINY, pairs).model.moe.experts == 6
  with pytest.raises(ConfigError, match="model.moe.groups"):
    cli.load_config(TINY, pairs[:1])


def test_get_config_may_return_a_partial_configdict(tmp_path):
  """Oracle: the dataclass defaults where the ConfigDict says nothing."""
  path = experiment(tmp_path, "from ml_collections import ConfigDict\n"
                    "def get_config(arg=None):\n"
                    "  return ConfigDict({'optim': {'lr': 1}, 'model': {'moe': {'shared': 2}}})\n")
  expected = config_lib.replace(config_lib.Config(), **{"optim.lr": 1.0, "model.moe.shared": 2})
  assert cli.load_config(path) == expected


def test_a_runs_config_json_is_a_config(tmp_path):
  """Law: what a run wrote starts the same run."""
  config = cli.load_config(TINY)
  (tmp_path / "config.json").write_text(config_lib.to_json(config))
  assert cli.load_config(str(tmp_path / "config.json")) == config


@pytest.mark.parametrize("body, words", [
    ("x = 1\n", ["defines no function get_config"]),
    ("get_config = 3\n", ["defines no function get_config"]),
    ("def get_config():\n  return 3\n", ["Config", "not a int"]),
    ("from ml_collections import ConfigDict\n"
     "def get_config():\n  return ConfigDict({'optim': {'lrr': 1}})\n",
     ["optim.lrr", "did you mean 'optim.lr'"]),
    ("from ml_collections import ConfigDict\n"
     "def get_config():\n  return ConfigDict({'optim': {'lr': 'x'}})\n", ["optim.lr='x'", "float"]),
    ("from ml_collections import ConfigDict\n"
     "def get_config():\n  return ConfigDict({'optim': 3})\n", ["optim=3"]),
])
def test_unusable_experiment_files(tmp_path, body, words):
  """Oracle: the words that say what the file should hold."""
  with pytest.raises(ConfigError) as error:
    cli.load_config(experiment(tmp_path, body))
  for word in words:
    assert word in str(error.value)


def test_argument_for_a_file_that_takes_none(tmp_path):
  """Oracle: the argument is named."""
  with pytest.raises(ConfigError, match=":big: get_config of this file takes no argument"):
    cli.load_config(experiment(tmp_path, "def get_config():\n  return 3\n") + ":big")


def test_default_workdir():
  """Oracle: the names in the help text."""
  assert cli.default_workdir("experiments/tiny.py") == Path("runs/tiny")
  assert cli.default_workdir("experiments/tiny.py:a/b c") == Path("runs/tiny-a_b_c")


@pytest.mark.parametrize("path", EXPERIMENTS, ids=[p.stem for p in EXPERIMENTS])
def test_experiments_build_and_explain_themselves(path):
  """Law: each builds, and its docstring has a question, a command, a cost, an expected result."""
  cli.load_config(str(path))
  text = path.read_text()
  docstring = text.split('"""')[1]
  assert "?" in docstring.splitlines()[0]
  command = "sweep" if path.name.startswith("ablate_") else "train"
  for part in ("Run:", f"dsv3 {command} --config=experiments/{path.name}", "Cost:", "Expected:"):
    assert part in docstring, f"{path.name} lacks {part}"


@pytest.mark.parametrize("spec", ["tiny.py:smoke", "balance_1b.py:aux", "balance_3b.py:aux"])
def test_experiment_arguments(spec):
  """Law: an argument changes the config, and another argument is refused with the valid one."""
  name, arg = spec.split(":")
  path = str(ROOT / "experiments" / name)
  assert cli.load_config(f"{path}:{arg}") != cli.load_config(path)
  with pytest.raises(ConfigError, match=f"only argument is {arg}"):
    cli.load_config(f"{path}:{arg}x")


def test_v3_experiment_has_the_reports_settings():
  """Oracle: facts 4.3, in tokens and sequences."""
  config = cli.load_config(str(ROOT / "experiments" / "v3_671b.py"))
  tokens, optim, loss, data = config.train.tokens, config.optim, config.loss, config.data
  assert tokens == 14.8e12
  assert (data.batch_start, data.batch_size, data.sequence_length) == (3072, 15360, 4096)
  assert data.batch_ramp_until * tokens == pytest.approx(469e9)
  assert optim.lr_constant_until * tokens == pytest.approx(10e12)
  assert optim.lr_cosine_until * tokens == pytest.approx(14.3e12)
  assert (1 - optim.lr_last_from) * tokens == pytest.approx(167e9)
  assert (optim.lr, optim.lr_final, optim.lr_last) == (2.2e-4, 2.2e-5, 7.3e-6)
  assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_norm) == (0.9, 0.95, 0.1, 1.0)
  assert optim.mu_dtype == optim.nu_dtype == "bfloat16"
  assert (loss.bias_speed, loss.sequence_balance) == (1e-3, 1e-4)
  assert loss.bias_until * tokens == pytest.approx(14.3e12)
  assert (loss.mtp_weight, loss.mtp_weight_late) == (0.3, 0.1)
  assert data.fim_rate == 0.1


@pytest.mark.parametrize("name, steps", [("balance_1b", 40_000), ("balance_3b", 56_514)])
def test_balance_experiments_have_the_papers_length(name, steps):
  """Oracle: facts 1.7: steps at the batch and length given there."""
  config = cli.load_config(str(ROOT / "experiments" / f"{name}.py"))
  assert config.train.tokens / (config.data.batch_size * config.data.sequence_length) == steps


# --- the process ----------------------------------------------------------------------------------


@pytest.mark.parametrize("words, named", [
    (["train", "--config=experiments/tinny.py"], "did you mean experiments/tiny.py?"),
    (["train", "--config=nowhere/x.py"], "no such file"),
    (["train", "--config=experiments/tiny.py", "--config.optim.lrr=1"],
     "unknown config key 'optim.lrr'; did you mean 'optim.lr'?"),
    (["train", "--config=experiments/tiny.py", "--config.optim.lr=x"],
     "--config.optim.lr=x: a number is expected"),
    (["train", "--config=experiments/tiny.py", "--config.optim.lr"], "needs a value"),
    (["train", "--config=experiments/tiny.py", "--config.model.moe=x"], "is a section"),
    (["train", "--config=experiments/tiny.py", "--config.model.moe.active=9"], "lower it to 8"),
    (["train", "--config=experiments/tiny.py:larger"], "the only argument is smoke"),
    (["train", "--config=experiments/v3_671b.py:larger"], "takes no argument"),
    (["train", "--config=experiments/tiny.py", "--wrkdir=x"], "did you mean --workdir?"),
    (["train", "--config=experiments/tiny.py", "--config.optim.lr=1", "stray"],
     "unknown argument 'stray'"),
    (["train", "--confg=experiments/tiny.py"], "did you mean --config?"),
    (["train"], "--config"), (["trian"], "unknown command 'trian'; did you mean train?"),
    ([], "COMMAND"), (["eval", "nowhere"], "nowhere is not a folder; give the workdir of a run"),
    (["eval", "experiments"], "holds no checkpoints/; give the workdir of a run"),
    (["report", "nowhere"], "nowhere is not a folder"),
    (["report", "experiments"], "no run was started there"),
    (["convert", "experiments", "x"], "neither checkpoints/ nor config.json"),
])
def test_mistakes_cost_one_line_and_exit_with_2(words, named, capsys, monkeypatch):
  """Oracle: exit code 2, the words that help, no traceback, nothing on standard output."""
  monkeypatch.chdir(ROOT)
  try:
    code = cli.run(words)
  except SystemExit as leave:
    code = leave.code
  out, err = capsys.readouterr()
  assert code == 2
  assert named in err
  assert "Traceback" not in err
  assert out == ""


def test_config_mistakes_are_found_before_jax_is_imported():
  """Oracle: the modules of a fresh interpreter after the mistake was reported."""
  code = ("import sys; from dsv3_jax import cli; "
          f"assert cli.run(['train', '--config={TINY}', '--config.optim.lrr=1']) == 2; "
          "sys.exit('jax' in sys.modules)")
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_fault_of_ours_keeps_its_traceback(tmp_path):
  """Oracle: Python's own report of an exception in an experiment file, exit code 1."""
  path = experiment(tmp_path, "def get_config(arg=None):\n  return {}['missing']\n")
  result = dsv3("train", f"--config={path}")
  assert result.returncode == 1
  assert "Traceback" in result.stderr
  assert "KeyError: 'missing'" in result.stderr


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["report", "--help"],
                                   ["eval", "--help"], ["tokenize", "--help"],
                                   ["convert", "--help"]])
def test_help_has_examples(words, capsys):
  """Oracle: examples that start with the command's own name."""
  with pytest.raises(SystemExit) as leave:
    cli.run(words)
  out = capsys.readouterr().out
  assert leave.value.code == 0
  assert "examples:\n  dsv3 " + (words[0] if len(words) > 1 else "") in out


def test_help_is_quick():
  """Bound: the best of three starts, at most half a second beyond that of a bare interpreter."""
  def best(*words: str) -> float:
    times = []
    for _ in range(3):
      start = time.perf_counter()
      subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=True)
      times.append(time.perf_counter() - start)
    return min(times)
  assert best("-m", "dsv3_jax.cli", "--help") - best("-c", "pass") < 0.5


def test_print_config_is_the_config():
  """Law: the printed JSON is a config, equal to the one that would run."""
  result = dsv3("train", "--config=experiments/tiny.py", "--config.optim.lr", "3e-4",
                "--print-config")
  assert result.returncode == 0, result.stderr
  assert config_lib.from_dict(json.loads(result.stdout)) == cli.load_config(
      TINY, [("optim.lr", "3e-4")])


def test_report_command(tmp_path):
  """Oracle: the path printed is a page that exists."""
  workdir = synthetic.write(tmp_path / "run", steps=20, eval_every=10)
  result = dsv3("report", str(workdir))
  assert result.returncode == 0, result.stderr
  assert Path(result.stdout.strip()) == workdir / "report.html"
  assert (workdir / "report.html").is_file()


@pytest.mark.parametrize("exit_code", [0, 130])
def test_train_passes_the_config_on_and_reports(tmp_path, monkeypatch, capsys, exit_code):
  """Oracle: a stand-in for training sees config and workdir; report, command and code follow it."""
  from dsv3_jax import train

  seen = []

  def stand_in(config, workdir):
    seen.append((config, workdir))
    synthetic.write(Path(workdir), steps=3, eval_every=0, finished=False)
    return train.RunResult(workdir, 3, 6144, exit_code == 0, exit_code, {})

  monkeypatch.setattr(train, "run", stand_in)
  monkeypatch.chdir(tmp_path)
  words = ["train", f"--config={TINY}:smoke", "--config.optim.lr=0.5"]
  assert cli.run(words) == exit_code
  workdir = tmp_path / "runs" / "tiny-smoke"
  expected = cli.load_config(f"{TINY}:smoke", [("optim.lr", "0.5")])
  assert seen == [(expected, "runs/tiny-smoke")]
  assert "report: runs/tiny-smoke/report.html" in capsys.readouterr().out
  assert (workdir / "command.txt").read_text() == f"dsv3 {' '.join(words)}\n"
  assert words[-1] in (workdir / "report.html").read_text()
