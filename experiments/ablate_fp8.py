"""Does training in FP8 follow training in bf16 or fp32, and which parts of the recipe matter?
(report 3.3, appendix B)

Arms are the recipes of dsv3_jax/fp8/recipe.py: fp32 and bf16 (the baselines), v3, v3_pow2,
per_tensor_current, per_tensor_delayed, hybrid_e5m2, block_gradients, no_promotion. Everything else
is one: model, initial weights of a seed, data and their order. The model is as small as 128-wide
tiles allow to be tiles: two of them across the residual stream, one an expert. Along the tokens an
expert's tiles have 64 rows, the grouped matmul's blocks on a CPU.

Parent:   experiments/tiny.py. Changes: a narrower vocabulary and shorter batches, no MTP, no EMA.
Run:      dsv3 train --config=experiments/ablate_fp8.py:v3 --config.train.seed=1
          python -m benchmarks.ablate_fp8 v3 --seeds 0 1 2     the same, curves kept as JSON
          python -m benchmarks.ablate_fp8 --table              means over the seeds kept so far
Cost:     1,000 steps of 1,024 tokens, about three minutes on 2 CPU cores.
          no_promotion adds on an emulated tensor core: four minutes to compile, ten times slower
          steps. Give it --config.runtime.layer_unroll=1.
Expected: smoothed losses of v3 within 0.25 % of the baselines', as the report's at 16B and 230B.
Note:     the learning rate is the better one for fp32. At twice that rate every FP8 arm lies below
          fp32, since noise in gradients makes Adam's steps smaller (LOG.md): such a comparison
          shows a rate that is too high, not a recipe that is better.
"""

from dsv3_jax import config
from dsv3_jax.config import Config, ConfigError, Data, Loss, Model, Optim, Runtime, Train

STEPS = 1000


def get_config(arg: str | None = None) -> Config:
  """The run of one arm, a recipe's name."""
  arg = arg or "v3"
  if arg not in config.RECIPES[1:]:
    raise ConfigError(f"experiments/ablate_fp8.py:{arg}: choose an arm from "
                      f"{', '.join(config.RECIPES[1:])}")
  return Config(
      model=Model(
          vocab_size=2048, dim=256, layers=3, dense_layers=1, dense_ffn_dim=512,
          attention=config.Attention(heads=4, q_rank=128, kv_rank=128, nope_dim=32, rope_dim=16,
                                     v_dim=32),
          moe=config.MoE(experts=8, active=4, shared=1, ffn_dim=128, groups=1, active_groups=1),
          mtp_depth=0, init_std=0.02),
      runtime=Runtime(recipe=arg, layer_unroll=0),
      optim=Optim(lr=1e-3, warmup_steps=50, lr_constant_until=0.6, lr_cosine_until=0.95,
                  lr_final=1e-4, lr_last_from=0.97, lr_last=7e-5),
      loss=Loss(bias_speed=5e-3),
      data=Data(sequence_length=128, batch_size=8),
      train=Train(tokens=STEPS * 8 * 128, eval_every=250, eval_batches=16,
                  checkpoint_every=STEPS, keep_last=1, sample_tokens=0))
