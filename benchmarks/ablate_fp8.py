"""Runs one arm of experiments/ablate_fp8.py and keeps its curve, or tabulates what is kept.

    python -m benchmarks.ablate_fp8 v3 --seeds 0 1 2           results/ablate_fp8/v3-0.json, ...
    python -m benchmarks.ablate_fp8 v3 --steps 200 --set runtime.fp8.bits=14
    python -m benchmarks.ablate_fp8 --table

A finished run is one small JSON file, so that an interruption costs one run. The runs share the
tokenized text in the workdir's data/. Losses are the
training loss in nats a token, smoothed with an EMA of 0.9 as in the report (appendix B.1) and
corrected for its start; differences are relative to the fp32 run of the same seed and length and,
where there are such fp32 runs, with the same changes.
"""

import argparse
import json
import os
import pathlib
import statistics

from benchmarks import common

FOLDER = common.RESULTS / "ablate_fp8"
DECAY = 0.9
BASELINE = "fp32"


def smoothed(losses: list[float]) -> list[float]:
  """EMA of the losses, divided by its weights' sum."""
  found, mean = [], 0.0
  for i, loss in enumerate(losses, 1):
    mean = DECAY * mean + (1 - DECAY) * loss
    found.append(mean / (1 - DECAY**i))
  return found


def train(arm: str, seed: int, steps: int, changes: dict[str, str], workdir: str) -> pathlib.Path:
  """Trains an arm (resuming what is in the workdir) and writes its JSON file."""
  from dsv3_jax import cli, config
  from dsv3_jax.train import run
  overrides = [("train.seed", str(seed)), *changes.items()]
  cfg = cli.load_config(f"experiments/ablate_fp8.py:{arm}", overrides)
  if steps:
    cfg = config.replace(cfg, **{"train.tokens": steps * cfg.data.batch_size
                                 * cfg.data.sequence_length})
  name = "-".join([arm, str(seed), *(f"{k.rpartition('.')[2]}={v}" for k, v in changes.items()),
                   *([f"{steps}steps"] if steps else [])]).replace(" ", "_")
  folder, shared = pathlib.Path(workdir) / name, pathlib.Path(workdir) / "data"
  folder.mkdir(parents=True, exist_ok=True)
  shared.mkdir(exist_ok=True)
  if not (folder / "data").exists():
    (folder / "data").symlink_to(shared.resolve(), target_is_directory=True)
  run(cfg, str(folder))
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
  steps_seen = [line for line in lines if line["kind"] == "train"]
  losses = [line["loss"] for line in steps_seen]
  planned = round(cfg.train.tokens / cfg.data.batch_size / cfg.data.sequence_length)
  if len(losses) < planned:
    raise SystemExit(f"{folder} stopped after {len(losses)} of {planned} steps; the same command "
                     "goes on from there")
  kept = {
      "arm": arm, "seed": seed, "changes": changes, "steps": len(losses),
      "smoothed": smoothed(losses)[-1],
      "curve": [round(loss, 4) for loss in smoothed(losses)[9::10]],  # every tenth step
      "validation": [line["loss"] for line in lines if line["kind"] == "eval"][-1],
      "skipped": steps_seen[-1].get("skipped", steps_seen[-1].get("bad_steps", 0)),
      "train_s": steps_seen[-1]["time"]["elapsed_s"],
      "device": common.device(), "versions": common.versions("jax", "jaxlib", "flax"),
  }
  FOLDER.mkdir(parents=True, exist_ok=True)
  path = FOLDER / f"{name}.json"
  temporary = path.with_suffix(".tmp")
  with open(temporary, "w", encoding="utf-8") as file:
    json.dump(kept, file, sort_keys=True)
    file.write("\n")
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
  return path


def table() -> str:
  """Markdown: arms by length of run, mean and standard deviation over seeds, difference."""
  runs: dict[tuple, list[dict]] = {}
  for path in sorted(FOLDER.glob("*.json")):
    kept = json.loads(path.read_text())
    changes = " ".join(f"{k}={v}" for k, v in kept["changes"].items())
    runs.setdefault((kept["steps"], kept["arm"], changes), []).append(kept)
  lines = ["| steps | arm | seeds | smoothed loss | difference | validation loss | seconds |",
           "|---|---|---|---|---|---|---|"]

  def spread(values):
    return (f"{statistics.mean(values):.4f}"
            + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""))

  for (steps, arm, changes), found in sorted(runs.items()):
    # Paired by seed: initial weights and data are then the same, and only the recipe differs.
    beside = runs.get((steps, BASELINE, changes)) or runs.get((steps, BASELINE, ""), ())
    base = {kept["seed"]: kept["smoothed"] for kept in beside}
    pairs = [kept["smoothed"] / base[kept["seed"]] - 1 for kept in found if kept["seed"] in base]
    difference = "-"
    if pairs:
      difference = f"{statistics.mean(pairs):+.2%}"
      difference += f" ± {statistics.stdev(pairs):.2%}" if len(pairs) > 1 else ""
    lines.append(f"| {steps} | {arm} {changes}".rstrip()
                 + f" | {len(found)} | {spread([k['smoothed'] for k in found])} | {difference} | "
                 f"{spread([k['validation'] for k in found])} | "
                 f"{statistics.mean(k['train_s'] for k in found):.0f} |")
  return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("arm", nargs="?", help="a recipe")
  parser.add_argument("--seeds", type=int, nargs="+", default=[0])
  parser.add_argument("--steps", type=int, default=0, help="0: the experiment's own")
  parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE",
                      help="config overrides, for example runtime.fp8.bits=14")
  parser.add_argument("--workdir", default="runs/ablate_fp8", help="default: %(default)s")
  parser.add_argument("--table", action="store_true", help="print what is kept so far")
  args = parser.parse_args(argv)
  if args.table == bool(args.arm):
    parser.error("give an arm, or --table")
  if args.table:
    print(table())
    return
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  changes = dict(change.split("=", 1) for change in args.set)
  for seed in args.seeds:
    print(train(args.arm, seed, args.steps, changes, args.workdir))


if __name__ == "__main__":
  main()
