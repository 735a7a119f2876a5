"""What is the report's small ablation model?  (report 4.5.1, 4.5.2, appendix B)

15.7B parameters, 2.4B activated: V2-Lite's shape with V3's sigmoid gate and bias balancing. The
report gives the model and 1.33T tokens; learning rate, steps and batch are V2-Lite's
(arXiv 2405.04434, appendix B): 4.2e-4, times 0.316 at 80 % and again at 90 % of the tokens.

Run:      dsv3 train --config=experiments/moe_16b.py
Data:     `dsv3 tokenize --out=corpus ...` first, with a vocabulary of at most 102,400
Cost:     about 2e22 FLOPs (6 x 2.4B x 1.33T): some 13,500 H100-hours at 40 % of bf16 peak
Expected: loss near 1.91 at the end (read off the figure of appendix B, on its own data)
"""

from dsv3_jax.config import Config, Data, Loss, Optim, Runtime, Train, preset


def get_config() -> Config:
  """The 16B baseline."""
  return Config(
      model=preset("moe_16b"),
      runtime=Runtime(compute_dtype="bfloat16", remat="report"),
      optim=Optim(
          lr=4.2e-4, warmup_steps=2000,
          # Two steps down instead of a cosine: it has no length.
          lr_constant_until=0.8, lr_cosine_until=0.8, lr_final=4.2e-4 * 0.316,
          lr_last_from=0.9, lr_last=4.2e-4 * 0.316**2,
          mu_dtype="bfloat16", nu_dtype="bfloat16"),
      loss=Loss(sequence_balance=1e-4, bias_until=0.9),
      data=Data(
          sources=("shards:corpus",), tokenizer="corpus/tokenizer.json",
          sequence_length=4096, batch_size=4608, microbatch=64, workers=8, prefetch=16),
      train=Train(tokens=1.33e12, log_every=10, eval_every=1000, checkpoint_every=500,
                  sample_tokens=0))
