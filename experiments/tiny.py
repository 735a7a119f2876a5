"""Does everything work, on this machine, on real text?  (all of the report's section 4, small)

A 10.6M-parameter DeepSeek-V3 with every mechanism on: MLA, sparse experts chosen within groups of
nodes, bias balancing and the sequence-wise loss, multi-token prediction, FIM, packing, all
schedules, EMA. It learns the Python standard library's own source, found on the machine.

Run:      dsv3 train --config=experiments/tiny.py
Arg:      smoke   20 steps, half a minute, to see that an installation works
Cost:     5 minutes on 2 CPU cores; 0.8M tokens, 391 steps
Expected: the report page in runs/tiny; validation near 2.0 bits per byte (unigram 2.8, gzip 1.9),
          MaxVio near 0.2 over the validation batches. LOG.md has the measured run.
"""

from dsv3_jax.config import Config, ConfigError, Data, Loss, Model, Optim, Runtime, Train, replace


def get_config(arg: str | None = None) -> Config:
  """The tiny run; `arg` may be "smoke"."""
  config = Config(
      model=Model(init_std=0.02),  # 0.006 is for width 7168; a narrow model wants more
      runtime=Runtime(layer_unroll=0),  # four layers compile quickly; a loop would copy residuals
      optim=Optim(
          lr=2e-3, warmup_steps=40,
          lr_constant_until=0.5, lr_cosine_until=0.95, lr_final=2e-4,
          lr_last_from=0.97, lr_last=7e-5,
          ema_decay=0.98, ema_every=5),
      # The report's gamma of 0.001 needs thousands of steps to move a bias as far as it must go;
      # here there are 391.
      loss=Loss(bias_speed=5e-3, bias_until=0.966, mtp_late_from=0.67),
      data=Data(sequence_length=256, batch_size=8),
      train=Train(tokens=8e5, eval_every=100, checkpoint_every=200))
  if arg is None:
    return config
  if arg == "smoke":
    return replace(config, **{
        "train.tokens": 20 * 8 * 256, "train.eval_every": 10, "train.eval_batches": 2,
        "train.checkpoint_every": 10, "train.sample_tokens": 16, "optim.warmup_steps": 5})
  raise ConfigError(f"experiments/tiny.py:{arg}: the only argument is smoke")
