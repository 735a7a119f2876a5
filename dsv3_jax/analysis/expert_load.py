"""Expert specialisation: which experts serve which text (report 4.5.3, figure 9).

The relative load of an expert on a domain is the number of tokens that were routed to it over the
number that it would get if all experts of its layer got equally many: 1 is balanced, 0 unused,
E / A (experts over active ones) the most there can be. Over all text a model may be balanced well
while each domain has experts of its own; how far that goes is the

    specialisation of a layer = 1/X sum over domains x of 1/2 sum over experts e |p_x(e) - q(e)|

where p_x(e) is the share of domain x's token-expert pairs that went to e, q(e) the mean of p_x(e)
over the X domains. It is the mean total variation distance from the average domain: the share of a
domain's routing that would have to change for its experts to be everyone's. It is 0 where all
domains use the experts alike, 1 - 1/X where no two share one; an expert that is busy on every
domain adds nothing.

Loads are counted on little text, so they differ between domains by chance too. Two numbers say how
much: each load's standard error, from the differences between batches of its domain (jackknife),
and the specialisation that is left where the batches are dealt to the domains at random.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError

FORMAT = 1
DEALS = 100  # random ones, for the specialisation by chance
UNCERTAIN = 0.1  # mean standard error of loads above which a reader is warned


def relative_load(counts_LE: np.ndarray) -> np.ndarray:
  """Load over balanced load, float64 [..., E]; 0 where nothing was counted."""
  total = counts_LE.sum(-1, keepdims=True, dtype=np.float64)
  return counts_LE * counts_LE.shape[-1] / np.maximum(total, 1e-9)


def standard_error(counts_BLE: np.ndarray) -> np.ndarray:
  """Standard error of `relative_load` of the sum over batches, float64 [L, E].

  The jackknife: the load without batch b, for each of the n batches, deviates from their mean d_b;
  the error is sqrt((n - 1) / n sum d_b^2). NaN for a single batch.

  Args:
    counts_BLE: of each batch; B counts batches here.
  """
  n = len(counts_BLE)
  if n < 2:
    return np.full(counts_BLE.shape[1:], np.nan)
  without_BLE = relative_load(counts_BLE.sum(0, dtype=np.float64) - counts_BLE)
  return np.sqrt((n - 1) * without_BLE.var(0))


def specialisation(loads: Sequence[np.ndarray]) -> np.ndarray:
  """Specialisation of each layer, float64 [L] (see the module's docstring).

  Args:
    loads: relative load [L, E] of each domain. With a single domain it is 0.
  """
  share_XLE = np.stack(loads) / loads[0].shape[-1]
  return 0.5 * np.abs(share_XLE - share_XLE.mean(0)).sum(-1).mean(0)


def by_chance(counts: Sequence[np.ndarray], deals: int = DEALS, seed: int = 0) -> np.ndarray:
  """Specialisation of each layer where domains differ by chance alone, float64 [L].

  The mean over random deals of all batches to domains, each of which gets as many as it had.

  Args:
    counts: [batches, L, E] of each domain.
    deals: how many.
    seed: of the random numbers.
  """
  rng = np.random.default_rng(seed)
  pooled_BLE = np.concatenate(counts).astype(np.float64)
  owner_B = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
  total = 0.0
  for _ in range(deals):
    dealt_B = rng.permutation(owner_B)
    sums_XLE = np.tensordot(dealt_B == np.arange(len(counts))[:, None], pooled_BLE, axes=1)
    total = total + specialisation(list(relative_load(sums_XLE)))
  return total / deals


def numbers(measured: dict[str, Any]) -> dict[str, Any]:
  """The JSON values of one run.

  Args:
    measured: see `train.domains.measure`.

  Returns:
    What it holds but the counts, with `name`, `commit`, and of the loads:
      load, standard_error: {domain: [layer][expert]}; None for an unknown error.
      specialisation: mean over the layers; layers, one number each; by_chance, the mean over the
        layers. None with a single domain.
    and for each domain also max_vio (largest relative load of any layer, less 1), largest (that
    load's layer and expert), balanced (tokens each expert would get) and error (the standard
    errors' quadratic mean).
  """
  counts = measured["counts"]
  load = {name: relative_load(c.sum(0, dtype=np.float64)) for name, c in counts.items()}
  error = {name: standard_error(c) for name, c in counts.items()}
  made = {key: value for key, value in measured.items() if key != "counts"}
  made["domains"] = {
      name: facts | _of_domain(load[name], error[name]) | {
          "balanced": float(counts[name].sum((0, 2)).max() / made["experts"])}
      for name, facts in measured["domains"].items()}
  per_L = specialisation(list(load.values()))
  several = len(load) > 1
  made["specialisation"] = {
      "mean": _rounded(per_L.mean()) if several else None,
      "layers": _rounded(per_L) if several else None,
      "by_chance": _rounded(by_chance(list(counts.values())).mean()) if several else None}
  made["load"] = {name: _rounded(x) for name, x in load.items()}
  made["standard_error"] = {name: _rounded(x) for name, x in error.items()}
  return _named(made)


def _of_domain(load_LE: np.ndarray, error_LE: np.ndarray) -> dict[str, Any]:
  layer, expert = np.unravel_index(np.argmax(load_LE), load_LE.shape)
  return {"max_vio": _rounded(load_LE.max() - 1), "largest": [int(layer), int(expert)],
          "error": _rounded(np.sqrt(np.mean(error_LE**2)))}


def _rounded(values: Any) -> Any:
  """Numbers as JSON: four decimals, null for what is not finite."""
  if isinstance(values, np.ndarray) and values.ndim:
    return [_rounded(value) for value in values]
  return round(float(values), 4) if math.isfinite(values) else None


def _named(run: dict[str, Any]) -> dict[str, Any]:
  """With the run's name and the commit it was trained by, as far as its files say so."""
  folder = Path(run["workdir"])
  arm = _read(folder / "arm.json")
  name, seed = arm.get("name"), arm.get("seed")
  title = folder.resolve().name if not name else name if seed is None else f"{name}, seed {seed}"
  commit = _read(folder / "summary.json").get("commit") or arm.get("commit")
  return {"name": title, "arm": name, "commit": commit} | run


def _read(path: Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


# --- several runs -------------------------------------------------------------------------------


def join(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Runs to be shown side by side, as the values of domains.json.

  Raises:
    ConfigError: they were measured on different domains.
  """
  first = runs[0]
  for run in runs[1:]:
    if list(run["load"]) != list(first["load"]):
      raise ConfigError(f"{run['workdir']} was measured on {', '.join(run['load'])}, "
                        f"{first['workdir']} on {', '.join(first['load'])}; measure both on the "
                        "same domains")
  names = [run["name"] for run in runs]
  runs = [run | {"name": run["workdir"]} if names.count(run["name"]) > 1 else run for run in runs]
  return {"format": FORMAT, "domains": list(first["load"]), "runs": runs}


def read(path: str | Path) -> list[dict[str, Any]]:
  """The runs of a domains.json.

  Raises:
    ConfigError: the file is none.
  """
  values = _read(Path(path))
  if values.get("format") != FORMAT or not values.get("runs"):
    raise ConfigError(f"{path} is no domains.json of this version, as `dsv3 eval --domains` writes "
                      "it")
  return values["runs"]


def specialised(run: dict[str, Any], domain: str, count: int = 3
                ) -> list[tuple[str, int, float, float, float]]:
  """The experts whose load on a domain is most above their load on the others.

  Returns:
    (layer's name, expert, load here, its standard error or NaN, mean load on the other domains).
  """
  load_LE = np.array(run["load"][domain])
  others = [np.array(x) for name, x in run["load"].items() if name != domain]
  other_LE = np.mean(others, 0) if others else np.ones_like(load_LE)
  error_LE = np.array(run["standard_error"][domain], np.float64)
  best = np.argsort(-(load_LE - other_LE), axis=None, kind="stable")[:count]
  return [(run["layers"][i], int(j), float(load_LE[i, j]), float(error_LE[i, j]),
           float(other_LE[i, j])) for i, j in zip(*np.unravel_index(best, load_LE.shape),
                                                  strict=True)]


# --- tables -------------------------------------------------------------------------------------

HEAD = ("domain", "tokens", "held out", "loss", "bits/byte", "MaxVio", "± load",
        "experts most its own: load here / elsewhere")
COMPARISON = ("run", "specialisation", "by chance", "largest load", "mean MaxVio", "mean loss")
NOTES = (
    "Load: tokens routed to an expert over those it would get if balanced; 1 is balanced.",
    "± load: standard error of a load, quadratic mean over experts and layers.",
    "MaxVio: largest load of any layer, less 1.",
    "Specialisation: mean share of a domain's routing that differs from the average domain's "
    "(total variation), over the layers; by chance: the same where batches are dealt to domains at "
    "random.",
    "held out: share of the text that no compared run was trained on.")


def rows(run: dict[str, Any]) -> list[tuple[str, ...]]:
  """The cells under `HEAD`: a row for each domain of one run."""
  found = []
  for name, facts in run["domains"].items():
    own = "; ".join(f"{layer} expert {expert}: {here:.2f} / {elsewhere:.2f}"
                    for layer, expert, here, _, elsewhere in specialised(run, name))
    error = "?" if facts["error"] is None else f"{facts['error']:.3f}"
    found.append((name, f"{facts['tokens']:,}", f"{facts['held_out']:.0%}", f"{facts['loss']:.3f}",
                  f"{facts['bits_per_byte']:.3f}", f"{facts['max_vio']:.2f}", error, own))
  return found


def comparison(values: dict[str, Any]) -> list[tuple[str, ...]]:
  """The cells under `COMPARISON`: a row for each run, and mean ± s.d. of a sweep's seeds."""
  def facts(run: dict[str, Any]) -> list[float]:
    domains = run["domains"].values()
    return [math.nan if run["specialisation"][key] is None else run["specialisation"][key]
            for key in ("mean", "by_chance")] + [
                1 + max(f["max_vio"] for f in domains),
                *(float(np.mean([f[key] for f in domains])) for key in ("max_vio", "loss"))]

  text = lambda value: f"{value:.3f}" if math.isfinite(value) else "-"
  found = [(run["name"], *map(text, facts(run))) for run in values["runs"]]
  arms = [run.get("arm") for run in values["runs"]]
  for arm in dict.fromkeys(arms):
    if arm and arms.count(arm) > 1:
      over = np.array([facts(run) for run in values["runs"] if run.get("arm") == arm])
      found.append((f"{arm}: {len(over)} seeds", *(
          f"{text(mean)} ± {text(sd)}" for mean, sd in zip(
              over.mean(0), over.std(0, ddof=1), strict=True))))
  return found


def provenance(values: dict[str, Any]) -> str:
  """Where the text of the domains is from, as a sentence."""
  names: dict[str, list[str]] = {}
  for name, facts in values["runs"][0]["domains"].items():
    names.setdefault(facts["source"], []).append(name)
  return "Text: " + "; ".join(f"{', '.join(n)} from {source}" for source, n in names.items()) + "."


def warnings(values: dict[str, Any]) -> list[str]:
  """What a reader should know before believing the numbers."""
  found, seen = [], {}
  for run in values["runs"]:
    loose = [f"{name} ({'unknown' if facts['error'] is None else format(facts['error'], '.2f')})"
             for name, facts in run["domains"].items()
             if facts["error"] is None or facts["error"] > UNCERTAIN]
    if loose:
      found.append(f"{run['name']}: little text, so that loads are uncertain (standard error): "
                   f"{', '.join(loose)}.")
    for name, facts in run["domains"].items():
      seen[name] = min(facts["held_out"], seen.get(name, 1.0))
  trained = [f"{name} ({share:.0%} held out)" for name, share in seen.items() if share < 1]
  if trained:
    found.append(f"Text of {', '.join(trained)} was trained on in part or in whole: its loss is "
                 "lower than that of new text.")
  return found
