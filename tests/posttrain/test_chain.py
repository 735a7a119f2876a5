"""Stages in a row, and the exam after each."""

import dataclasses
import functools
import types

import pytest

from dsv3_jax import cli
from dsv3_jax import config as config_lib
from dsv3_jax.cli import configs
from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import chain, exam, experts, tasks
from dsv3_jax.posttrain import run as kinds

EXPERIMENT = '''"""Does it?"""
from dsv3_jax.config import Config, replace

def get_config(arg=None):
  return replace(Config(), **{"train.tokens": 1e4})

def stages(arg=None):
  yield {"stage": "first", "optim.lr": 0.5}
  yield {"stage": "second", "kind": "sft", "sft.problems": ("add:0:5",)}
  yield {"stage": "third", "kind": "grpo", "grpo.problems": ("add:0:5",)}
'''


def stages(tmp_path, text=EXPERIMENT, overrides=()):
  (tmp_path / "e.py").write_text(text)
  return configs.load_stages(str(tmp_path / "e.py"), overrides, tmp_path / "runs")


def test_stages_of_an_experiment(tmp_path):
  """Oracle: by hand: each begins with the one before; overrides come before a stage's own keys."""
  found = stages(tmp_path, overrides=[("optim.lr", "0.1")])
  assert [name for name, _, _ in found] == ["first", "second", "third"]
  folders = [folder for _, folder, _ in found]
  assert folders[1] == str(tmp_path / "runs" / "2-second")
  assert [c.train.init for _, _, c in found] == ["", *folders[:2]]
  assert [c.optim.lr for _, _, c in found] == [0.5, 0.1, 0.1]
  assert [c.kind for _, _, c in found] == ["pretrain", "sft", "grpo"]
  assert configs.load_stages("experiments/tiny.py", (), tmp_path) == []


@pytest.mark.parametrize("old, new, message", [
    ('"stage": "third", ', "", "stage 2 must be a dictionary with a name"),
    ("third", "first", "two stages are called 'first'"),
    ('"grpo.problems"', '"grpo.problem"', "stage 'third': unknown config key 'grpo.problem'"),
    ('"kind": "grpo"', '"kind": "grop"', "did you mean 'grpo'")])
def test_refusals(tmp_path, old, new, message):
  """Oracle: the messages."""
  with pytest.raises(ConfigError, match=message):
    stages(tmp_path, EXPERIMENT.replace(old, new))


def test_chain(tmp_path):
  """Law: stages run in order up to one that was stopped; an exam counts what ended and is right."""
  made = [chain.Stage(*stage) for stage in stages(tmp_path)]
  ran = []

  def one(config, folder, last, late):
    ran.append(config.kind)
    finished = not folder.endswith(last)
    return types.SimpleNamespace(finished=finished or late, exit_code=7 * (not finished))

  for late in (False, True):  # the signal came when all steps were done
    ran.clear()
    stopped = functools.partial(one, last="second", late=late)
    assert chain.run(made, stopped, lambda text: None).exit_code == 7
    assert ran == ["pretrain", "sft"]
  problems = tasks.make("add", 0, 4, 1)
  texts = [problems[0].worked, problems[1].worked, "no idea", problems[0].worked]
  found = exam.summary(problems, texts, [3, 4, 5, 6], [True, False, True, True])
  part = found["parts"]["add:0"]
  assert part["solved"] == 0.25 and part["cut_off"] == 0.25 and part["length"] == 4.5
  assert [a["solved"] for a in found["answers"]] == [True, False, False, False]


def test_what_is_not_there_is_said_before_the_first_stage(tmp_path, capsys):
  """Oracle: the messages; what an earlier stage will leave may be missing."""
  made = stages(tmp_path, EXPERIMENT.replace('"kind": "grpo", "grpo.problems": ("add:0:5",)', (
      '"kind": "distill", "distill.experts": ("second=add:0:5", "other=add:0:5")')))
  cfg, coming = made[2][2], [folder for _, folder, _ in made[:2]]
  assert cfg.distill.experts[0] == f"{coming[1]}=add:0:5"
  with pytest.raises(ConfigError, match="distill.experts: .*other"):
    kinds.check(cfg, coming)
  known = config_lib.replace(cfg, **{"distill.experts": cfg.distill.experts[:1]})
  kinds.check(known, coming)
  with pytest.raises(ConfigError, match="2-second"):
    kinds.check(known)
  with pytest.raises(ConfigError, match="but its train split has"):
    kinds.check(config_lib.replace(known, **{
        "distill.experts": (f"{coming[1]}=add:0:99999",)}), coming)
  with pytest.raises(ConfigError, match="two problems with the id"):
    files = [tmp_path / f"{name}.jsonl" for name in "ab"]
    for n, file in enumerate(files):
      tasks.write(file, [dataclasses.replace(tasks.make("add", 0, 2, 0)[n], id="1")])
    (tmp_path / "hf").mkdir()
    for name in ("config.json", "tokenizer.json"):
      (tmp_path / "hf" / name).write_text("{}")
    experts.named(config_lib.replace(known, **{"distill.experts": tuple(
        f"{tmp_path / 'hf'}={file}" for file in files)}).distill, 0)
  command = ["train", f"--config={tmp_path / 'e.py'}", f"--workdir={tmp_path / 'runs'}"]
  for more, message in ((["--stage=forth"], "has the stages first, second, third"), (
      ["--processes=2", "--process=0", "--coordinator=a:1"], "a stage at a time")):
    assert cli.run(command + more) == 2
    assert message in capsys.readouterr().err


def test_an_exam(tmp_path, monkeypatch):
  """Law: a model that knows the solutions solves all; an exam is not taken twice, but for other
  settings; problems are of the test split."""
  cfg = config_lib.replace(config_lib.Config(), **{"exam.problems": ("add:0:3", "sort:0:2")}).exam
  problems = tasks.named(cfg.problems, 5, "exam.problems", "test")
  from dsv3_jax import trained

  class Tokenizer:
    bos, eos, user, assistant = 0, 1, 2, 3

    def encode(self, text):
      return [10 + ord(c) for c in text]

    def decode(self, tokens):
      return "".join(chr(t - 10) for t in tokens)

  def generator(prompts, steps, sampling, stop):
    asked = [Tokenizer().decode([t for t in p if t >= 10]) for p in prompts]
    answers = {p.prompt: p.worked for p in problems}
    return [types.SimpleNamespace(tokens=Tokenizer().encode(answers[text]), finish="stop")
            for text in asked]

  calls = []
  monkeypatch.setattr(trained, "load", lambda source: calls.append(source) or (
      generator, Tokenizer(), 256))
  found = exam.take(cfg, str(tmp_path), 5)
  assert found["solved"] == 1 and found["parts"]["sort:0"]["problems"] == 2
  assert exam.take(cfg, str(tmp_path), 5) == found and len(calls) == 1
  exam.take(config_lib.replace(cfg, new_tokens=9), str(tmp_path), 5)
  assert len(calls) == 2
  with pytest.raises(ConfigError, match="exam.problems: 'add' must be FAMILY:LEVEL:COUNT"):
    exam.check(config_lib.replace(cfg, problems=("add",)))
