"""Does training in FP8 follow training in bf16 or fp32, and which parts of the recipe matter?
(report 3.3, appendix B)

Arms are the recipes of dsv3_jax/fp8/recipe.py: fp32 and bf16 (the baselines), v3, and v3 with one
thing changed: hybrid_e5m2, block_gradients (appendix B.2), per_tensor_delayed, no_promotion. At cpu
scale the model is as small as 128-wide tiles allow to be tiles: two of them across the residual
stream, one an expert. Along the tokens an expert's tiles have 64 rows, the grouped matmul's blocks
on a CPU.

Parent:   experiments/ablation.py; at cpu scale another model and half as many tokens.
Run:      dsv3 sweep --config=experiments/ablate_fp8.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 7 arms x 3 seeds x 3 minutes on one core, 10 minutes for no_promotion, which adds on
          an emulated tensor core and takes four minutes to compile
Expected: appendix B.1: smoothed losses of v3 within 0.25 % of bf16's at 16B and 230B; B.2:
          block_gradients diverges at 16B
Result:   experiments/RESULTS.md
Note:     the learning rate is the better one for fp32. At twice that rate every FP8 arm lies below
          fp32, since noise in gradients makes Adam's steps smaller (LOG.md): such a comparison
          shows a rate that is too high, not a recipe that is better.
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax import config
from dsv3_jax.config import Config
from dsv3_jax.sweep import arm
from experiments import ablation

ARMS = ("fp32", "bf16", "v3", "hybrid_e5m2", "block_gradients", "per_tensor_delayed",
        "no_promotion")


def get_config(arg: str | None = None) -> Config:
  """The report's recipe at the scale `arg`."""
  parent = ablation.get_config(arg)
  small = {
      "model.dim": 256, "model.layers": 3, "model.dense_ffn_dim": 512,
      "model.attention": config.Attention(heads=4, q_rank=128, kv_rank=128, nope_dim=32,
                                          rope_dim=16, v_dim=32),
      "model.moe": config.MoE(experts=8, active=4, shared=1, ffn_dim=128, groups=1,
                              active_groups=1),
      "optim.lr": 1e-3, "optim.lr_final": 1e-4, "data.batch_size": 8, "train.tokens": 512e3,
      "train.eval_every": 125, "train.checkpoint_every": 125,
  } if arg in (None, "cpu") else {}
  return config.replace(parent, **small | {"runtime.recipe": "v3"})


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Recipes."""
  # The emulated tensor core is slow to compile, so that its layers are not unrolled.
  rolled = {"no_promotion": {"runtime.layer_unroll": 1}}
  return arm.seeds({name: {"runtime.recipe": name} | rolled.get(name, {}) for name in ARMS})
