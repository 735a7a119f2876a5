"""What a reader needs to believe or doubt a comparison, in sentences.

A difference between arms is a finding only where nothing else differs than what was meant to: this
looks at everything that is kept of the runs and says what it finds, good and bad.
"""

import dataclasses
import statistics as stdlib
from collections.abc import Callable
from typing import Any

from scipy import special

from dsv3_jax.analysis import page
from dsv3_jax.analysis.comparison import arms as arms_lib
from dsv3_jax.analysis.comparison.arms import METRICS, Arm
from dsv3_jax.analysis.comparison.compare import Comparison
from dsv3_jax.analysis.statistics import LEVEL

GOOD, NOTE, WARN = "good", "note", "warn"
# Keys that change what a training loss is the loss of; validation text has neither FIM nor cuts.
_TRAINING_TEXT = ("data.fim_rate", "data.split_rate", "data.sources", "data.weights",
                  "data.isolate", "data.sequence_length")
_VALIDATION_TEXT = ("data.sources", "data.validation_fraction", "data.sequence_length",
                    "data.isolate")
_SIZES = (("parameters", "parameters"), ("activated_parameters", "activated parameters"),
          ("flops_per_token", "FLOPs a token"), ("tokens", "tokens"), ("steps", "steps"))
_EQUAL = 0.01  # relative difference of sizes that counts as none


@dataclasses.dataclass(frozen=True)
class Doubt:
  """`level` is GOOD (checked, nothing found), NOTE or WARN."""

  level: str
  about: str
  text: str


def find(c: Comparison) -> list[Doubt]:
  """All of them, what weighs most first."""
  looked = [f(c) for f in (_seeds, _unfinished, _valueless, _skipped, _text, _training_text, _sizes,
                           _commits, _machines, _tests, _order, _speed)]
  found = [doubt for doubt in looked if doubt is not None]
  found += [Doubt(WARN, "files", note) for note in c.notes]
  return sorted(found, key=lambda d: (WARN, NOTE, GOOD).index(d.level))


def config_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
  """(head, rows): the config's keys that differ between arms, one column a key."""
  flats = {arm.name: arms_lib.flat(arm.first["config"]) for arm in c.shown}
  keys = _keys(c)
  rows = [[name, *(arms_lib.text(f.get(key)) for key in keys)] for name, f in flats.items()]
  return ["arm", *keys], rows if keys else []


def trace_table(c: Comparison) -> tuple[list[str], list[list[str]]]:
  """(head, rows): where each number is from, one row a run."""
  rows = [[arm.name, str(seed), f.id, f.where, f.record["commit"] or "-", f.record["ended"] or "-"]
          for arm in c.arms for seed, f in arm.runs.items()]
  return ["arm", "seed", "id", "from", "commit", "ended (UTC)"], rows


# --- what is looked at --------------------------------------------------------------------------


def _seeds(c: Comparison) -> Doubt | None:
  sets = {arm.name: set(arm.runs) if arm.finished else set() for arm in c.arms}
  every = set().union(*sets.values())
  wanted = {arm.name: (every | set(arm.unfinished)) for arm in c.arms}
  missing = [f"{name} lacks {_listed(sorted(wanted[name] - have))}" for name, have in sets.items()
             if wanted[name] - have]
  if missing:
    return Doubt(WARN, "seeds", f"Not every arm has every seed: {'; '.join(missing)}. Differences "
                 "are of the seeds that both arms have.")
  if len(every) == 1:
    return Doubt(WARN, "seeds", f"There is one seed ({every.pop()}): nothing says how much of a "
                 "difference is chance.")
  return Doubt(GOOD, "seeds", f"Every arm has seeds {_listed(sorted(every))}.") if every else None


def _unfinished(c: Comparison) -> Doubt | None:
  lines = [f"{arm.name}, seed {seed}: {state}" for arm in c.arms
           for seed, state in arm.unfinished.items()]
  if lines:
    return Doubt(WARN, "unfinished runs", "These do not count in means and tests: "
                 f"{'; '.join(lines)}.")
  return Doubt(GOOD, "unfinished runs", "None: every run reached its last token.")


def _valueless(c: Comparison) -> Doubt | None:
  found = [f"{arm.name}, seed {_listed(arm.without(c.metric))}" for arm in c.arms
           if arm.without(c.metric)]
  if not found:
    return None
  return Doubt(WARN, "runs without a value", f"These finished without a {METRICS[c.metric].short}: "
               f"{'; '.join(found)}. They diverged or were not evaluated. The arm's other runs are "
               "a choice of the better ones, so it is not ranked, and its mean and difference say "
               "less than they seem to.")


def _skipped(c: Comparison) -> Doubt | None:
  found = {arm.name: [f.record["final"].get("skipped_steps") or 0 for f in arm.runs.values()]
           for arm in c.shown}
  lines = [f"{name} {_listed(counts)}" for name, counts in found.items() if any(counts)]
  if lines:
    return Doubt(NOTE, "skipped steps", "Steps whose gradient was not finite changed nothing; how "
                 f"many, seed by seed: {'; '.join(lines)}.")
  return Doubt(GOOD, "skipped steps", "None.") if found else None


def _text(c: Comparison) -> Doubt | None:
  """Whether losses mean the same: tokenizers, texts, held-out batches."""
  if len(c.shown) < 2:
    return None
  if len(arms_lib.tokenizers(c.shown)) > 1:
    return Doubt(WARN, "text", "Arms have different tokenizers (or vocabularies): losses in nats "
                 "per token cannot be compared, bits per byte can, as far as the validation "
                 "batches, so many tokens each, hold like text." + (
                     "" if c.metric == "bits_per_byte" else " This page was asked to rank by "
                     f"{METRICS[c.metric].short} all the same."))
  keys = [k for k in _keys(c) if k in _VALIDATION_TEXT]
  texts = {f.record["corpus"].get("text") for _, f in _runs(c)}
  amounts = {arm.name: _scored(arm.first["config"]) for arm in c.shown}
  if keys or len(texts) > 1 or len(set(amounts.values())) > 1:
    why = [f"{', '.join(keys)} differ{'s' * (len(keys) == 1)}"] if keys else []
    if len(set(amounts.values())) > 1:
      why.append("sequences scored at an evaluation, eval_batches times the microbatch: " +
                 ", ".join(f"{name} {n or 'all'}" for name, n in amounts.items()))
    why = f" ({'; '.join(why or ['the tokenized texts have other hashes'])})"
    return Doubt(WARN, "text", f"Arms were not evaluated on the same text in the same way{why}, so "
                 "validation losses are of different things.")
  if texts == {""}:
    return Doubt(NOTE, "text", "Configs name the same data; the tokenized text is not there to be "
                 "compared.")
  return Doubt(GOOD, "text", "All runs read the same tokenized text (hash "
               f"{texts.pop()}) and were evaluated on the same batches.")


def _scored(config: dict[str, Any]) -> int:
  """Sequences that an evaluation of a run scores, from the beginning of the held-out text; 0: all.
  """
  data, batches = config.get("data", {}), config.get("train", {}).get("eval_batches") or 0
  return batches * (data.get("microbatch") or data.get("batch_size") or 0)


def _training_text(c: Comparison) -> Doubt | None:
  keys = [k for k in _keys(c) if k in _TRAINING_TEXT]
  if not keys:
    return None
  return Doubt(WARN if c.metric == "smoothed" else NOTE, "training loss",
               f"{', '.join(keys)} differ{'s' * (len(keys) == 1)} between arms, so training losses "
               "are of different text; compare validation.")


def _sizes(c: Comparison) -> Doubt | None:
  base = c.arm(c.baseline).first
  if base is None or len(c.shown) < 2:
    return None
  lines = []
  for key, name in _SIZES:
    ratios = []
    for arm in c.shown:
      sizes = {f.record[key] for f in arm.runs.values()} - {0, None}
      off = {s / base[key] - 1 for s in sizes if base[key] and abs(s / base[key] - 1) > _EQUAL}
      if off:
        ratios.append(f"{arm.name} {' and '.join(f'{100 * r:+.1f} %' for r in sorted(off))}")
    lines += [f"{name}: {', '.join(ratios)}"] if ratios else []
  if lines:
    return Doubt(NOTE, "sizes", f"Against {c.baseline}, beyond 1 %: {'; '.join(lines)}. A better "
                 "loss may be bought by more of these.")
  return Doubt(GOOD, "sizes", "Parameters, activated parameters, FLOPs a token, tokens and steps "
               "are equal within 1 %.")


def _commits(c: Comparison) -> Doubt | None:
  found = _several(c, lambda r: r["commit"])
  if not found:
    return None
  text = []
  if len(found) > 1:
    text.append(f"Runs are of {len(found)} commits: {_where(found)}; a difference may come from "
                "the code.")
  dirty = [commit for commit in found if commit.endswith("+")]
  if dirty:
    text.append(f"At {_listed(dirty)} the code had changes that were not committed.")
  if "" in found:
    text.append("Of some runs the commit is not known.")
  if text:
    return Doubt(WARN if len(found) > 1 else NOTE, "commits", " ".join(text))
  return Doubt(GOOD, "commits", f"All runs are of commit {next(iter(found))}.")


def _machines(c: Comparison) -> Doubt | None:
  devices = _several(c, lambda r: r["device"])
  versions = _several(c, lambda r: ", ".join(f"{k} {v}" for k, v in r["versions"].items()))
  text = []
  for found, what in ((devices, "devices"), (versions, "versions")):
    if len(found) > 1:
      text.append(f"Runs are of {len(found)} {what}: {_where(found)}.")
  if text:
    return Doubt(WARN, "machines", " ".join(text) + " Rounding, and so the course of a run, may "
                 "differ between them; speeds do.")
  said = [v for found in (devices, versions) for v in found if v]
  return Doubt(GOOD, "machines", f"All runs: {'; '.join(said)}.") if said else None


def _tests(c: Comparison) -> Doubt | None:
  tested = {name: d for name, d in c.differences.items() if d.low is not None}
  if not c.differences:
    return None
  if not any(d.seeds for d in c.differences.values()):
    return Doubt(WARN, "tests", "No arm has a seed with a value that the baseline has one of, too: "
                 "no test.")
  if not tested:
    return Doubt(WARN, "tests", "1 seed: no test. A second seed gives an interval, a third a "
                 "useful one.")
  counts = [len(d.seeds) for d in tested.values()]
  n = int(stdlib.median(counts))
  half = stdlib.median(d.high - d.mean for d in tested.values())
  factor = special.stdtrit(n - 1, (1 + LEVEL) / 2)
  text = (f"Student's paired t test over {n} seeds: a 95 % interval is {factor:.2f} standard "
          f"errors to either side, here ± {half:.2g} in the median. Smaller differences than that "
          "could not be seen, so no significance is not equality.")
  if len(tested) > 1:
    text += (f" {len(tested)} arms are tested: by chance alone {0.05 * len(tested):.2g} would have "
             "p < 0.05; the adjusted p (Holm) accounts for that.")
  return Doubt(NOTE, "tests", text)


def _order(c: Comparison) -> Doubt | None:
  seeds = {f.record["config"].get("data", {}).get("seed") for _, f in _runs(c)}
  if not any(len(arm.runs) > 1 for arm in c.arms):
    return None
  if len(seeds) > 1:
    return Doubt(NOTE, "what seeds vary", "Initial weights (train.seed), and the order of the data "
                 "where data.seed differs.")
  return Doubt(NOTE, "what seeds vary", "Initial weights alone (train.seed); all runs see the data "
               f"in one order (data.seed={seeds.pop()}), so the spread does not hold what another "
               "order would do.")


def _speed(c: Comparison) -> Doubt | None:
  if not any(f.record["tokens_per_s"] for _, f in _runs(c)):
    return None
  return Doubt(NOTE, "speed", "Tokens per second and wall time depend on what else ran on the "
               "machine; they are no benchmark.")


# --- helpers ------------------------------------------------------------------------------------


def _runs(c: Comparison) -> list[tuple[Arm, Any]]:
  return [(arm, f) for arm in c.arms for f in arm.runs.values()]


def _keys(c: Comparison) -> list[str]:
  return arms_lib.differing([arm.first["config"] for arm in c.shown])


def _several(c: Comparison, of: Callable[[dict[str, Any]], str]) -> dict[str, list[str]]:
  """Value -> the finished runs that have it, in words; a run says the rest when it ends."""
  found: dict[str, dict[str, list[int]]] = {}
  for arm, f in _runs(c):
    if not f.record["finished"]:
      continue
    found.setdefault(of(f.record), {}).setdefault(arm.name, []).append(f.seed)
  return {value: [f"{name} (seed {_listed(seeds)})" for name, seeds in by_arm.items()]
          for value, by_arm in found.items()}


def _where(found: dict[str, list[str]]) -> str:
  """The value that most have, and who has another."""
  most = max(found, key=lambda value: len(found[value]))
  rest = [f"{value or 'unknown'}: {page.some(runs)}" for value, runs in found.items()
          if value != most]
  return f"mostly {most or 'unknown'}, and {'; '.join(rest)}"


def _listed(values: list[Any]) -> str:
  return ", ".join(map(str, values))
