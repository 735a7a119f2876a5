"""Do the FP8 kernels train faster than bf16 on one Hopper GPU, to the same loss?  (report 3.3)

A mixture of experts of 1.0B parameters, 0.3B activated, with V3's attention and gate. Widths are
multiples of 128 as the FP8 kernels want them (the joint latent and rotary key: of 64, as in V3).
It learns the Python standard library's source: nothing is downloaded.

Run:      dsv3 train --config=experiments/h100_moe.py          recipe v3
          dsv3 train --config=experiments/h100_moe.py:bf16     the baseline
          make gpu                                             both, 100 steps, compared
Cost:     100 steps of 32,768 tokens, 2.3 GFLOP a token: under a minute on one H100
Memory:   12 GB of parameters, gradients and moments, and some 20 GB of activations (estimates)
Expected: losses within 0.25 %, as the report's at 16B and 230B
"""

from dsv3_jax import config
from dsv3_jax.config import Config, ConfigError, Data, Loss, Model, Optim, Runtime, Train

STEPS, SEQUENCES, LENGTH = 100, 8, 4096


def get_config(arg: str | None = None) -> Config:
  """The run under recipe v3, or with `arg` "bf16" its baseline."""
  arg = arg or "v3"
  if arg not in ("v3", "bf16"):
    raise ConfigError(f"experiments/h100_moe.py:{arg}: choose v3 or bf16")
  return Config(
      model=Model(
          vocab_size=16384, dim=2048, layers=6, dense_layers=1, dense_ffn_dim=8192,
          attention=config.Attention(heads=16, q_rank=0, kv_rank=512, nope_dim=128, rope_dim=64,
                                     v_dim=128),
          moe=config.MoE(experts=24, active=4, shared=1, ffn_dim=1024, groups=1, active_groups=1),
          mtp_depth=0),
      runtime=Runtime(compute_dtype="bfloat16", remat="report",
                      recipe="v3" if arg == "v3" else "none"),
      optim=Optim(lr=1e-3, warmup_steps=20, lr_constant_until=0.6, lr_cosine_until=0.95,
                  lr_final=1e-4, lr_last_from=0.97, lr_last=3e-5,
                  mu_dtype="bfloat16", nu_dtype="bfloat16"),
      loss=Loss(bias_speed=5e-3),
      data=Data(sequence_length=LENGTH, batch_size=SEQUENCES, workers=0, prefetch=8),
      # No checkpoint but the last: the run is for its speed and its curve.
      train=Train(tokens=float(STEPS * SEQUENCES * LENGTH), eval_every=0, checkpoint_every=STEPS,
                  keep_last=1, keep_best=0, sample_tokens=0))
