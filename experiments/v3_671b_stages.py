"""What did DeepSeek-V3 do after pre-training, as far as the report says?  (report 4.3, 5.1)

Pre-training (experiments/v3_671b.py), the extension to 32K and to 128K tokens with YaRN, a thousand
steps each at the last rate of pre-training, and fine-tuning: two epochs, 5e-6 -> 1e-6, samples
packed and blind to each other. Of reinforcement learning it gives no number, and kind=grpo runs on
one device so far: that stage is in experiments/posttrain_tiny.py alone. What is not disclosed is
chosen here and marked so.

Parent:   experiments/v3_671b.py
Run:      dsv3 train --config=experiments/v3_671b_stages.py --config.sft.files='sft/*.jsonl'
          on its cluster, after its `dsv3 tokenize`. Never run at this size by us.
Cost:     119K H800 GPU-hours for the extension, 5K for all of post-training, in the report
Expected: needles found at all lengths up to 128K and all depths (figure 8)
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import Config, sft_optim
from experiments import v3_671b

PHASES = (("extend_1", 32_768, 1920), ("extend_2", 131_072, 480))  # tokens, sequences a step
STEPS = 1000
YARN = {"factor": 40.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


def get_config() -> Config:
  """Pre-training."""
  return v3_671b.get_config()


def stages() -> Iterator[dict[str, Any]]:
  """Pre-training, two phases of extension, fine-tuning."""
  yield {"stage": "pretrain"}
  after = {
      "model.attention.yarn": YARN, "data.batch_start": 0, "loss.bias_speed": 0.0,
      "loss.mtp_weight": 0.1,  # neither disclosed: as pre-training ends
      # Not disclosed: fewer micro-batches than DualPipe wants, and room for long sequences.
      "runtime.pipeline.schedule": "zb1p", "runtime.mesh.node": 4, "data.microbatch": 32}
  for name, length, batch in PHASES:
    yield {"stage": name, "data.sequence_length": length, "data.batch_size": batch,
           "train.tokens": float(STEPS * length * batch), "optim.warmup_steps": 0,
           "optim.lr": 7.3e-6, "optim.lr_constant_until": 1.0, "optim.lr_cosine_until": 1.0,
           "optim.lr_final": 7.3e-6, "optim.lr_last_from": 1.0, "optim.lr_last": 7.3e-6, **after}
  tuning = dataclasses.asdict(sft_optim(mu_dtype="bfloat16", nu_dtype="bfloat16"))
  yield {"stage": "sft", "kind": "sft", "sft.files": ("sft/*.jsonl",), "data.isolate": True,
         "data.batch_size": 480, "data.sequence_length": 32_768,  # neither disclosed
         **{f"optim.{name}": value for name, value in tuning.items()}, **after}
