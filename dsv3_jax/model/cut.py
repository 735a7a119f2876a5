"""Which layers each stage of a pipeline holds; without jax, for those who only plan."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax import config


class Kind(NamedTuple):
  """What a stage computes: so many dense and MoE layers, and the end if it is the last."""

  dense: int
  moe: int
  last: bool


def cut(cfg: config.Model, stages: int, layers: Sequence[int] | None = None) -> tuple[Kind, ...]:
  """The stages' kinds.

  Args:
    cfg: the model.
    stages: how many.
    layers: of each stage; None: evenly, an MTP module counting as a layer of the last stage, and
      earlier stages having one more where they do not come out even.

  Raises:
    ValueError: `layers` does not fit the stages or the model.
  """
  if layers is None:
    each, more = divmod(cfg.layers + cfg.mtp_depth, stages)
    layers = [each + (s < more) for s in range(stages)]
    layers[-1] -= cfg.mtp_depth
    for s in reversed(range(1, stages)):  # MTP alone may be more than a share
      if layers[s] < 0:
        layers[s - 1] += layers[s]
        layers[s] = 0
  if len(layers) != stages or sum(layers) != cfg.layers or min(layers) < 0:
    raise ValueError(f"layers={list(layers)} must be {stages} numbers, one a stage, that add up to "
                     f"the model's {cfg.layers} layers")
  ends = np.cumsum(layers)
  dense = [int(np.clip(cfg.dense_layers - (end - n), 0, n))
           for end, n in zip(ends, layers, strict=True)]
  return tuple(Kind(d, int(n) - d, s == stages - 1)
               for s, (d, n) in enumerate(zip(dense, layers, strict=True)))
