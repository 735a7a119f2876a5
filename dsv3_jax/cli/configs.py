"""What a person types, as a `Config`: experiment files and overrides.

An experiment's `get_config(arg)` gives a Config or a ConfigDict, `--config.key=value` overrides it
in a locked ConfigDict, and `config.from_dict` checks the whole. An ablation's `sweep(arg)` yields
its arms. Nothing here imports jax.
"""

import ast
import dataclasses
import difflib
import importlib.util
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import config as config_lib
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.sweep import arm as sweep_arm
from dsv3_jax.sweep.arm import Arm, Sweep

OVERRIDE = "--config."


def load_config(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Config:
  """The validated Config of an experiment file with overrides applied.

  Args:
    spec: path of a Python file that defines `get_config`, with an optional ":arg" for it; or of
      a config.json, as a run writes it.
    overrides: (dotted key, text) pairs, later ones winning.

  Raises:
    ConfigError: no such file, no `get_config`, an unknown key (the nearest is named), a value of
      the wrong type, or a combination that cannot run.
  """
  path, arg = split_spec(spec)
  returned = _read_json(path) if path.suffix == ".json" else _get_config(path, arg)
  return _checked(returned, path, [(key, parse_value(key, text)) for key, text in overrides])


def load_sweep(spec: str, overrides: Sequence[tuple[str, str]] = ()) -> Sweep:
  """The arms that an experiment file's `sweep(arg)` yields, each as a validated Config.

  A sweep yields dictionaries of dotted keys and values that change `get_config(arg)`. The key "arm"
  names the arm; without it the name is made of the other keys. The seed, train.seed, belongs to no
  name: runs that differ in it alone are one arm. The first arm is the baseline.

  Args:
    spec: path of a Python file that defines `get_config` and `sweep`, with an optional ":arg" for
      both.
    overrides: (dotted key, text) pairs for every arm. They come before the arm's own changes, so
      that what an ablation varies stays varied.

  Raises:
    ConfigError: as `load_config`; no `sweep`, no arms, two of one config, or one name for configs
      that differ in more than the seed.
  """
  path, arg = split_spec(spec)
  module = _module(path)
  base = _call(module, path, "get_config", arg)
  common = [(key, parse_value(key, text)) for key, text in overrides]
  arms: list[Arm] = []
  yielded = _call(module, path, "sweep", arg)
  if not isinstance(yielded, Iterable):
    raise ConfigError(f"--config={path}: sweep returned {yielded!r}; it should yield a dictionary "
                      "for each arm, or return a list of them")
  for i, changes in enumerate(yielded):
    if not isinstance(changes, dict):
      raise ConfigError(f"--config={path}: sweep must yield dictionaries of config keys, not a "
                        f"{type(changes).__name__} (arm {i})")
    for key in changes:
      if not isinstance(key, str):
        raise ConfigError(f"--config={path}: sweep yields the key {key!r} (arm {i}); dotted keys "
                          'of the config are expected, such as "optim.lr"')
    if not isinstance(changes.get("arm"), str | None):
      raise ConfigError(f"--config={path}: an arm's name must be text; write \"arm\": "
                        f'"{changes["arm"]}" (arm {i})')
    made = {key: value for key, value in changes.items() if key != "arm"}
    name = changes.get("arm") or sweep_arm.label(made)
    try:
      config = _checked(base, path, [*common, *made.items()])
    except ConfigError as error:
      raise ConfigError(f"--config={path}, arm {name!r}: {error}") from error
    arms.append(Arm(name, config.train.seed, made, config, config_lib.fingerprint(config)))
  return sweep_arm.make(str(path), arg, inspect.getdoc(module) or "", arms)


def load_stages(spec: str, overrides: Sequence[tuple[str, str]], workdir: Path
                ) -> list[tuple[str, str, Config]]:
  """Name, folder and Config of each stage that an experiment file's `stages(arg)` yields; none of a
  file without it.

  A stage is a dictionary of dotted keys and values that change `get_config(arg)`; the key "stage"
  names it. Each but the first begins with the parameters of the one before, or of an earlier one
  that `train.init` names. In `distill.experts` and `reward.model` too an earlier stage's name
  stands for its folder.

  Args:
    spec: as of `load_config`.
    overrides: for every stage, before its own changes.
    workdir: of all of them.

  Raises:
    ConfigError: as `load_config`; a stage without a name, or two of one.
  """
  path, arg = split_spec(spec)
  module = None if path.suffix == ".json" else _module(path)
  if not hasattr(module, "stages"):
    return []
  base = _call(module, path, "get_config", arg)
  common = [(key, parse_value(key, text)) for key, text in overrides]
  found: list[tuple[str, str, Config]] = []
  for i, changes in enumerate(_call(module, path, "stages", arg)):
    name = changes.get("stage") if isinstance(changes, dict) else None
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
      raise ConfigError(f"--config={path}: stage {i} must be a dictionary with a name, such as "
                        '{"stage": "sft", ...}')
    if name in (other for other, _, _ in found):
      raise ConfigError(f"--config={path}: two stages are called {name!r}")
    made = [(key, value) for key, value in changes.items() if key != "stage"]
    before = [("train.init", found[-1][1])] if found else []
    try:
      config = _checked(base, path, [*common, *before, *made])
    except ConfigError as error:
      raise ConfigError(f"--config={path}, stage {name!r}: {error}") from error
    config = _placed(config, {other: folder for other, folder, _ in found})
    found.append((name, str(workdir / f"{i + 1}-{name}"), config))
  return found


def _placed(config: Config, folders: dict[str, str]) -> Config:
  """The config with folders in the place of earlier stages' names."""
  experts = [text.rpartition("=") for text in config.distill.experts]
  return config_lib.replace(config, **{
      "train.init": folders.get(config.train.init, config.train.init),
      "reward.model": folders.get(config.reward.model, config.reward.model),
      "distill.experts": tuple(folders.get(a, a) + equals + b for a, equals, b in experts)})


def _checked(returned: Any, path: Path, changes: Sequence[tuple[str, Any]]) -> Config:
  """What an experiment returned, with changes, through a locked ConfigDict to a Config."""
  from ml_collections import config_dict  # here, so that --help does not wait for it

  if isinstance(returned, config_dict.ConfigDict):
    returned = returned.to_dict()
  if not isinstance(returned, Config | dict):
    raise ConfigError(f"--config={path}: a dsv3_jax.config.Config or a ConfigDict is expected, not "
                      f"a {type(returned).__name__}")
  given = config_lib.to_dict(returned) if isinstance(returned, Config) else returned
  tree = config_dict.ConfigDict(config_lib.to_dict(Config()))
  tree.lock()
  for key, value in _flatten(given):
    config_lib.field_type(key)
    _assign(tree, key, value)
  for key, value in changes:
    config_lib.field_type(key)
    for leaf, below in _flatten({key: value}) if isinstance(value, dict) else [(key, value)]:
      _assign(tree, leaf, below)
  return config_lib.from_dict(tree.to_dict())


def parse_value(key: str, text: str) -> Any:
  """The text of `--config.key=text` as the type of that key.

  Numbers may be written 3e-4, 1e6 (also for integers) and 1_000; booleans true or false; tuples as
  a,b or as a Python tuple or list; where a key may be None, none.

  Raises:
    ConfigError: no such key, a section instead of a value, or text of another type.
  """
  hint = config_lib.field_type(key)
  if dataclasses.is_dataclass(hint):
    names = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(hint))
    raise ConfigError(f"{OVERRIDE}{key}={text}: {key!r} is a section; set one of {names}")
  if hint != (hint := config_lib.optional(hint)) and text.lower() == "none":
    return None
  try:
    if typing.get_origin(hint) is tuple:
      return _parse_tuple(typing.get_args(hint)[0], text)
    return _parse_scalar(hint, text)
  except (ValueError, SyntaxError) as error:
    name = {int: "a whole number", float: "a number", bool: "true or false"}.get(
        hint, f"a value of type {hint}")
    raise ConfigError(f"{OVERRIDE}{key}={text}: {name} is expected") from error


def default_workdir(spec: str) -> Path:
  """runs/<experiment>, or runs/<experiment>-<arg>."""
  path, arg = split_spec(spec)
  name = path.stem if arg is None else f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.=-]+', '_', arg)}"
  return Path("runs") / name


def _parse_scalar(hint: type, text: str) -> Any:
  if hint is str:
    return text
  if hint is bool:
    truth = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in truth:
      raise ValueError(text)
    return truth[text.lower()]
  if hint is float:
    return float(text)
  try:
    return int(text)
  except ValueError:
    number = float(text)  # 1e6
    if not number.is_integer():
      raise
    return int(number)


def _parse_tuple(hint: type, text: str) -> tuple[Any, ...]:
  literal = text[:1] in ("(", "[")
  parts = ast.literal_eval(text) if literal else [p.strip() for p in text.split(",") if p.strip()]
  return tuple(_parse_scalar(hint, str(part)) for part in parts)


def split_spec(spec: str) -> tuple[Path, str | None]:
  path, _, arg = spec.partition(":")
  return Path(path), arg or None


def _require_file(path: Path) -> None:
  if path.is_file():
    return
  files = [str(p) for p in sorted(path.parent.glob(f"*{path.suffix or '.py'}"))]
  near = difflib.get_close_matches(str(path.with_suffix(path.suffix or ".py")), files, n=1)
  hint = f"; did you mean {near[0]}?" if near else ""
  raise ConfigError(f"--config={path}: no such file{hint}")


def _read_json(path: Path) -> Any:
  _require_file(path)
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ConfigError(f"--config={path}: not JSON: {error}") from error


def _get_config(path: Path, arg: str | None) -> Any:
  """What the experiment file's `get_config` returns; its own exceptions pass through."""
  return _call(_module(path), path, "get_config", arg)


def _module(path: Path) -> types.ModuleType:
  """The experiment file, imported."""
  _require_file(path)
  spec = importlib.util.spec_from_file_location(f"dsv3_experiment_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise ConfigError(f"--config={path}: not a Python file")
  module = importlib.util.module_from_spec(spec)
  # An experiment may import its parent (`from experiments import tiny`), as in a notebook that runs
  # in the checkout.
  root = str(path.resolve().parent.parent)
  if root not in sys.path:
    sys.path.append(root)
  spec.loader.exec_module(module)
  return module


def _call(module: types.ModuleType, path: Path, name: str, arg: str | None) -> Any:
  function = getattr(module, name, None)
  if not isinstance(function, types.FunctionType):
    raise ConfigError(f"--config={path}: the file defines no function {name}(arg=None)")
  given = () if arg is None else (arg,)
  try:
    inspect.signature(function).bind(*given)
  except TypeError as error:
    if arg is None:
      raise ConfigError(f"--config={path}: {name} of this file wants an argument; give "
                        f"--config={path}:ARG, or write {name}(arg=None)") from error
    raise ConfigError(f"--config={path}:{arg}: {name} of this file takes no argument; leave :{arg} "
                      f"away, or write {name}(arg=None)") from error
  return function(*given)


def _flatten(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  """(dotted key, value) of every leaf."""
  leaves = []
  for name, value in values.items():
    key = f"{prefix}{name}"
    leaves += _flatten(value, f"{key}.") if isinstance(value, dict) else [(key, value)]
  return leaves


def _assign(tree: Any, key: str, value: Any) -> None:
  """Sets a leaf of the locked ConfigDict."""
  *parents, last = key.split(".")
  for parent in parents:
    tree = tree[parent]
  with tree.ignore_type():  # from_dict checks types, with the key's full name
    tree[last] = value


def pair_overrides(rest: Sequence[str]) -> list[tuple[str, str]]:
  """`--config.key=value` and `--config.key value` as (key, value) pairs."""
  pairs, words = [], list(rest)
  while words:
    word = words.pop(0)
    if not word.startswith(OVERRIDE):
      raise ConfigError(f"unknown argument {word!r}")
    key, equals, value = word.removeprefix(OVERRIDE).partition("=")
    if not equals:
      config_lib.field_type(key)  # a misspelt key is the likelier mistake
      if not words:
        raise ConfigError(f"{word} needs a value: {word}=VALUE")
      value = words.pop(0)
    pairs.append((key, value))
  return pairs
