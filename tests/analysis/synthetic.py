"""A made-up workdir with every file that a finished run leaves behind."""

import json
import math
from pathlib import Path

import numpy as np

from dsv3_jax import config as config_lib


def write(workdir: Path, steps: int = 700, eval_every: int = 100, layers: int = 4,
          experts: int = 16, finished: bool = True, samples: list | None = None,
          changes: dict | None = None, shift: float = 0.0) -> Path:
  """Fills `workdir` with config.json, metrics.jsonl and summary.json of a plausible run.

  `changes` are dotted keys of the config; `shift` is added to all losses.
  """
  changes = changes or {}
  rng = np.random.default_rng(changes.get("train.seed", 0))
  workdir.mkdir(parents=True, exist_ok=True)
  tokens_a_step = 2048
  model = config_lib.replace(config_lib.Model(), **{"layers": layers, "moe.experts": experts})
  config = config_lib.Config(
      model=model, train=config_lib.Train(tokens=steps * tokens_a_step * (1 if finished else 2)))
  config = config_lib.replace(config, **changes)
  (workdir / "config.json").write_text(config_lib.to_json(config))
  lines, rows = [], layers - 1 + 1
  for step in range(1, steps + 1):
    tokens = step * tokens_a_step
    loss = 3.1 + shift + 5.9 * math.exp(-step / 60) + 0.12 * rng.standard_normal()
    vio = np.maximum(0.08, 2.5 * np.exp(-step / (90 + 30 * np.arange(rows)))
                     + 0.1 * rng.standard_normal(rows))
    lines.append({
        "kind": "train", "step": step, "tokens": tokens, "loss": loss,
        "mtp_loss": [loss + 0.7], "balance": 1.01, "accuracy": 0.45 - 0.4 * math.exp(-step / 90),
        "lr": 1.5e-3 * min(1, step / 50) * (0.1 + 0.9 * max(0, 1 - step / steps)),
        "bias_speed": 0.01 if step < 0.96 * steps else 0.0,
        "mtp_weight": 0.3 if step < 0.67 * steps else 0.1,
        "grad_norm": 0.6 + 5 * math.exp(-step / 20) + 0.1 * abs(rng.standard_normal()),
        "max_vio": vio.max(), "max_vio_L": vio.tolist(), "batch_size": 8, "skipped": min(step, 3),
        "time": {"tokens_per_s": 5000 + 150 * rng.standard_normal(), "step_s": 0.4,
                 "mfu": 0.61, "elapsed_s": 0.41 * step}})
    if eval_every and step % eval_every == 0:
      lines.append({"kind": "eval", "step": step, "tokens": tokens, "loss": loss + 0.1,
                    "mtp_loss": [loss + 0.85], "bits_per_byte": (loss + 0.1) / math.log(2) / 2.9,
                    "max_vio": vio.max()})
      load_LE = np.exp(0.25 * rng.standard_normal((rows, experts)))
      load_LE /= load_LE.mean(axis=1, keepdims=True)
      lines.append({"kind": "load", "step": step, "tokens": tokens, "load_LE": load_LE.tolist()})
  (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  if finished:
    default_samples = [
        {"kind": "completion", "prompt": "def read(path):\n  with open(path) as file:\n    ",
         "suffix": "", "text": "return file.read()\n\n\nclass <b>Reader</b>:\n  pass\n",
         "reference": "return file.read()\n", "temperature": 0.0},
        {"kind": "infill", "prompt": "for i in range(", "text": "len(values)",
         "suffix": "):\n  total += values[i]\n", "reference": "len(values)", "temperature": 0.8}]
    summary = {
        "config_hash": "3f1c9a2b77de", "commit": "0123456789abcdef",
        "versions": {"python": "3.11.7", "jax": "0.10.2", "flax": "0.12.8"},
        "device": "2 CPU cores (cpu)", "parameters": 10_630_000,
        "activated_parameters": 7_200_000, "wall_s": 0.41 * steps,
        "final": {"loss": 3.1 + shift, "bits_per_byte": (3.1 + shift) / math.log(2) / 2.9,
                  "max_vio": float(vio.max()), "skipped_steps": 3},
        "baselines": {"unigram": 4.9, "gzip -9": 2.13, "xz": 1.92},
        "samples": default_samples if samples is None else samples}
    (workdir / "summary.json").write_text(json.dumps(summary))
    (workdir / "command.txt").write_text(
        "dsv3 train --config=experiments/tiny.py --workdir=runs/tiny\n")
  return workdir


def sweep(pool: Path, arms: dict, seeds: int = 3, steps: int = 40, name: str = "ablate-cpu",
          question: str = "Does it help?", jitter: float = 0.01, **kwargs) -> Path:
  """Fills a sweep's pool.

  Args:
    arms: name -> (changes of the config, shift of all losses); `jitter` makes seeds differ.
  """
  plan = {"experiment": f"experiments/{name.partition('-')[0]}.py",
          "arg": name.partition("-")[2] or None, "question": question, "commit": "0123456789ab",
          "date": "2026-11-22 12:00:00", "arms": []}
  for seed in range(seeds):
    for i, (arm, (changes, shift)) in enumerate(arms.items()):
      made = {**changes, "train.seed": seed}
      temporary = pool / "arms" / "new"
      write(temporary, steps=steps, eval_every=max(1, steps // 4), changes=made,
            shift=shift + 0.05 * seed + jitter * math.sin(7 * i + 3 * seed), **kwargs)
      config = config_lib.from_json((temporary / "config.json").read_text())
      id = config_lib.fingerprint(config)
      folder = pool / "arms" / f"{arm.replace(' ', '-')}-s{seed}-{id}"
      temporary.rename(folder)
      (folder / "arm.json").write_text(json.dumps(
          {"name": arm, "state": "done", "exit_code": 0, "commit": "0123456789ab"}))
      plan["arms"].append({"name": arm, "seed": seed, "id": id, "overrides": made,
                           "folder": f"arms/{folder.name}"})
  (pool / "sweeps").mkdir(exist_ok=True)
  (pool / "sweeps" / f"{name}.json").write_text(json.dumps(plan))
  return pool
