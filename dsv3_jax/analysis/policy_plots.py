"""Figures of a run of GRPO: reward, length, how far the policy has gone, and what was in vain.

As in plots.py, each takes a `Run` and returns a figure, or None where the run drew no outputs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dsv3_jax.analysis import plots
from dsv3_jax.analysis.workdir import Run

TRANSCRIPTS = "transcripts.jsonl"  # of posttrain/rollout.py


CAPTIONS = {
    "reward": "Of the outputs that each step learns from, and the share that is right.",
    "length": "Of the outputs, the end token included.",
    "distance": "The divergence's estimate of eq. 28, and the entropy of the policy's next token.",
    "shares": "Groups whose rewards are all alike have no advantage; clipped tokens no gradient."}


def reward(run: Run) -> Figure | None:
  """Mean reward of each step's rollout, and the share of outputs that have all of it."""
  return _figure(run, "reward, share solved", (
      ("reward", plots.BLUE, "mean reward"), ("solved", plots.ORANGE, "solved")), low=0.0)


def length(run: Run) -> Figure | None:
  """Mean and longest output."""
  return _figure(run, "tokens of an output", (
      ("length", plots.BLUE, "mean"), ("length_max", plots.GREEN, "longest")), low=0.0)


def distance(run: Run) -> Figure | None:
  """Divergence from the reference, and entropy."""
  return _figure(run, "nats per token", (
      ("kl", plots.PURPLE, "KL to the reference"), ("entropy", plots.GREEN, "entropy")), low=0.0)


def shares(run: Run) -> Figure | None:
  """Outputs cut off, groups without advantage, and clipped tokens."""
  return _figure(run, "share", (
      ("same_reward", plots.ORANGE, "groups with one reward"),
      ("cut_off", plots.RED, "outputs cut off"),
      ("clipped_low", plots.BLUE, "tokens clipped below"),
      ("clipped_high", plots.PURPLE, "tokens clipped above")), low=0.0, high=1.0)


ALL = (("reward", "Reward", reward), ("length", "Length", length),
       ("distance", "How far the policy is", distance), ("shares", "What did not teach", shares))


def transcripts(folder: str | Path) -> list[dict[str, Any]]:
  """Outputs that a run kept, in their order; of a rollout that was repeated the last."""
  path = Path(folder) / TRANSCRIPTS
  found: dict[tuple[int, str], dict[str, Any]] = {}
  if path.is_file():
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
      try:
        row = json.loads(line)
        found[int(row["rollout"]), str(row["id"])] = row
      except (ValueError, TypeError, KeyError):
        continue  # half written when the run was killed
  return [found[key] for key in sorted(found, key=lambda key: key[0])]


def _figure(run: Run, what: str, lines: tuple[tuple[str, str, str], ...], low: float,
            high: float | None = None) -> Figure | None:
  there = [line for line in lines if np.isfinite(plots.column(run.train, line[0])).any()]
  if not there or not np.isfinite(plots.column(run.train, "reward")).any():
    return None
  figure, axes = plots.new_axes("step", what)
  axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  step_N = plots.column(run.train, "step")
  for key, colour, label in there:
    draw(axes, step_N, plots.column(run.train, key), colour, label)
  axes.set_ylim(low, high)
  return plots.finish(axes)


def draw(axes: Axes, step_N: np.ndarray, values_N: np.ndarray, colour: str, label: str) -> None:
  """Values faint, and their mean over a tenth of the steps."""
  window = max(1, min(len(step_N) // 10, 50))
  if window > 1:
    axes.plot(step_N, values_N, color=colour, linewidth=0.9, alpha=0.3)
  axes.plot(step_N, plots.smooth(values_N, window), color=colour, linewidth=1.7, label=label)
