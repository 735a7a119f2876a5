"""The report's numbers beside ours: what agrees, how far the rest is off, and why.

Nothing here or in `Shares` was fitted to the step's time or to GPU-hours. Shares of streams, casts
and attention, and the overlap, do come from the trace of one overlapped pair, so that its row shows
how well they were taken, and predicts nothing. The bounds say how far off a row may be for the
reasons given; tests hold the model to them. Sources: the report (arXiv
2412.19437, table 1, section 4.2), the authors' ISCA paper (arXiv 2505.09343, tables 1, 2 and 4) for
the step, and their profile trace for one overlapped pair.
"""

import dataclasses

from dsv3_jax import config, counts
from dsv3_jax.cost import budget, cluster, step
from dsv3_jax.cost.hardware import HARDWARE, Hardware


@dataclasses.dataclass(frozen=True)
class Row:
  """Attributes:
    what, unit: of the number.
    report, ours: values.
    bound: relative error that the reasons account for.
    why: the reasons; or what ours rests on.
    given: ours is the report's own figure.
  """

  what: str
  unit: str
  report: float
  ours: float
  bound: float
  why: str
  given: bool = False

  @property
  def error(self) -> float:
    """Relative."""
    return self.ours / self.report - 1

  @property
  def within(self) -> bool:
    return abs(self.error) <= self.bound


def is_reported(model: config.Model) -> bool:
  """Whether this is the report's model."""
  return model == config.preset("v3_671b")


def rows(hw: Hardware | None = None) -> list[Row]:
  """The comparison for the report's plan of the report's model (`cluster.reported`) on H800s.

  Args:
    hw: another description of the H800.
  """
  hw = hw or HARDWARE["h800"]
  cfg = cluster.reported()
  found = step.estimate(cfg, hw)
  return [*_sizes(cfg, found), *_trace(found), *_step(found), *_hours(cfg, hw)]


def _sizes(cfg: config.Config, found: step.Estimate) -> list[Row]:
  parameters, active = counts.parameters(cfg.model), counts.activated_parameters(cfg.model)
  cache = cfg.model.layers * cfg.model.attention.cached * 2
  exact = "counted"
  return [
      Row("parameters", "B", 671.03, parameters["main"] / 1e9, 1e-4, exact),
      Row("activated parameters", "B", 37.55, active["main"] / 1e9, 2e-4, exact),
      Row("parameters of MTP", "B", 11.61, parameters["mtp"] / 1e9, 1e-4, exact),
      Row("latent cache a token", "bytes", 70_272, cache, 0.0, exact),
      Row("training FLOPs a token", "G", 250, found.flops_per_token() / 1e9, 5e-3,
          "causal, without MTP and recomputation, as the report counts")]


def _trace(found: step.Estimate) -> list[Row]:
  four = step.pair(found.stages[1], found.stages[1], found.hardware)
  gemms = 4e3 * sum(found.compute[k] for k in ("grouped GEMMs", "other GEMMs"))
  return [
      Row("trace: GEMMs of F and Dgrad, 4 layers", "ms", 22.9 + 18.8, gemms, 0.1,
          "from DeepGEMM's table; the trace casts q_a and kv_a apart and narrower"),
      Row("trace: pair of 4 MoE layers", "ms", 129.0, 1e3 * four, 0.1,
          "calibration: streams, casts, attention and overlap are this trace's own; its Wgrad "
          "kernels add up to 32.8 ms on two streams, ours to 22.7 on one")]


def _step(found: step.Estimate) -> list[Row]:
  parts = found.breakdown
  day = 86400 / found.step * found.tokens / 1e9
  return [
      Row("step", "s", 19.926, found.step, 0.1, "the sum of what follows"),
      Row("1F, not overlapped", "s", 1.13, parts["1F"], 0.1,
          "all-to-alls at DeepEP's 46 GB/s and in the open"),
      Row("1B", "s", 1.99, parts["1B"], 0.15, "the same; Wgrad as in 1W"),
      Row("1W", "s", 0.48, parts["1W"], 0.5,
          "Wgrad at DeepGEMM's rate; the trace's kernels, one after another, would take 0.38 s"),
      Row("1F1B, overlapped", "s", 13.95, parts["1F1B"], 0.12,
          "as the trace's pair; routing taken as balanced; waiting for other ranks inside a pair "
          "is bubble here"),
      Row("bubble", "s", 2.06, parts["bubble"], 0.4,
          "the rank with MTP and both heads sets the pace and the others wait; the stages' layers "
          "are not published, and others give 2.4 to 4.5 s"),
      Row("1F1B and bubble", "s", 16.01, parts["1F1B"] + parts["bubble"], 0.1,
          "where waiting is counted no longer matters"),
      Row("optimizer", "s", 0.29, parts["optimizer"], 0.3,
          "bytes over links and memory; launches, the copy for the EMA and the clip's sum are not "
          "in it"),
      Row("tokens a day", "B", 272.80, day, 0.12, "the step's"),
      Row("causal FLOP/s a GPU", "T", 385, found.achieved() / 1e12, 0.12, "the step's"),
      Row("non-causal FLOP/s a GPU", "T", 432, found.achieved(False) / 1e12, 0.12, "the step's"),
      Row("MFU, causal", "%", 38.94, 100 * found.mfu(), 0.12, "the step's"),
      Row("MFU, non-causal", "%", 43.73, 100 * found.mfu(False), 0.12, "the step's")]


def _hours(cfg: config.Config, hw: Hardware) -> list[Row]:
  first = budget.pretraining(cfg, hw)
  longer = budget.extension(cfg, hw)
  after = budget.post_training(cfg, hw)
  context = sum(p.gpu_hours for p in longer)
  total = first.gpu_hours + context + after.gpu_hours
  return [
      Row("pre-training", "K GPU-hours", 2664, first.gpu_hours / 1e3, 0.1,
          "the step's; the ramp's shape is assumed, restarts and evaluations are not in it"),
      Row("context extension", "K GPU-hours", 119, context / 1e3, 0.35,
          "attention's FLOPs alone grow; exchange of keys, unequal shares of the triangle and the "
          "method are not published"),
      Row("post-training", "K GPU-hours", 5, after.gpu_hours / 1e3, 0.0, after.note, given=True),
      Row("whole training", "K GPU-hours", 2788, total / 1e3, 0.1, "the sum"),
      Row("whole training at $2 an hour", "M dollars", 5.576, total * 2 / 1e6, 0.1, "the sum")]
