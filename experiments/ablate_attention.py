"""What does a small cache cost?  (report 2.1.1; V2, arXiv 2405.04434, tables 1, 8 and 9)

Arms of equal attention parameters: latent attention; multi-head; grouped-query with two key-value
heads; multi-query. Heads of the last two are added until the parameters are equal. At cpu scale
multi-query's cache is as large as the latent's, so that this pair is also compared at equal cache;
"mqa, as many heads" has that cache with fewer parameters.

Parent:   experiments/ablation.py
Run:      dsv3 sweep --config=experiments/ablate_attention.py:cpu --workdir=runs/ablations
Arg:      cpu (default), gpu, real: the parent's scales
Cost:     cpu: 5 arms x 3 seeds x 90 to 120 s on one core
Expected: V2: multi-head better than grouped and multi-query (table 8), latent better than
          multi-head (table 9) with 15.6K numbers a token in place of 110.6K
Result:   experiments/RESULTS.md
"""

from collections.abc import Iterator
from typing import Any

from dsv3_jax.config import Model
from dsv3_jax.sweep import arm
from experiments import ablation

get_config = ablation.get_config


def sweep(scale: str | None = None) -> Iterator[dict[str, Any]]:
  """Kinds of attention."""
  cfg = get_config(scale).model
  return arm.seeds({
      "mla": {},
      "mha": _gqa(cfg, None),
      "gqa, 2 kv heads": _gqa(cfg, 2),
      "mqa": _gqa(cfg, 1),
      "mqa, as many heads": _gqa(cfg, 1) | {"model.attention.heads": cfg.attention.heads},
  })


def _gqa(cfg: Model, kv_heads: int | None) -> dict[str, Any]:
  """Heads of the width of a value head, all of it rotated, as many as latent attention can pay.

  A head costs 2 D d for its queries and outputs, a key-value head 2 D d; None: each head has one.
  """
  d = cfg.attention.v_dim
  pairs = _parameters(cfg) / (2 * cfg.dim * d)  # of heads and key-value heads together
  step = kv_heads or 1
  heads = pairs / 2 if kv_heads is None else pairs - kv_heads
  return {"model.attention.kind": "gqa", "model.attention.kv_heads": kv_heads or 0,
          "model.attention.heads": max(1, round(heads / step)) * step,
          "model.attention.nope_dim": 0, "model.attention.rope_dim": d, "model.attention.v_dim": d}


def _parameters(cfg: Model) -> int:
  """Weights of latent attention in one layer."""
  a = cfg.attention
  queries = (a.heads * a.qk_dim * (a.q_rank or cfg.dim)) + cfg.dim * a.q_rank
  keys = cfg.dim * (a.kv_rank + a.rope_dim) + a.kv_rank * a.heads * (a.nope_dim + a.v_dim)
  return queries + keys + a.heads * a.v_dim * cfg.dim
