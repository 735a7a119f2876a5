"""How much do learning rate, its schedule and the batch matter?  (report 4.2)

Arms: the parent's rate, half and twice of it; cosine from the start; no decay; V2's two steps
(times 0.316 at 80 % and 90 %); a batch that grows from a quarter over the first fifth of the tokens
(the report's from a fifth over the first 3 %). An ablation whose arms differ by less than these
rates do may show no more than that one arm wants another rate.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_schedule.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 7 arms x 3 seeds x 100 to 130 s on one core
Expected: the report compares none of these
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Rates, schedules, batches."""
  cfg = get_config(scale)
  lr, batch = cfg.optim.lr, cfg.data.batch_size
  ends = {"optim.lr_final": cfg.optim.lr_final, "optim.lr_last": cfg.optim.lr_last}

  def times(factor: float) -> dict[str, Any]:
    return {"optim.lr": factor * lr} | {key: factor * value for key, value in ends.items()}

  flat = {"optim.lr_constant_until": 1.0, "optim.lr_cosine_until": 1.0, "optim.lr_last_from": 1.0}
  steps = {"optim.lr_constant_until": 0.8, "optim.lr_cosine_until": 0.8,
           "optim.lr_final": 0.316 * lr, "optim.lr_last_from": 0.9, "optim.lr_last": 0.1 * lr}
  micro = cfg.data.microbatch or batch
  small = min(micro, batch // 4)
  return arm.seeds({
      "lr": {},
      "lr / 2": times(0.5),
      "lr x 2": times(2),
      "cosine from the start": {"optim.lr_constant_until": 0.0},
      "constant": flat,
      **({"two steps": steps} if steps != {k: v for k, v in _optim(cfg).items() if k in steps}
         else {}),
      "batch from a quarter": {
          "data.batch_start": batch // 4, "data.batch_ramp_until": 0.2, "data.microbatch": small,
          # Validation is counted in micro-batches; this is as much text as the others'.
          "train.eval_batches": cfg.train.eval_batches * micro // small},
  })


def _optim(cfg: Any) -> dict[str, Any]:
  return {f"optim.{key}": value for key, value in vars(cfg.optim).items()}
