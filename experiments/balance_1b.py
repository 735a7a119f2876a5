"""Does balancing by bias alone beat the auxiliary loss?  (arXiv 2408.15664, table 2, 1B)

The 1B test bed of the paper that introduced auxiliary-loss-free balancing, before V3 adopted it:
no MTP, no node limit, no FIM; cosine 1e-3 -> 1e-4 after 1,000 steps of warm-up.

Run:      dsv3 train --config=experiments/balance_1b.py        the bias, no auxiliary loss
          dsv3 train --config=experiments/balance_1b.py:aux    expert-level loss of 0.001, no bias
Data:     `dsv3 tokenize --out=corpus ...` first, with a vocabulary of at most 32,064
Cost:     94.4B tokens an arm
Expected: perplexity 9.50 and MaxVio 0.04 (aux: 9.56 and 0.72) in the paper, on its own data
"""

from dsv3_jax.config import Config, ConfigError, Data, Loss, Optim, Runtime, Train, preset, replace

STEPS, SEQUENCES, LENGTH = 40_000, 1152, 2048


def get_config(arg: str | None = None) -> Config:
  """The loss-free arm, or with `arg` "aux" its baseline."""
  config = Config(
      model=preset("balance_1b"),
      runtime=Runtime(compute_dtype="bfloat16"),
      optim=Optim(
          lr=1e-3, warmup_steps=1000,
          lr_constant_until=1000 / STEPS, lr_cosine_until=1.0, lr_final=1e-4, lr_last_from=1.0),
      loss=Loss(sequence_balance=0.0, bias_speed=1e-3, bias_until=1.0),
      data=Data(
          sources=("shards:corpus",), tokenizer="corpus/tokenizer.json",
          sequence_length=LENGTH, batch_size=SEQUENCES, microbatch=SEQUENCES // 18,
          fim_rate=0.0, split_rate=0.0, workers=8, prefetch=16),
      train=Train(tokens=float(STEPS * SEQUENCES * LENGTH), log_every=10, eval_every=1000,
                  checkpoint_every=500, sample_tokens=0))
  if arg is None:
    return config
  if arg == "aux":
    return replace(config, **{"loss.bias_speed": 0.0, "loss.expert_balance": 1e-3})
  raise ConfigError(f"experiments/balance_1b.py:{arg}: the only argument is aux")
