"""Several runs in a row, each beginning with the one before: pretraining, fine-tuning, GRPO.

A stage is a run with a workdir of its own, WORKDIR/1-pretrain, WORKDIR/2-sft, ... The same command
goes on where it was stopped: a finished stage returns at once, an interrupted one goes on.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3_jax import config, files
from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import exam

NAME = "stages.md"


class Stage(NamedTuple):
  """A run of a chain."""

  name: str
  folder: str
  config: config.Config


def run(stages: Sequence[Stage], one: Callable[[config.Config, str], Any],
        say: Callable[[str], Any] = print) -> Any:
  """Runs all stages; returns the result of the last one that ran.

  Args:
    stages: in their order; each but the first has the one before in `train.init`.
    one: runs one, as `posttrain.run.run`.
    say: hears which stage begins.
  """
  if not stages:
    raise ConfigError("the experiment has no stage")
  result = None
  for i, stage in enumerate(stages):
    say(f"stage {i + 1} of {len(stages)}: {stage.name} ({stage.config.kind}), {stage.folder}")
    result = one(stage.config, stage.folder)
    if not result.finished:
      break
  return result


def report(stages: Sequence[Stage], workdir: str | Path) -> str:
  """A table of the exams, stage by stage; writes WORKDIR/stages.md."""
  taken: list[tuple[str, dict[str, Any]]] = []
  for stage in stages:
    path = Path(stage.folder) / exam.NAME
    if path.is_file():
      taken.append((stage.name, json.loads(path.read_text(encoding="utf-8"))))
  parts = list(dict.fromkeys(name for _, found in taken for name in found["parts"]))
  lines = ["| " + " | ".join(["stage", "solved", "tokens", *parts]) + " |",
           "|" + "---|" * (3 + len(parts))]
  for name, found in taken:
    cells = []
    for part in parts:
      of = found["parts"].get(part)
      cells.append(f"{100 * of['solved']:.0f} % ± {100 * of['error']:.0f}" if of else "")
    lines.append(f"| {name} | {100 * found['solved']:.1f} % | {found['length']:.0f} | "
                 + " | ".join(cells) + " |")
  text = "\n".join(["Held-out problems solved after each stage.", "", *lines, ""])
  files.write_atomic(Path(workdir) / NAME, text)
  return text
