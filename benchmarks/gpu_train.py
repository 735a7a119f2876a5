"""Trains one arm of experiments/h100_moe.py for a while and writes its speed and its curve as JSON.

    python -m benchmarks.gpu_train v3 --steps 100 --json v3.json
    python -m benchmarks.gpu_train bf16 --dry       a miniature of it: to see that it would run

The data is prepared once for all arms that share a --workdir. Speed is the median over the steps
after the first tenth, so that neither compilation nor warming up counts. MFU is of the bf16 peak
for both arms: FP8's own peak is twice that.
"""

import argparse
import json
import logging
import pathlib
import shutil
import statistics
import sys

from benchmarks import common
from dsv3_jax import config, files

DRY = {
    "model.dim": 256, "model.layers": 2, "model.dense_ffn_dim": 512, "model.vocab_size": 1024,
    "model.attention.heads": 2, "model.attention.kv_rank": 128, "model.moe.experts": 4,
    "model.moe.active": 2, "model.moe.ffn_dim": 128, "runtime.compute_dtype": "float32",
    "data.sequence_length": 128, "data.batch_size": 2, "optim.warmup_steps": 1,
    "optim.mu_dtype": "float32", "optim.nu_dtype": "float32",
}


class _Choices(logging.Handler):
  """Remembers which implementations `dsv3_jax.ops` said that it uses."""

  def __init__(self):
    super().__init__()
    self.said: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.said.append(record.getMessage())


def settings(arm: str, steps: int, changes: dict[str, object]) -> config.Config:
  """The arm's config at a length of `steps`."""
  from experiments import h100_moe
  cfg = config.replace(h100_moe.get_config(arm), **changes)
  return config.replace(cfg, **{
      "train.tokens": float(steps * cfg.data.batch_size * cfg.data.sequence_length),
      "train.checkpoint_every": steps})


def train(arm: str, steps: int, workdir: pathlib.Path, changes: dict[str, object],
          documents: str = "") -> dict:
  """Trains from the beginning; returns what is kept.

  Args:
    arm: v3 or bf16.
    steps: optimizer steps.
    workdir: holds the prepared data; the run's own folder in it is removed before and after.
    changes: dotted config keys.
    documents: a file or folder to learn in place of the standard library.
  """
  from dsv3_jax.data import pipeline
  from dsv3_jax.train import run
  choices = _Choices()
  ops = logging.getLogger("dsv3_jax.ops")
  ops.addHandler(choices)
  ops.setLevel(logging.INFO)
  cfg = settings(arm, steps, changes | ({"data.sources": (documents,)} if documents else {}))
  folder = workdir / arm
  shutil.rmtree(folder, ignore_errors=True)  # an earlier one would only be resumed
  (workdir / "shared").mkdir(parents=True, exist_ok=True)
  corpus = pipeline.prepare(cfg.data, cfg.model.vocab_size, str(workdir / "shared"))
  run(cfg, str(folder), corpus=corpus)
  with open(folder / "metrics.jsonl", encoding="utf-8") as file:
    seen = [line for line in map(json.loads, file) if line["kind"] == "train"]
  peak = memory_peak()
  shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes
  timed = [line["time"] for line in seen[max(1, len(seen) // 10):]] or [seen[-1]["time"]]
  return {
      "arm": arm, "steps": len(seen), "tokens_a_step": cfg.data.batch_size
      * cfg.data.sequence_length, "losses": [line["loss"] for line in seen],
      "tokens_per_s": statistics.median(t["tokens_per_s"] for t in timed),
      "mfu_of_bf16_peak": statistics.median(t["mfu"] for t in timed),
      "first_step_s": seen[0]["time"]["step_s"], "skipped": seen[-1]["skipped"],
      "memory_peak_bytes": peak, "implementations": choices.said,
      "versions": common.versions("jax", "jaxlib", "flax")}


def memory_peak() -> int | None:
  """Bytes in use at most on the device, where it says so."""
  import jax
  return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("arm", choices=("v3", "bf16"))
  p.add_argument("--steps", type=int, default=100)
  p.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/gpu"))
  p.add_argument("--documents", default="", help="learn these in place of the standard library")
  p.add_argument("--dry", action="store_true",
                 help="a miniature, three steps on this package's source")
  p.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config overrides")
  p.add_argument("--json", type=pathlib.Path)
  args = p.parse_args(argv)
  changes: dict[str, object] = dict(DRY) if args.dry else {}
  documents = args.documents or (str(pathlib.Path(config.__file__).parent) if args.dry else "")
  for change in args.set:
    key, _, value = change.partition("=")
    kind = config.optional(config.field_type(key))
    changes[key] = value == "True" if kind is bool else kind(value)
  steps = 3 if args.dry else args.steps
  kept = train(args.arm, steps, args.workdir, changes, documents)
  print(f"{args.arm}: {kept['steps']} steps, {kept['tokens_per_s']:,.0f} tokens/s, MFU "
        f"{kept['mfu_of_bf16_peak']:.1%} of bf16 peak, loss {kept['losses'][0]:.3f} -> "
        f"{kept['losses'][-1]:.3f}")
  print("\n".join(kept["implementations"]))
  if args.json:
    files.write_atomic(args.json, json.dumps(kept, indent=2) + "\n")
  elsewhere = [said for said in kept["implementations"]
               if said.startswith("fp8_") and " pallas " not in f"{said} "]
  if args.arm == "v3" and not args.dry and elsewhere:
    print("not through the kernels: " + "; ".join(elsewhere))
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
