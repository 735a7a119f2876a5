"""Does fill-in-the-middle cost anything from left to right?  (report 4.1: rate 0.1)

Arms: none, the report's rate, half of the documents. Validation text has no infilling.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_fim.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 3 arms x 3 seeds x 100 s on one core
Expected: the report: none at 0.1; DeepSeek-Coder chose 0.5 for code
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Rates, the parent's first."""
  rate = get_config(scale).data.fim_rate
  return arm.seeds({f"rate {r:g}": {"data.fim_rate": r}
                    for r in (rate, *(r for r in (0.0, 0.1, 0.5) if r != rate))})
