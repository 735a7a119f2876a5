"""What do an expert's long chains of thought bring, and what do they cost?  (report 5.1, table 9)

All arms begin with one pretrained model and learn the same additions. The baseline learns short
answers, the box alone. An expert learns two samples of each problem: short, and asked to reflect
and verify, digit by digit with a check at the end. Then it answers twice as many problems, and what
is right, well formed and ended teaches a student, who is not asked to reflect: by the expert's
words, or by its probabilities too.

Run:      dsv3 train --config=experiments/distill_tiny.py
Arg:      workdir of a pretrained run, in place of the first stage
Cost:     not measured yet; meant for 20 minutes on 2 quiet CPU cores
Expected: runs/distill_tiny/stages.md has share solved and tokens of an answer of each arm. Not run
          as a whole yet; LOG.md has one arm of it from other checkpoints.
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import Config, replace
from experiments import tiny

LEARNT, ASKED = "add:0:1000", "add:0:2000"


def get_config(arg: str | None = None) -> Config:
  """What all stages share."""
  del arg
  return replace(tiny.get_config(), **{"exam.problems": ("add:0:200",), "exam.new_tokens": 120})


def stages(arg: str | None = None) -> Iterator[dict[str, Any]]:
  """Pretraining, the baseline, the expert, and a student of its words and one of its logits."""
  begin = arg or "pretrain"
  fine = {"train.init": begin, "data.batch_size": 4, "data.isolate": True, "optim.ema_decay": 0.0,
          "optim.lr": 2e-3, "optim.warmup_steps": 20, "optim.lr_constant_until": 0.0,
          "optim.lr_cosine_until": 1.0, "optim.lr_final": 2e-4, "optim.lr_last_from": 1.0,
          "loss.bias_until": 1.0, "train.sample_tokens": 0, "train.eval_every": 0,
          "data.validation_fraction": 0.0}
  distill = {"kind": "distill", "distill.experts": (f"expert={ASKED}",), "distill.answers": 2,
             "distill.new_tokens": 120, "distill.temperature": 0.7, "sft.epochs": 2.0, **fine}
  if not arg:
    yield {"stage": "pretrain", "exam.problems": ()}
  yield {"stage": "short", "kind": "sft", "sft.answers": (ASKED,), "sft.epochs": 6.0, **fine}
  yield {"stage": "expert", "kind": "sft", "sft.answers": (LEARNT,), "sft.problems": (LEARNT,),
         "sft.style": "long", "sft.epochs": 4.0, **fine}
  yield {"stage": "words", **distill}
  yield {"stage": "logits", "distill.mode": "logits", **distill}
