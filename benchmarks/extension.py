"""Long-context extension at tiny scale: three arms and none, needles over length and depth.

    python -m benchmarks.extension                     trains what is missing, asks, draws
    python -m benchmarks.extension --seeds=3 --workdir=runs/extension

Arms of experiments/extend_tiny.py, of one seed all from the same pretrained weights: that model as
it is; YaRN put on it; extension training with plain RoPE; extension training with YaRN. What is
finished is not done again. The figure goes to experiments/figures/extension.png, the numbers beside
it; haystacks are those of `dsv3 eval --needle` with the words of the experiment's text.
"""

import argparse
import json
import shutil
from pathlib import Path

from dsv3_jax import cli, files
from dsv3_jax.analysis import needle_plot
from dsv3_jax.evals import needle
from experiments import extend_tiny

FIGURE = Path(__file__).parents[1] / "experiments" / "figures" / "extension.png"
CONFIG = "experiments/extend_tiny.py"
# Name -> argument of the experiment and the stage that is asked.
ARMS = {"pretrained on 256": ("", "1-pretrain"),
        "YaRN, no training": ("untrained", "2-extend"),
        "training, plain RoPE": ("no_yarn", "3-extend_2"),
        "training with YaRN": ("", "3-extend_2")}
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def trained(arg: str, seed: int, workdir: Path) -> Path:
  """Folder of an arm's stages, trained if need be; pretraining is done once a seed."""
  own, first = (workdir / f"{name or 'yarn'}-{seed}" for name in (arg, ""))
  if arg and not (own / "1-pretrain").exists():
    shutil.copytree(trained("", seed, workdir) / "1-pretrain", own / "1-pretrain.part",
                    dirs_exist_ok=True)
    (own / "1-pretrain.part").rename(own / "1-pretrain")
  elif not arg:
    own = first
  code = cli.run(["train", f"--config={CONFIG}{arg and ':'}{arg}", f"--workdir={own}",
                  f"--config.train.seed={seed}", f"--config.data.seed={seed}"])
  if code:
    raise SystemExit(code)
  return own


def asked(folder: Path, seed: int, needles: int) -> list[dict]:
  """What `dsv3 eval --needle` says of each haystack."""
  out = folder / f"needle-{needles}"
  if not (out / "results.json").exists():
    code = cli.run(["eval", str(folder), "--needle", f"--out={out}", f"--needles={needles}",
                    f"--lengths={','.join(map(str, LENGTHS))}", f"--seed={seed}",
                    f"--template={extend_tiny.TEMPLATE}", f"--keys={','.join(extend_tiny.KEYS)}",
                    f"--values={','.join(extend_tiny.VALUES)}"])
    if code:
      raise SystemExit(code)
  found = json.loads((out / "results.json").read_text(encoding="utf-8"))["samples"]["needle"]
  return [{**one, "number": one["number"] + needles * seed} for one in found]


def main() -> None:
  """Trains, asks, draws, and prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", default="runs/extension", type=Path)
  parser.add_argument("--seeds", default=1, type=int)
  parser.add_argument("--needles", default=4, type=int, help="a cell and seed")
  args = parser.parse_args()
  models = []
  for name, (arg, stage) in ARMS.items():
    found = [one for seed in range(args.seeds)
             for one in asked(trained(arg, seed, args.workdir) / stage, seed, args.needles)]
    models.append((name, needle.summary(found)))
  needle_plot.write(needle_plot.draw(models, extend_tiny.LENGTHS[0], "pretrained on"), FIGURE)
  files.write_atomic(FIGURE.with_suffix(".json"), json.dumps(dict(models), indent=1) + "\n")
  print("| arm | " + " | ".join(f"{n:,}" for n in LENGTHS) + " |")
  print("|---" * (1 + len(LENGTHS)) + "|")
  for name, values in models:
    print(f"| {name} | " + " | ".join(
        f"{v['recall']:.0%} ± {v['recall_error']:.0%}, {v['bits']:.2f} ± {v['bits_error']:.2f} bits"
        for v in values["by_length"]) + " |")
  print(FIGURE)


if __name__ == "__main__":
  main()
