"""A run that begins with another run's parameters: long context, fine-tuning, GRPO.

Optimizer moments, schedules and counters begin anew; router biases come along. A run that has a
checkpoint of its own goes on from that, and does not look at the other one any more.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.train import checkpoint
from dsv3_jax.train.state import TrainState


def with_tokenizer(cfg: config.Config) -> config.Config:
  """The config with the tokenizer of `train.init`, if it names no other.

  Raises:
    ConfigError: `train.init` names no run, or what it names has no tokenizer.
  """
  if not cfg.train.init:
    return cfg
  folder = Path(cfg.train.init)
  if not (folder / "checkpoints").is_dir():
    raise ConfigError(f"train.init={cfg.train.init!r} holds no checkpoints/; give the workdir of a "
                      "run (`dsv3 convert` makes one of a Hugging Face folder)")
  if cfg.data.tokenizer:
    return cfg
  if not (folder / "tokenizer.json").is_file():
    raise ConfigError(f"train.init={cfg.train.init!r} holds no tokenizer.json; name the tokenizer "
                      "that it was trained with in data.tokenizer")
  return config.replace(cfg, **{"data.tokenizer": str(folder / "tokenizer.json")})


def begin(state: TrainState, cfg: config.Config) -> TrainState:
  """The initial state with the parameters and router biases of `cfg.train.init`.

  Args:
    state: initial.
    cfg: the model may differ from the other run's in YaRN alone, which has no parameters.

  Raises:
    ConfigError: the other run's model is another one.
    CheckpointError: it has no checkpoint, or a damaged one.
  """
  params, buffers, meta = checkpoint.load_params(cfg.train.init)
  theirs, ours = (_shape(c) for c in (config.from_dict(meta["config"]).model, cfg.model))
  for key, value in theirs.items():
    if value != ours[key]:
      raise ConfigError(f"train.init={cfg.train.init!r} has model.{key}={value}, this run "
                        f"{ours[key]}; set model.{key}={value}")

  def put(new: Any, old: jax.Array) -> jax.Array:
    host = np.asarray(new)
    return jax.make_array_from_callback(old.shape, old.sharding, host.__getitem__)

  params, buffers = jax.tree.map(put, (params, buffers), (state.params, state.buffers))
  return dataclasses.replace(state, params=params, buffers=buffers)


def _shape(model: config.Model) -> dict[str, Any]:
  """What parameters and their use depend on, by dotted keys; not how they were initialised."""
  flat: dict[str, Any] = {}

  def visit(values: dict[str, Any], prefix: str) -> None:
    for key, value in values.items():
      if isinstance(value, dict):
        visit(value, f"{prefix}{key}.")
      else:
        flat[prefix + key] = value

  visit(config.to_dict(model), "")
  return {k: v for k, v in flat.items()
          if not k.startswith("attention.yarn.") and k != "init_std"}
