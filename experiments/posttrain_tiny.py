"""Does GRPO teach a tiny model what fine-tuning has begun?  (report 5.1 to 5.3, small)

Pretraining on the Python standard library, fine-tuning on worked additions and sortings, then GRPO
on additions, judged by the boxed answer. After each stage the model answers held-out problems.

Run:      dsv3 train --config=experiments/posttrain_tiny.py
Arg:      shuffled   the control: GRPO with the rewards of each rollout in random order
Cost:     14 minutes on 2 CPU cores: pretraining 4, fine-tuning 3, GRPO 6
Expected: runs/posttrain_tiny/stages.md has what is solved of held-out problems: two-digit additions
          about half after fine-tuning. GRPO does not add to that yet: see LOG.md.
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import Config, ConfigError, replace
from experiments import tiny

EXAM = ("add:0:100", "sort:0:100")


def get_config(arg: str | None = None) -> Config:
  """What all stages share; `arg` may be "shuffled"."""
  if arg not in (None, "shuffled"):
    raise ConfigError(f"experiments/posttrain_tiny.py:{arg}: the only argument is shuffled")
  return replace(tiny.get_config(), **{
      "exam.problems": EXAM, "exam.new_tokens": 72, "grpo.shuffle_rewards": arg == "shuffled"})


def stages(arg: str | None = None) -> Iterator[dict[str, Any]]:
  """Pretraining, fine-tuning, GRPO."""
  steady = {"optim.ema_decay": 0.0, "loss.bias_until": 1.0, "train.sample_tokens": 0,
            "data.isolate": True}
  yield {"stage": "pretrain", "exam.problems": ()}
  yield {"stage": "sft", "kind": "sft", "sft.problems": ("add:0:2500", "sort:0:2500"),
         "sft.epochs": 3.0, "optim.lr": 1e-3, "optim.warmup_steps": 20,
         "optim.lr_constant_until": 0.0, "optim.lr_cosine_until": 1.0, "optim.lr_final": 1e-4,
         "optim.lr_last_from": 1.0, "train.eval_every": 100, **steady}
  yield {"stage": "grpo", "kind": "grpo", "grpo.problems": ("add:0:800",),
         "grpo.rollouts": 60, "grpo.prompts": 8, "grpo.group": 8, "grpo.new_tokens": 72,
         "grpo.kl": 0.01, "data.batch_size": 32, "data.microbatch": 8, "optim.lr": 3e-5,
         "optim.warmup_steps": 5, "optim.lr_final": 3e-5, "optim.lr_last": 3e-5,
         "loss.bias_speed": 0.0, "train.eval_every": 0, "train.checkpoint_every": 20, **steady}
