"""How large should the initial weights be?  (report 4.2: std 0.006 at width 7168)

0.006 is 0.5 / sqrt(7168): a width-independent rule would have 0.045 at width 128, GPT-2's 0.02 lies
between.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_init.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 4 arms x 3 seeds x 100 s on one core
Expected: the report gives no comparison
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Standard deviations, the parent's first."""
  std = get_config(scale).model.init_std
  return arm.seeds({f"std {s:g}": {"model.init_std": s}
                    for s in (std, *(s for s in (0.006, 0.01, 0.02, 0.045) if s != std))})
