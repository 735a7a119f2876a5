"""Arms of an experiment side by side: their metrics over seeds, differences tested by seed."""

import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from dsv3_jax.analysis import statistics
from dsv3_jax.analysis.comparison import arms as arms_lib
from dsv3_jax.analysis.comparison.arms import METRICS, RANKED, Arm
from dsv3_jax.analysis.comparison.gather import Runs
from dsv3_jax.analysis.statistics import Difference
from dsv3_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What a report says.

  Attributes:
    title, question, text: of the experiment.
    arms: in the order of the plan, or as given.
    baseline: name of the arm that the others are compared with.
    metric: key of METRICS by which arms are ranked and tested.
    why: why this metric, where nobody chose it.
    differences: arm -> its metric less the baseline's; of the other arms.
    adjusted: arm -> p value adjusted for the number of arms; None where there is no test.
    ranks: arm -> place by the mean, from 1; of arms whose finished runs, one at least, all have
      the metric: a run that diverged has none, and would leave its arm a better mean.
    notes: what could not be read, or was left out.
  """

  title: str
  question: str
  text: str
  experiments: tuple[str, ...]
  arms: tuple[Arm, ...]
  baseline: str
  metric: str
  why: str
  differences: dict[str, Difference]
  adjusted: dict[str, float | None]
  ranks: dict[str, int]
  notes: tuple[str, ...]

  def arm(self, name: str) -> Arm:
    return next(a for a in self.arms if a.name == name)

  @property
  def shown(self) -> tuple[Arm, ...]:
    """Arms that have a run to show."""
    return tuple(a for a in self.arms if a.runs)


def make(runs: Runs, baseline: str | None = None, metric: str | None = None) -> Comparison:
  """Groups runs into arms and compares them.

  Args:
    runs: what `gather.collect` found.
    baseline: an arm's name; the first one where None.
    metric: one of RANKED; validation loss where None, or bits per byte where arms have different
      tokenizers, or the training loss where nothing was evaluated.

  Raises:
    ConfigError: no such arm or metric.
  """
  arms = arms_lib.group(runs)
  names = [arm.name for arm in arms]
  if baseline is not None and baseline not in names:
    near = difflib.get_close_matches(baseline, names, n=1)
    raise ConfigError(f"--baseline={baseline}: no such arm; " + (
        f"did you mean {near[0]!r}?" if near else f"arms: {', '.join(names)}"))
  if metric is not None and metric not in RANKED:
    raise ConfigError(f"--metric={metric}: choose from {', '.join(RANKED)}")
  baseline = baseline or names[0]
  why = ""
  if metric is None:
    metric, why = _metric(arms)
  base = next(a for a in arms if a.name == baseline)
  others = [a for a in arms if a.name != baseline and a.finished and base.finished]
  differences = {a.name: statistics.paired(a.values(metric), base.values(metric)) for a in others}
  adjusted = statistics.holm([d.p for d in differences.values()])
  means = {a.name: a.spread(metric)[1] for a in arms if a.finished and not a.without(metric)}
  ranked = sorted((mean, name) for name, mean in means.items() if mean is not None)
  plan = runs.plans[0] if runs.plans else None
  title = " and ".join(p.name for p in runs.plans) or (
      " and ".join(names) if len(names) < 3 else
      f"{len(names)} arms, {sum(len(a.runs) for a in arms)} runs")
  return Comparison(
      title, plan.question if plan else "", plan.text if plan else "",
      tuple(p.experiment for p in runs.plans), tuple(arms), baseline, metric, why, differences,
      dict(zip(differences, adjusted, strict=True)),
      {name: 1 + i for i, (_, name) in enumerate(ranked)}, runs.notes)


def _metric(arms: Sequence[Arm]) -> tuple[str, str]:
  """The metric to rank by, and why."""
  if not any(a.values("loss") for a in arms):
    return "smoothed", "no run was evaluated"
  if len(arms_lib.tokenizers(arms)) > 1 and any(a.values("bits_per_byte") for a in arms):
    return "bits_per_byte", "arms have different tokenizers, and losses are per token"
  return "loss", ""


def to_json(c: Comparison) -> dict[str, Any]:
  """The numbers: arms with each metric by seed, differences, and where each run is from."""
  arms = []
  for arm in c.arms:
    metrics = {}
    for metric in METRICS:
      count, mean, deviation = arm.spread(metric)
      metrics[metric] = {"n": count, "mean": mean, "sd": deviation, "by_seed": arm.values(metric)}
    difference = c.differences.get(arm.name)
    arms.append({
        "name": arm.name, "seeds": list(arm.runs), "finished": arm.finished,
        "unfinished": arm.unfinished, "rank": c.ranks.get(arm.name), "metrics": metrics,
        "difference": difference and dataclasses.asdict(difference) | {
            "p_adjusted": c.adjusted[arm.name]},
        "runs": [{"seed": seed, "where": f.where, **{k: f.record[k] for k in (
            "id", "folder", "commit", "ended", "device", "parameters", "activated_parameters",
            "flops_per_token", "steps", "tokens", "seconds")}} for seed, f in arm.runs.items()]})
  return {"title": c.title, "question": c.question, "metric": c.metric, "why": c.why,
          "baseline": c.baseline, "arms": arms, "notes": list(c.notes)}
