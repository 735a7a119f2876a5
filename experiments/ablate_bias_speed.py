"""How fast should the bias move?  (report 4.2: 0.001; arXiv 2408.15664, figure 4)

A bias moves by gamma a step, whatever the excess, so the speed needed depends on how many steps
there are. The sequence-wise loss is off, so that the bias balances alone.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_bias_speed.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 4 arms x 3 seeds x 100 s on one core
Expected: the paper, over 40,000 steps: 0.0001 converges slowly, 0.01 swings late in training
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Speeds, the parent's first."""
  speed = get_config(scale).loss.bias_speed
  others = [s for s in (speed / 5, 4 * speed, 20 * speed) if s != speed]
  return arm.seeds({f"gamma {s:g}": {"loss.bias_speed": s, "loss.sequence_balance": 0.0}
                    for s in (speed, *others)})
