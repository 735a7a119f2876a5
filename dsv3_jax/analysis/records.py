"""The record of a finished run: one small JSON that tables and figures can be made from again.

A workdir holds checkpoints, tokens and every step's numbers; its record holds, in about 10 KB, what
a comparison shows of it, so that the arms of an ablation can stand in the repository:

  id, config, seed, commit, device, versions, ended     what ran, where and when
  steps, tokens, seconds, tokens_per_s                  how long
  parameters, activated_parameters, flops_per_token     how large
  final, evaluations, curve, load_LE                    what came out (see `record`)

A record is known by the fingerprint of its config (`config.fingerprint`), the seed included.
"""

import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax import config as config_lib
from dsv3_jax import counts, files
from dsv3_jax.analysis import plots, statistics
from dsv3_jax.analysis import workdir as workdir_lib
from dsv3_jax.analysis.workdir import Run

FORMAT = 1
POINTS = 100  # of a curve, at most
_EVALUATIONS = 24  # at most
FIELDS = ("format", "id", "folder", "arm", "finished", "ended", "seed", "config", "commit",
          "device", "versions", "corpus", "parameters", "activated_parameters", "flops_per_token",
          "steps", "tokens", "seconds", "tokens_per_s", "final", "evaluations", "curve", "load_LE",
          "rows", "notes")


def record(workdir: str | Path) -> dict[str, Any]:
  """What a comparison needs of a run, finished or not, as JSON values.

  Beside what the module's docstring names:
    finished: whether all its tokens were trained and summary.json written.
    arm: of a sweep's run, {"name", "state", "error"}; else empty.
    corpus: {"tokenizer", "text"}: hashes; that of the tokenized text differs with the tokenizer.
    final: loss, bits_per_byte, max_vio, accuracy, mtp_loss of the last validation; train_loss of
      the last step; train_smoothed and train_max_vio, exponential moving averages over the steps
      (`statistics.ema`); these three None where the last loss is not finite; skipped_steps.
    evaluations: step, tokens, loss, bits_per_byte, max_vio of each.
    curve: step, tokens, seconds, loss, max_vio as lists; the last two smoothed like the above.
    load_LE: relative load of each expert at the last validation, and `rows` the names of L.
    notes: what could not be read.

  Raises:
    ConfigError: the folder does not exist, or no run was ever started in it.
  """
  run = workdir_lib.read(workdir)
  notes = list(run.notes)
  arm = _arm(run, notes)
  config, made = _config(run.config, notes)
  last = run.train[-1] if run.train else {}
  summary = run.summary if run.finished else {}  # an older one may lie there
  sizes = _sizes(made, summary)
  load = [row["load_LE"] for row in run.loads if row.get("load_LE")]
  return plain({
      "format": FORMAT, "id": _identity(config, made), "folder": run.workdir.resolve().name,
      "arm": arm, "finished": bool(summary), "ended": _ended(run),
      "seed": config.get("train", {}).get("seed"), "config": config,
      "commit": summary.get("commit") or arm.get("commit") or "",
      "device": summary.get("device") or "", "versions": summary.get("versions") or {},
      "corpus": _corpus(run), **sizes,
      "steps": last.get("step", 0), "tokens": last.get("tokens", 0),
      "seconds": _round(summary.get("wall_s") or _last(plots.timing(run, "elapsed_s")), 1),
      "tokens_per_s": _round(_median(plots.timing(run, "tokens_per_s")), 1),
      "final": _final(run, summary), "evaluations": _evaluations(run), "curve": _curve(run),
      "load_LE": [[_round(v, 3) for v in row] for row in load[-1]] if load else [],
      "rows": plots.layer_names(run, len(load[-1])) if load else [],
      "baselines": {k: _round(v, 5) for k, v in (summary.get("baselines") or {}).items()},
      "notes": notes})


def write(workdir: str | Path, folder: str | Path) -> Path:
  """Writes the record of a finished run as folder/ID.json; the folder is made if need be.

  Raises:
    ConfigError: not a workdir, or the run in it has not finished: half a run's numbers beside
      whole runs' would be compared with them.
  """
  values = record(workdir)
  if not values["finished"]:
    raise config_lib.ConfigError(f"{workdir}: the run is not finished, so it gets no record; run "
                                 "the same command again to go on")
  Path(folder).mkdir(parents=True, exist_ok=True)
  return files.write_atomic(Path(folder) / f"{values['id']}.json", dumps(values))


def find(folder: str | Path, id: str) -> dict[str, Any] | None:
  """The record of a config's fingerprint, or None where there is none that can be read.

  A changed default changes what a fingerprint stands for: compare
  `config.from_dict(found["config"])` with the config that is meant.
  """
  try:
    return load(Path(folder) / f"{id}.json")
  except (OSError, ValueError):
    return None


def read(folder: str | Path, notes: list[str] | None = None) -> list[dict[str, Any]]:
  """All records of a folder in the order of their file names; other JSON files are passed by.

  Args:
    folder: may be absent: then there are none.
    notes: gets a sentence for each file that cannot be read.
  """
  found = []
  for path in sorted(Path(folder).glob("*.json")):
    try:
      values = load(path)
    except (OSError, ValueError) as error:
      if notes is not None:
        notes.append(f"{path} could not be read and is left out: {error}.")
      continue
    found += [values] if values is not None else []
  return found


def load(path: str | Path) -> dict[str, Any] | None:
  """The record in a file; None for JSON that is no record.

  Raises:
    OSError: the file cannot be read.
    ValueError: it is no JSON, half of a record, or a record of another version.
  """
  values = json.loads(Path(path).read_text(encoding="utf-8"))
  if not isinstance(values, dict) or "curve" not in values or "id" not in values:
    return None
  if values.get("format") != FORMAT:
    raise ValueError(f"it has format {values.get('format')}, and {FORMAT} is read")
  missing = [name for name in FIELDS if name not in values]
  if missing:
    raise ValueError(f"it lacks {', '.join(missing)}")
  return values


def dumps(values: dict[str, Any]) -> str:
  """A record's JSON: one line a field, so that a repository's differences can be read."""
  lines = (f" {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in values.items())
  return "{\n" + ",\n".join(lines) + "\n}\n"


# --- parts of a record --------------------------------------------------------------------------


def _arm(run: Run, notes: list[str]) -> dict[str, Any]:
  """What the sweep that started this run wrote beside it."""
  path = run.workdir / "arm.json"
  values = _json(path)
  if path.exists() and not values:
    notes.append("arm.json could not be read.")
  return {k: values[k] for k in ("name", "state", "error", "commit", "code") if k in values}


def _config(values: dict[str, Any], notes: list[str]
            ) -> tuple[dict[str, Any], config_lib.Config | None]:
  """A config with all of today's keys, as dictionary and as Config; None if it is none of today's.
  """
  try:
    made = config_lib.from_dict(values)
  except config_lib.ConfigError as error:
    notes.append(f"config.json is not a config of this version ({error}).")
    return values, None
  return config_lib.to_dict(made) if values else {}, made


def _identity(config: dict[str, Any], made: config_lib.Config | None) -> str:
  if made is not None:
    return config_lib.fingerprint(made)
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def _sizes(made: config_lib.Config | None, summary: dict[str, Any]) -> dict[str, Any]:
  """Parameters and FLOPs: of the config, and where that cannot be read, of the summary."""
  if made is None:
    return {k: summary.get(k) for k in ("parameters", "activated_parameters")} | {
        "flops_per_token": None}
  return {"parameters": sum(counts.parameters(made.model).values()),
          "activated_parameters": sum(counts.activated_parameters(made.model).values()),
          "flops_per_token": counts.flops_per_token(made.model, made.data.sequence_length)}


def _ended(run: Run) -> str:
  """When the last number was written, UTC."""
  for name in ("metrics.jsonl", "config.json"):
    if (run.workdir / name).exists():
      seconds = (run.workdir / name).stat().st_mtime
      return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"
  return ""


def _corpus(run: Run) -> dict[str, str]:
  """The tokenizer's hash, and the fingerprint that `data.pipeline.Corpus` has of the text.

  The newest checkpoint knows it. Without one it is made of the shards' own indices.
  """
  sources = [str(s) for s in run.config.get("data", {}).get("sources", [])]
  folders = [Path(s.removeprefix("shards:")) for s in sources if s.startswith("shards:")]
  indices = [_json(path) for path in (*sorted((run.workdir / "data").glob("*/index.json")),
                                      *(f / "index.json" for f in folders))]
  tokenizers = sorted({str(index["tokenizer"]) for index in indices if "tokenizer" in index})
  contents = [str(index["content"]) for index in indices if "content" in index]
  for path in sorted((run.workdir / "checkpoints").glob("*/checkpoint.json"), reverse=True):
    found = (_json(path).get("iterator") or {}).get("corpus")
    if found:
      break
  else:
    found = hashlib.sha256(" ".join([*tokenizers, *contents]).encode()).hexdigest()[:16]
  return {"tokenizer": "+".join(tokenizers), "text": found if contents else ""}


def _json(path: Path) -> dict[str, Any]:
  """A file's object; empty where it cannot be read."""
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return {}
  return values if isinstance(values, dict) else {}


def _final(run: Run, summary: dict[str, Any]) -> dict[str, Any]:
  final = summary.get("final") or (run.evals[-1] if run.evals else {})
  loss_N, steps = plots.column(run.train, "loss"), _spacing(run)
  smooth = lambda key: _last(statistics.ema(plots.column(run.train, key), steps))
  if loss_N.size and not np.isfinite(loss_N[-1]):  # diverged: what it was before is no result
    loss_N, smooth = loss_N[-1:], lambda key: None
  skipped = _last(plots.column(run.train, "skipped"))
  keys = ("loss", "bits_per_byte", "max_vio", "accuracy", "mtp_loss", "ema_loss",
          "ema_bits_per_byte")
  return {**{k: _round(final[k], 6) for k in keys if k in final},
          "train_loss": _round(_last(loss_N), 6), "train_smoothed": _round(smooth("loss"), 6),
          "train_max_vio": _round(smooth("max_vio"), 5),
          "skipped_steps": final.get("skipped_steps", skipped and int(skipped))}


def _evaluations(run: Run) -> list[dict[str, Any]]:
  keep = _thin(len(run.evals), _EVALUATIONS)
  keys = ("step", "tokens", "loss", "bits_per_byte", "max_vio")
  return [{k: _round(run.evals[i][k], 5) for k in keys if k in run.evals[i]} for i in keep]


def _curve(run: Run) -> dict[str, list[Any]]:
  keep, steps = _thin(len(run.train), POINTS), _spacing(run)
  seconds_N = plots.timing(run, "elapsed_s")
  curve = {"step": [run.train[i]["step"] for i in keep],
           "tokens": [run.train[i].get("tokens") for i in keep],
           "seconds": [_round(seconds_N[i], 1) for i in keep]}
  for key, digits in (("loss", 4), ("max_vio", 3)):
    smooth_N = statistics.ema(plots.column(run.train, key), steps)
    curve[key] = [_round(smooth_N[i], digits) for i in keep]
  return curve


def _spacing(run: Run) -> int:
  """Training steps from one logged line to the next."""
  return max(1, int(run.config.get("train", {}).get("log_every", 1)))


def _thin(count: int, most: int) -> list[int]:
  """At most `most` of `count` indices, evenly apart, the first and the last among them."""
  return np.unique(np.linspace(0, count - 1, min(count, most)).round()).astype(int).tolist()


def _last(values_N: np.ndarray) -> float | None:
  finite_N = values_N[np.isfinite(values_N)]
  return float(finite_N[-1]) if finite_N.size else None


def _median(values_N: np.ndarray) -> float | None:
  finite_N = values_N[np.isfinite(values_N)]
  return float(np.median(finite_N)) if finite_N.size else None


def _round(value: Any, digits: int) -> Any:
  """Numbers and lists of them, shorter; anything else as it is."""
  if isinstance(value, list):
    return [_round(v, digits) for v in value]
  return round(value, digits) if isinstance(value, float) else value


def plain(value: Any) -> Any:
  """As JSON gives it back: tuples as lists, numbers that are not finite as None."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  return None if isinstance(value, float) and not np.isfinite(value) else value
