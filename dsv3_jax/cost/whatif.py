"""What if the hardware were another: the report's suggestions (3.5) as changes of a `Hardware`."""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import NamedTuple

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.cost import step
from dsv3_jax.cost.hardware import Hardware

HELP = {
    "slow=FACTOR": "slow links (InfiniBand, DCN) FACTOR times as fast",
    "fast=FACTOR": "fast links (NVLink, ICI) FACTOR times as fast",
    "sms=N": "N processors given to communication; 0: a co-processor does it",
    "native_scales": "the matrix units apply block scales and keep fp32 sums: no promotion; an "
                     "upper bound",
    "accumulation": "wider sums in the matrix units alone: the scales still have to be applied "
                    "every 128 values, so this gains accuracy, not time",
    "fused_cast": "FP8 casts on the way into the chip (TMA)",
    "transposed_reads": "matmuls read operands transposed: no casts along tokens for Wgrad",
    "unified": "one domain of fast links for all devices, rows sent straight to them",
}
SUGGESTED = ("sms=0", "native_scales", "accumulation", "fused_cast", "transposed_reads", "unified")


class Change(NamedTuple):
  """Seconds of a step after a change, and the change in words."""

  name: str
  meaning: str
  step: float
  gain: float


def apply(text: str, hw: Hardware) -> Hardware:
  """The hardware after one change, written as in HELP.

  Raises:
    ConfigError: an unknown change (the nearest is named), or a bad number.
  """
  name, _, value = text.partition("=")
  names = {known.partition("=")[0]: known for known in HELP}
  if name not in names:
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {names[near[0]]}?" if near else f"choose from {', '.join(HELP)}"
    raise ConfigError(f"--what-if={text}: there is no such change; {hint}")
  if ("=" in names[name]) != bool(value):
    raise ConfigError(f"--what-if={text}: write {names[name]}")
  if name in ("slow", "fast"):
    return dataclasses.replace(hw, **{name: getattr(hw, name) * _number(text, value)})
  if name == "sms":
    return dataclasses.replace(hw, comm_sms=_count(text, value))
  if name == "unified":
    return dataclasses.replace(hw, fast_devices=2**31, slow=hw.fast)
  if name == "accumulation":
    return hw
  return dataclasses.replace(hw, **{name: True})


def _number(text: str, value: str) -> float:
  try:
    number = float(value)
  except ValueError:
    number = math.nan
  if not 0 < number < math.inf:
    raise ConfigError(f"--what-if={text}: {value!r} must be a positive factor")
  return number


def _count(text: str, value: str) -> int:
  if not value.isdecimal():
    raise ConfigError(f"--what-if={text}: {value!r} must be a whole number of processors")
  return int(value)


def _direct(cfg: config.Config, texts: Iterable[str]) -> config.Config:
  """With dispatch in one hop where the links are unified: two would then only be longer."""
  if "unified" not in texts or cfg.runtime.dispatch.form != "two_hop":
    return cfg
  return config.replace(cfg, **{"runtime.dispatch.form": "flat"})


def changes(cfg: config.Config, hw: Hardware, texts: tuple[str, ...]) -> list[Change]:
  """Each change alone, and all of them together where there are several."""
  before = step.estimate(cfg, hw).step
  meanings = {known.partition("=")[0]: meaning for known, meaning in HELP.items()}
  found, together = [], hw
  for text in texts:
    after = step.estimate(_direct(cfg, (text,)), apply(text, hw)).step
    together = apply(text, together)
    found.append(Change(text, meanings[text.partition("=")[0]], after, before - after))
  if len(texts) > 1:
    after = step.estimate(_direct(cfg, texts), together).step
    found.append(Change("all of these", "", after, before - after))
  return found
