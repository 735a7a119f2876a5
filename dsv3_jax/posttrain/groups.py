"""Groups of outputs as a batch: advantages, weights, and outputs packed into sequences. numpy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax import config

_SAME = 1e-6  # standard deviations of rewards below this are rounding


class Output(NamedTuple):
  """One completion of a group.

  Attributes:
    prompt: tokens.
    tokens: what was drawn after it, the end token included if it came.
    old, ref: log-probabilities of `tokens` under the policy that drew and the reference.
    advantage: of the whole output.
    counts: whether it has part in the objective.
  """

  prompt: Sequence[int]
  tokens: Sequence[int]
  old: Sequence[float]
  ref: Sequence[float]
  advantage: float
  counts: bool = True


def advantages(reward_NG: np.ndarray, cfg: config.GRPO) -> tuple[np.ndarray, np.ndarray]:
  """Advantages (eq. 28), fp64 [N, G], and which groups have any, bool [N].

  The standard deviation is that of the group as it is, over G. `cfg.normalize` False leaves it
  out: then problems that are nearly always or never solved do not weigh more than others.
  """
  centred_NG = reward_NG - reward_NG.mean(1, keepdims=True)
  std_N1 = reward_NG.std(1, keepdims=True)
  differs_N1 = std_N1 > _SAME
  scaled_NG = centred_NG / np.where(differs_N1, std_N1, 1) if cfg.normalize else centred_NG
  return np.where(differs_N1, scaled_NG, 0.0), differs_N1[:, 0]


def weights(lengths: Sequence[int], cfg: config.GRPO) -> np.ndarray:
  """What each token of outputs of these lengths weighs in the objective, fp64, one an output.

  `cfg.mean` "sequence": tokens are averaged in each output, then outputs; "token": all tokens of
  the batch are alike, so that long outputs are not excused for their length (arXiv 2503.14476).
  """
  n = np.asarray(lengths, np.float64)
  if cfg.mean == "token":
    return np.full(len(n), 1 / max(n.sum(), 1))
  return 1 / (np.maximum(n, 1) * max(len(n), 1))


def pack(outputs: Sequence[Output], length: int) -> list[list[Output]]:
  """Outputs in rows of `length` tokens, none cut: the longest first, each where it still fits.

  Raises:
    ValueError: one is longer than that.
  """
  rows: list[tuple[int, list[Output]]] = []
  for output in sorted(outputs, key=lambda o: -len(o.prompt) - len(o.tokens)):
    size = len(output.prompt) + len(output.tokens)
    if size > length:
      raise ValueError(f"an output of {size} tokens does not fit a sequence of {length}")
    for i, (used, row) in enumerate(rows):
      if used + size <= length:
        rows[i] = (used + size, [*row, output])
        break
    else:
      rows.append((size, [output]))
  return [row for _, row in rows]


def batch(rows: Sequence[Sequence[Output]], count: int, length: int, pad: int, cfg: config.GRPO
          ) -> dict[str, np.ndarray]:
  """Rows of outputs as arrays [count, length]; rows that are missing are padding.

  Returns:
    "tokens" and "segments" int32, "mask" int8, and fp32 "old", "ref", "advantage", "weight", each
    at the place of its token. Weights are those of all outputs that count, here together.
  """
  shape = (count, length)
  made = {"tokens": np.full(shape, pad, np.int32), "segments": np.full(shape, -1, np.int32),
          "mask": np.zeros(shape, np.int8)}
  made |= {name: np.zeros(shape, np.float32) for name in ("old", "ref", "advantage", "weight")}
  counting = [o for row in rows for o in row if o.counts and len(o.tokens)]
  weight = dict(zip(map(id, counting), weights([len(o.tokens) for o in counting], cfg)))
  for b, row in enumerate(rows):
    at = 0
    for number, o in enumerate(row):
      start, end = at + len(o.prompt), at + len(o.prompt) + len(o.tokens)
      made["tokens"][b, at:end] = [*o.prompt, *o.tokens]
      made["segments"][b, at:end] = number
      if id(o) in weight:
        made["mask"][b, start:end] = 1
        made["old"][b, start:end], made["ref"][b, start:end] = o.old, o.ref
        made["advantage"][b, start:end] = o.advantage
        made["weight"][b, start:end] = weight[id(o)]
      at = end
  return made
