"""What do all ablations change one thing of?  One model, corpus and schedule, at three scales.

Arg:      cpu    2.2M parameters (1.3M activated), 1M tokens of the standard library's source
          gpu    0.5B parameters (0.16B activated), 2B tokens of your corpus, bf16
          real   the report's small ablation model: experiments/moe_16b.py
          The default is cpu.
Run:      dsv3 train --config=experiments/ablation.py:cpu
Cost:     cpu: 100 seconds on one core. gpu: 2.1e18 FLOPs, an hour or two on one H100 (not
          measured). real: 2.2e22 FLOPs; `dsv3 cost` has the hours
Data:     gpu and real: `dsv3 tokenize --out=corpus ...` first, with a vocabulary of at most 32,768
          and 102,400
Expected: cpu: validation loss 4.10, MaxVio 0.2; real: see experiments/moe_16b.py
Note:     no MTP, so that an arm has one loss; ablate_mtp adds it. As in the report's ablations the
          gate is sigmoid, normalised. The bias moves five times as fast as the report's at
          cpu scale, which has 488 steps to do it in.
"""

from dsv3_jax.config import (
  Attention,
  Config,
  ConfigError,
  Data,
  Loss,
  Model,
  MoE,
  Optim,
  Runtime,
  Train,
)
from experiments import moe_16b

SCALES = ("cpu", "gpu", "real")


def get_config(arg: str | None = None) -> Config:
  """The parent of every ablation at the scale `arg`."""
  scale = arg or "cpu"
  if scale not in SCALES:
    raise ConfigError(f"scale {scale!r} must be one of {', '.join(SCALES)}")
  return {"cpu": _cpu, "gpu": _gpu, "real": _real}[scale]()


def _cpu() -> Config:
  return Config(
      model=Model(
          vocab_size=2048, dim=128, layers=4, dense_layers=1, dense_ffn_dim=384,
          attention=Attention(heads=4, q_rank=96, kv_rank=48, nope_dim=32, rope_dim=16, v_dim=32),
          moe=MoE(experts=16, active=4, shared=1, ffn_dim=64, groups=4, active_groups=2),
          mtp_depth=0, init_std=0.02),
      runtime=Runtime(layer_unroll=0),
      optim=Optim(lr=2e-3, warmup_steps=50, lr_constant_until=0.6, lr_cosine_until=0.95,
                  lr_final=2e-4, lr_last_from=0.97, lr_last=7e-5),
      loss=Loss(bias_speed=5e-3, mtp_late_from=0.67),
      data=Data(sequence_length=128, batch_size=16),
      train=Train(tokens=488 * 16 * 128, eval_every=122, eval_batches=32, checkpoint_every=244,
                  keep_last=1, sample_tokens=0))


def _gpu() -> Config:
  return Config(
      model=Model(
          vocab_size=32768, dim=1024, layers=12, dense_layers=1, dense_ffn_dim=2816,
          attention=Attention(heads=8, q_rank=512, kv_rank=256, nope_dim=128, rope_dim=64,
                              v_dim=128),
          moe=MoE(experts=32, active=4, shared=1, ffn_dim=384, groups=4, active_groups=2),
          mtp_depth=0, init_std=0.006),
      runtime=Runtime(compute_dtype="bfloat16", remat="report"),
      optim=Optim(lr=8e-4, warmup_steps=500, lr_constant_until=0.6, lr_cosine_until=0.95,
                  lr_final=8e-5, lr_last_from=0.97, lr_last=3e-5),
      loss=Loss(bias_speed=1e-3, mtp_late_from=0.67),
      data=Data(sources=("shards:corpus",), tokenizer="corpus/tokenizer.json",
                sequence_length=2048, batch_size=128, microbatch=32, workers=4, prefetch=8),
      train=Train(tokens=2e9, log_every=10, eval_every=500, eval_batches=16, checkpoint_every=500,
                  keep_last=1, sample_tokens=0))


def _real() -> Config:
  return moe_16b.get_config()
