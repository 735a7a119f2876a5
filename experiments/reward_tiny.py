"""Does a reward model tell right additions from a tiny policy's wrong ones?  (report 5.2, small)

It begins with the fine-tuned model of experiments/posttrain_tiny.py and learns from pairs: that
model's own answers, right against wrong by the rule reward. Held-out pairs are judged at the end.

Parent:   experiments/posttrain_tiny.py, stage sft
Run:      dsv3 train --config=experiments/reward_tiny.py --workdir=runs/reward_tiny
Arg:      score      a number, by Bradley-Terry (the default)
          corrupted  the same from worked solutions against corrupted ones, which no policy wrote
          thought    the number is read after a thought that works the sum anew
          judge      a thought and a verdict in words; shown the reference
Cost:     score and corrupted about 3 minutes of one CPU core; thought and judge were not timed
Expected: score ranks 76 % +- 5 of 72 held-out pairs and 84 % +- 3 of the test split's. It has
          learned that worked answers are right: where all are worked it ranks at chance (LOG.md)
"""

from dsv3_jax.config import Config, ConfigError, replace
from experiments import tiny

ARMS = ("score", "corrupted", "thought", "judge")


def get_config(arg: str | None = None) -> Config:
  """One arm; "score" where `arg` is None."""
  arg = arg or "score"
  if arg not in ARMS:
    raise ConfigError(f"experiments/reward_tiny.py:{arg}: the argument is one of {', '.join(ARMS)}")
  form = {
      "score": {},
      "corrupted": {"reward.samples": 0, "reward.problems": ("add:0:1000",), "reward.epochs": 1.0},
      "thought": {"reward.thought": True, "reward.text": 1.0},
      "judge": {"reward.form": "judge", "data.sequence_length": 512}}[arg]
  return replace(tiny.get_config(), **{
      "kind": "reward", "train.init": "runs/posttrain_tiny/2-sft", "data.seed": 1,
      "data.isolate": True, "data.validation_fraction": 0.2, "reward.problems": ("add:0:250",),
      "reward.samples": 8, "reward.epochs": 4.0, "reward.new_tokens": 96, "optim.lr": 1e-3,
      "optim.warmup_steps": 10, "optim.lr_constant_until": 0.0, "optim.lr_cosine_until": 1.0,
      "optim.lr_final": 1e-4, "optim.lr_last_from": 1.0, "optim.ema_decay": 0.0,
      "loss.bias_speed": 0.0, "train.eval_every": 25, "train.sample_tokens": 0, **form})
