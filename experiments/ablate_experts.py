"""How fine should experts be, and how many shared?  (report 2.1.2; DeepSeekMoE, arXiv 2401.06066)

Arms of equal parameters, activated parameters and FLOPs: experts cut in two and in four; two shared
experts, or none, at the cost of routed ones. Besides: a dense feed-forward of the activated size,
equal in FLOPs with fewer parameters.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_experts.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 7 arms x 3 seeds x 80 to 150 s on one core
Expected: DeepSeekMoE: finer is better, and one shared expert better than none; dense is worst
Note:     with no shared expert or one more, the routed experts at cpu scale do not divide into
          groups: those arms route without the group limit, and so does one of the parent's shape,
          which they are to be compared with
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Granularity and shared experts."""
  cfg = get_config(scale).model
  m = cfg.moe

  def cut(n: int) -> dict[str, Any]:
    return {"model.moe.experts": n * m.experts, "model.moe.active": n * m.active,
            "model.moe.shared": n * m.shared, "model.moe.ffn_dim": m.ffn_dim // n,
            "model.moe.group_top": n * m.group_top}

  def shared(n: int) -> dict[str, Any]:
    """n shared experts; routed ones make up for it, without groups where they cannot divide."""
    experts = m.experts + m.shared - n
    groups = {} if experts % m.groups == 0 else {"model.moe.groups": 1,
                                                 "model.moe.active_groups": 1}
    return {"model.moe.shared": n, "model.moe.experts": experts,
            "model.moe.active": m.active + m.shared - n} | groups

  return arm.seeds({
      f"{m.experts} experts": {},
      f"{2 * m.experts} of half": cut(2),
      f"{4 * m.experts} of a quarter": cut(4),
      **({f"{m.experts} experts, no groups": {"model.moe.groups": 1, "model.moe.active_groups": 1}}
         if m.groups > 1 else {}),
      "none shared": shared(0),
      f"{m.shared + 1} shared": shared(m.shared + 1),
      "dense": {"model.dense_layers": cfg.layers,
                "model.dense_ffn_dim": (m.active + m.shared) * m.ffn_dim},
  })
