"""Does predicting more tokens ahead help the next one?  (report 2.2, 4.5.1, table 4)

Arms: depth 0, 1 and 2; for depth 1 other weights lambda than 0.3, then 0.1. Losses are the main
model's alone, MTP modules dropped as at inference. All arms see the same tokens, but those with MTP
spend more FLOPs on them: look at the loss against FLOPs too.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_mtp.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 5 arms x 3 seeds x 100 to 170 s on one core
Expected: table 4: bits per byte the same with and without (0.729), benchmarks mostly better
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Depths and weights."""
  one = {"model.mtp_depth": 1}
  return arm.seeds({
      "no MTP": {},
      "depth 1": one,
      "depth 2": {"model.mtp_depth": 2},
      "depth 1, lambda 0.1": one | {"loss.mtp_weight": 0.1},
      "depth 1, lambda 1": one | {"loss.mtp_weight": 1.0, "loss.mtp_weight_late": 1.0},
  })
