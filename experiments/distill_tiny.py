"""What do an expert's chains of thought bring, and what do they cost?  (report 5.1, table 9, small)

All arms begin with the pretrained model of experiments/posttrain_tiny.py and take about as many
steps. The baseline learns the answers to 3,500 additions alone. The others learn what is right of
the answers of an expert, that chain's policy after GRPO, which works its additions out: by the
expert's words, or by its probabilities too.

Parent:   experiments/posttrain_tiny.py
Run:      dsv3 train --config=experiments/distill_tiny.py
Arg:      workdir of the parent, where it is not runs/posttrain_tiny
Cost:     30 minutes on one CPU core beside other work
Expected: stages.html; answers alone: 32 % of 200 held-out additions in 6 tokens each; words 96 %
          and logits 82 % in 40 tokens. LOG.md has the run.
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import Config
from experiments import posttrain_tiny


def get_config(arg: str | None = None) -> Config:
  """What all arms share."""
  del arg
  return posttrain_tiny.get_config()


def stages(arg: str | None = None) -> Iterator[dict[str, Any]]:
  """The baseline, a student of the expert's words and one of its probabilities."""
  parent = arg or "runs/posttrain_tiny"
  begin = {"train.init": f"{parent}/1-pretrain"}
  distilling = posttrain_tiny.distilling(f"{parent}/3-grpo")
  yield {"stage": "short", "kind": "sft", "sft.answers": (posttrain_tiny.KNOWN,),
         "sft.epochs": 16.0, **posttrain_tiny.tuning(), **begin}
  yield {"stage": "words", **distilling, **begin}
  yield {"stage": "logits", "distill.mode": "logits", **distilling, **begin}
