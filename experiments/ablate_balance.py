"""What does balance cost, and which way is cheapest?  (report 4.5.2, 4.5.3, table 5)

Arms: V3's own (bias and a sequence-wise loss of 1e-4); the bias alone, which is loss-free; V2's
auxiliary loss, weak and strong; the same form over the batch in place of the sequence; nothing. An
auxiliary loss balances as well as the bias only if it is strong: read losses beside MaxVio.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_balance.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 6 arms x 3 seeds x 100 s on one core
Expected: table 5: loss-free below auxiliary (0.724 against 0.727 bits per byte); 4.5.3: batch-wise
          as good as loss-free (2.253), sequence-wise worse (2.258)
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Ways to balance."""
  no_bias = {"loss.bias_speed": 0.0, "loss.sequence_balance": 0.0}
  return arm.seeds({
      "bias + sequence": {},
      "bias alone": {"loss.sequence_balance": 0.0},
      "sequence 0.001": no_bias | {"loss.sequence_balance": 1e-3},
      "sequence 0.01": no_bias | {"loss.sequence_balance": 1e-2},
      "batch 0.01": no_bias | {"loss.batch_balance": 1e-2},
      "none": no_bias,
  })
