"""Tables and sentences of a comparison, as plain text in cells."""

from dsv3_jax.analysis import page
from dsv3_jax.analysis.comparison.arms import METRICS, Arm
from dsv3_jax.analysis.comparison.compare import Comparison

Table = tuple[list[str], list[list[str]]]  # head, rows
SIGNIFICANT = 0.05


def compact(c: Comparison) -> Table:
  """The table of arms that stands in experiments/RESULTS.md."""
  keys = _measured(c, ("loss", "bits_per_byte", "smoothed", "max_vio", "tokens_per_s"))
  keys.sort(key=lambda k: k != c.metric)  # stable: what is tested comes first
  head = ["arm", "seeds", METRICS[keys[0]].short if keys else "", f"less {c.baseline}'s",
          "p, adjusted", *(METRICS[k].short for k in keys[1:])]
  rows = []
  for arm in c.arms:
    rows.append([_title(c, arm), _count(c, arm), *(spread(arm, k) for k in keys[:1]),
                 _difference(c, arm), _p(c, arm), *(spread(arm, k) for k in keys[1:])])
  return head, rows


def arms(c: Comparison) -> Table:
  """Every metric of every arm."""
  keys = _measured(c, METRICS)
  rows = [[_title(c, arm), _count(c, arm), str(c.ranks.get(arm.name, "-")),
           *(spread(arm, k) for k in keys)] for arm in c.arms]
  return ["arm", "seeds", "rank", *(METRICS[k].short for k in keys)], rows


def differences(c: Comparison) -> Table:
  """The tested metric less the baseline's."""
  form = METRICS[c.metric].form
  base = c.arm(c.baseline).spread(c.metric)[1]
  rows = []
  for name, d in c.differences.items():
    if d.mean is None:
      rows.append([name, "0", "-", "-", _untested(c, name), "", "", ""])
      continue
    relative = f"{100 * d.mean / base:+.2f} %" if base else "-"
    tested = [_untested(c, name), "", ""] if d.low is None else [
        f"{d.low:+{form}} to {d.high:+{form}}", _number(d.p), _number(c.adjusted[name])]
    rows.append([name, str(len(d.seeds)), f"{d.mean:+{form}}", relative, *tested,
                 ", ".join(f"{v:+{form}}" for v in d.values)])
  return ["arm", "seeds", "difference", "relative", "95 % interval", "p", "p, adjusted",
          "by seed"], rows


def sizes(c: Comparison) -> Table:
  """What each arm is and took."""
  rows = []
  for arm in c.shown:
    r = arm.first
    seconds = [f.record["seconds"] for f in arm.runs.values() if f.record["seconds"]]
    flops = r["flops_per_token"]
    rows.append([arm.name, _whole(r["parameters"]), _whole(r["activated_parameters"]),
                 f"{flops / 1e6:,.1f} M" if flops else "-", page.tokens(r["tokens"] or 0),
                 f"{r['steps']:,}", f"{flops * r['tokens']:.3g}" if flops else "-",
                 page.duration(sum(seconds) / len(seconds)) if seconds else "-"])
  return ["arm", "parameters", "activated", "FLOPs a token", "tokens", "steps", "FLOPs",
          "wall time"], rows


def verdict(c: Comparison) -> str:
  """What the numbers say of several arms, in sentences."""
  if len(c.arms) < 2:
    return ""
  what = METRICS[c.metric].short
  said = [f"Ranked by {what}" + (f" ({c.why})" if c.why else "") + "."]
  if c.ranks:
    best = min(c.ranks, key=c.ranks.get)
    _, mean, _ = c.arm(best).spread(c.metric)
    said.append(f"Lowest: {best}, {mean:{METRICS[c.metric].form}}.")
  lost = [f"{arm.name} (seed {', '.join(map(str, arm.without(c.metric)))})" for arm in c.arms
          if arm.without(c.metric)]
  if lost:
    said.append(f"Not ranked, for runs that ended without a {what}: {'; '.join(lost)}.")
  tested = {n: d for n, d in c.differences.items()
            if d.low is not None and not c.arm(n).without(c.metric)}
  if tested:
    clear = {n: d for n, d in tested.items()
             if c.adjusted[n] is not None and c.adjusted[n] < SIGNIFICANT}
    for sign, word in ((-1, "Better"), (1, "Worse")):
      names = [n for n, d in clear.items() if d.mean * sign > 0]
      if names:
        said.append(f"{word} than {c.baseline} beyond chance (adjusted p < {SIGNIFICANT}): "
                    f"{'; '.join(names)}.")
    within = [n for n in tested if n not in clear and c.adjusted[n] is not None]
    same = [n for n in tested if c.adjusted[n] is None]
    if within:
      said.append(f"Not told apart from {c.baseline}: {'; '.join(within)}.")
    if same:
      said.append(f"With one difference on every seed, so that there is nothing to test: "
                  f"{'; '.join(same)}.")
  elif any(len(d.seeds) == 1 for d in c.differences.values()):
    said.append("1 seed: no test.")
  return " ".join(said)


def spread(arm: Arm, metric: str) -> str:
  """Mean ± standard deviation over the seeds."""
  count, mean, deviation = arm.spread(metric)
  form = METRICS[metric].form
  if mean is None:
    return "-"
  return f"{mean:{form}}" + (f" ± {deviation:{form}}" if count > 1 else "")


def _measured(c: Comparison, keys) -> list[str]:
  return [k for k in keys if any(arm.values(k) for arm in c.arms)]


def _title(c: Comparison, arm: Arm) -> str:
  marks = ["baseline"] * (arm.name == c.baseline and len(c.arms) > 1)
  marks += ["not finished"] * bool(arm.runs and not arm.finished)
  return arm.name + (f" ({', '.join(marks)})" if marks else "")


def _count(c: Comparison, arm: Arm) -> str:
  """Runs that count, and of how many where some have not finished or lack the tested metric."""
  count = len(arm.runs.keys() - set(arm.without(c.metric)))
  whole = len(arm.runs.keys() | arm.unfinished.keys())
  return f"{count}" + (f" of {whole}" if count < whole else "")


def _difference(c: Comparison, arm: Arm) -> str:
  d = c.differences.get(arm.name)
  if d is None:
    return "-"
  if d.mean is None:
    return _untested(c, arm.name)
  form = METRICS[c.metric].form
  interval = "" if d.low is None else f" [{d.low:+{form}}, {d.high:+{form}}]"
  return f"{d.mean:+{form}}{interval}"


def _p(c: Comparison, arm: Arm) -> str:
  """The adjusted p: it is the one that a table of several arms may be read by."""
  d = c.differences.get(arm.name)
  if d is None:
    return "-"
  return _untested(c, arm.name) if d.low is None else _number(c.adjusted[arm.name])


def _untested(c: Comparison, name: str) -> str:
  """Why there is no interval."""
  if c.differences[name].seeds:
    return "1 seed: no test"
  return "no common seed" if c.arm(name).values(c.metric) else "no value"


def _number(p: float | None) -> str:
  return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _whole(value: int | None) -> str:
  return f"{value:,}" if value else "-"
