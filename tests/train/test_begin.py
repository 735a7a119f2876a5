"""A run that begins with another one's parameters."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from dsv3_jax import config as config_lib
from dsv3_jax.config import ConfigError
from dsv3_jax.train import begin, checkpoint
from tests.train import fakes, runs


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  folder = tmp_path_factory.mktemp("first")
  config = fakes.small_config(**{"train.tokens": 64 * 2, "train.eval_every": 0})
  runs.run(config, folder)
  (folder / "tokenizer.json").write_text("{}")
  return folder


def test_parameters_come_along(first, tmp_path):
  """Oracle: the first run's checkpoint: at learning rate 0 the second run's are the same, biases
  too, from step 0 on and with moments of its own; going on it does not ask for the first again."""
  copy = tmp_path / "copy"
  shutil.copytree(first, copy)
  config = fakes.small_config(**{
      "train.tokens": 64 * 4, "train.eval_every": 0, "train.init": str(copy), "optim.lr": 0.0,
      "optim.lr_final": 0.0, "optim.lr_last": 0.0, "loss.bias_speed": 0.0, "train.seed": 9})
  ui = runs.Interrupt(2)
  assert not runs.run(config, tmp_path / "second", ui).finished
  assert f"begins with the parameters of {copy}" in ui.notes
  again = runs.Notes()
  assert runs.run(config, tmp_path / "second", again).finished
  assert not any("begins with" in note for note in again.notes)
  ours, theirs = (checkpoint.load_params(str(f)) for f in (tmp_path / "second", first))
  jax.tree.map(np.testing.assert_array_equal, ours[:2], theirs[:2])
  assert ours[2]["step"] == 4 and runs.records(tmp_path / "second")[0]["step"] == 1
  assert ours[2]["config"]["data"]["tokenizer"] == str(copy / "tokenizer.json")


def test_refusals(first, tmp_path):
  """Oracle: the messages: no run, no tokenizer, another model; YaRN may differ."""
  ask = lambda **changes: fakes.small_config(**{
      "train.init": str(first), **{k.replace("__", "."): v for k, v in changes.items()}})
  with pytest.raises(ConfigError, match="holds no checkpoints/; give the workdir of a run"):
    begin.with_tokenizer(ask(train__init=str(tmp_path)))
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ConfigError, match="holds no tokenizer.json; name the tokenizer"):
    begin.with_tokenizer(ask(train__init=str(tmp_path)))
  with pytest.raises(ConfigError, match=r"has model\.attention\.heads=.*set model\.atten"):
    config = ask()
    attention = dataclasses.replace(config.model.attention, heads=2 * config.model.attention.heads)
    begin.begin(None, config_lib.replace(config, **{"model.attention": attention}))
