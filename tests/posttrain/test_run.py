"""Runs of fine-tuning and GRPO by the training loop: learning, and interruptions without trace."""

import json

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.posttrain import rewards
from dsv3_jax.posttrain import run as kinds
from dsv3_jax.posttrain.problems import Score
from tests.train import fakes, runs

VOCABULARY = 320


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  """A run to begin with: one step."""
  folder = tmp_path_factory.mktemp("first")
  config = fakes.small_config(**{"train.tokens": 64, "train.eval_every": 0,
                                 "model.vocab_size": VOCABULARY})
  runs.run(config, folder)
  made = tokenizer_lib.train(["a b c d e 1 2 3\n" * 40], VOCABULARY)
  (folder / "tokenizer.json").write_text(made.to_json())
  return folder


def asked(first, **changes):
  return fakes.small_config(**{
      "model.vocab_size": VOCABULARY, "train.init": str(first), "train.eval_every": 0,
      "optim.warmup_steps": 0, "optim.lr": 6e-2, "optim.lr_final": 6e-2, "optim.lr_last": 6e-2,
      "data.validation_fraction": 0.0, "loss.bias_speed": 0.0} | changes)


@pytest.fixture
def many(monkeypatch):
  """A reward that any model can learn: how much of an answer is even bytes."""
  def reward(problems, answers):
    del problems
    return [Score(sum(b % 2 == 0 for b in a.encode()) / max(len(a.encode()), 1)) for a in answers]

  monkeypatch.setattr(rewards, "score", reward)


def grpo(first, **changes):
  return asked(first, **{
      "kind": "grpo", "grpo.problems": ("add:0:8",), "grpo.prompts": 4, "grpo.group": 8,
      "grpo.new_tokens": 4, "grpo.rollouts": 12, "grpo.kl": 0.0, "grpo.cut_off": "keep",
      "data.sequence_length": 64, "data.batch_size": 16, "data.microbatch": 8,
      "train.checkpoint_every": 4} | changes)


def steps(folder):
  return [r for r in runs.records(folder) if r["kind"] == "train"]


def test_grpo_learns(first, tmp_path, many):
  """Law: the reward rises, and does not where rewards are shuffled; the step's line says what a
  rollout was, and transcripts show it."""
  found = {}
  for shuffled in (False, True):
    folder = tmp_path / str(shuffled)
    result = kinds.run(grpo(first, **{"grpo.shuffle_rewards": shuffled}), str(folder),
                       ui=runs.Notes())
    assert result.finished and result.step == 12
    found[shuffled] = [r["reward"] for r in steps(folder)]
  rise = {k: sum(v[-3:]) / 3 - sum(v[:3]) / 3 for k, v in found.items()}
  assert rise[False] > 0.15 and rise[True] < rise[False] / 2, (rise, found)
  row = steps(tmp_path / "False")[0]
  assert row["drift"] < 1e-6 and row["kl"] < 1e-6 and row["clipped_high"] == 0
  assert {"entropy", "objective", "solved", "length", "cut_off", "same_reward"} <= row.keys()
  lines = (tmp_path / "False" / "transcripts.jsonl").read_text().splitlines()
  assert len(lines) == 24 and len(json.loads(lines[0])["outputs"]) == 8


def test_grpo_goes_on_as_if_nothing_had_been(first, tmp_path, many):
  """Oracle: the uninterrupted run, bit for bit: stopped between two rollouts, then within one,
  whose rest and whose refreshed reference come from files."""
  config = grpo(first, **{"grpo.rollouts": 3, "grpo.micro_steps": 2, "grpo.reference_every": 1,
                          "grpo.kl": 0.1, "train.checkpoint_every": 100,
                          "optim.ema_decay": 0.9})
  whole, again = tmp_path / "whole", tmp_path / "again"
  assert kinds.run(config, str(whole), ui=runs.Notes()).finished
  for step in (1, 4):
    assert not kinds.run(config, str(again), ui=runs.Interrupt(step)).finished
  assert kinds.run(config, str(again), ui=runs.Notes()).finished
  runs.assert_same(whole, again)
  assert any(r["clipped_low"] + r["clipped_high"] > 0 or r["drift"] > 1e-4 for r in steps(whole))


def test_drawing_ahead(first, tmp_path, many):
  """Law: a rollout ahead is of the policy before, so that ratios of the second step are not 1.
  Oracle of the rest: the uninterrupted run, bit for bit, where the checkpoint waits for a rollout
  under way."""
  config = grpo(first, **{"grpo.rollouts": 3, "grpo.ahead": True, "train.checkpoint_every": 100,
                          "optim.ema_decay": 0.9})
  whole, again = tmp_path / "whole", tmp_path / "again"
  assert kinds.run(config, str(whole), ui=runs.Notes()).finished
  assert not kinds.run(config, str(again), ui=runs.Interrupt(1)).finished
  assert list(again.glob("rollout-*.npz"))
  assert kinds.run(config, str(again), ui=runs.Notes()).finished
  runs.assert_same(whole, again)
  assert steps(whole)[0]["drift"] < 1e-6 < 1e-4 < steps(whole)[1]["drift"]


def test_fine_tuning(first, tmp_path):
  """Law: the loss falls; two epochs are as many steps as rows and batch say; stopped and gone on
  with it is the same, bit for bit; the workdir has the tokenizer."""
  config = asked(first, **{"kind": "sft", "sft.problems": ("add:0:20",), "sft.epochs": 2.0,
                           "data.sequence_length": 64, "optim.ema_decay": 0.9})
  whole, again = tmp_path / "whole", tmp_path / "again"
  result = kinds.run(config, str(whole), ui=runs.Notes())
  rows = steps(whole)
  assert result.finished and rows[-1]["loss"] < rows[0]["loss"] - 0.3
  assert rows[-1]["epoch"] == 1 and (whole / "tokenizer.json").read_text() == (
      first / "tokenizer.json").read_text()
  assert not kinds.run(config, str(again), ui=runs.Interrupt(2)).finished
  late = kinds.run(config, str(again), ui=runs.Interrupt(result.step))  # all is learnt by then
  assert late.finished and late.exit_code == 143 and not (again / "summary.json").exists()
  assert kinds.run(config, str(again), ui=runs.Notes()).exit_code == 0
  runs.assert_same(whole, again)


def test_refusals(first, tmp_path):
  """Oracle: the messages."""
  with pytest.raises(ConfigError, match="name what to learn from in sft.files or sft.problems"):
    asked(first, kind="sft")
  with pytest.raises(ConfigError, match="kind='grpo' begins with a trained model"):
    grpo(first, **{"train.init": ""})
  with pytest.raises(ConfigError, match="'add:0' must be FAMILY:LEVEL:COUNT"):
    kinds.run(grpo(first, **{"grpo.problems": ("add:0",)}), str(tmp_path))
  with pytest.raises(ConfigError, match="sft.files: .* matches no file"):
    kinds.run(asked(first, **{"kind": "sft", "sft.files": ("nowhere/*.jsonl",)}), str(tmp_path))
  with pytest.raises(ConfigError, match="have room for .* outputs of up to"):
    kinds.run(grpo(first, **{"grpo.new_tokens": 60}), str(tmp_path), ui=runs.Notes())
  with pytest.raises(ConfigError, match="kind='grpo' has no batch ramp"):
    grpo(first, **{"data.batch_start": 8})
  with pytest.raises(ConfigError, match="delayed scaling .*choose another recipe"):
    grpo(first, **{"runtime.recipe": "per_tensor_delayed"})
