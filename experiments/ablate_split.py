"""What does splitting combined tokens cost?  (report 4.1: the token boundary bias)

Some tokens join punctuation and line breaks; a prompt that ends between the two was never seen. The
report splits an undisclosed share of them at random in training. Arms: none, a tenth, all.
Validation text is not split, so that losses are of one tokenization.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_split.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 3 arms x 3 seeds x 100 s on one core
Expected: the report gives no comparison
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Shares, the parent's first."""
  rate = get_config(scale).data.split_rate
  return arm.seeds({f"split {r:g}": {"data.split_rate": r}
                    for r in (rate, *(r for r in (0.0, 0.1, 1.0) if r != rate))})
