"""Which gate?  (report 2.1.2, eq. 12-16; its differences from V2)

Arms: sigmoid affinities divided by the sum over the selected experts, at most half of the groups a
token (V3); softmax in place of sigmoid (V2); either without the division; no limit on groups; no
routed scaling factor. What a group is at real scale, the experts of one node, is a row of four
experts here.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_gate.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 6 arms x 3 seeds x 100 s on one core
Expected: the report compares none of these; arXiv 2408.15664 finds sigmoid and softmax within 0.1
          in perplexity
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Gates."""
  model = get_config(scale).model.moe
  return arm.seeds({
      "sigmoid": {},
      "softmax": {"model.moe.gate": "softmax"},
      "sigmoid, not normalised": {"model.moe.normalize": False},
      "softmax, not normalised": {"model.moe.gate": "softmax", "model.moe.normalize": False},
      **({"no group limit": {"model.moe.groups": 1, "model.moe.active_groups": 1}}
         if model.groups > 1 else {}),
      **({"one group": {"model.moe.active_groups": 1}} if model.active_groups > 1 else {}),
      **({"scale 1": {"model.moe.scale": 1.0}} if model.scale != 1 else
         {"scale 2.5": {"model.moe.scale": 2.5}}),
  })
