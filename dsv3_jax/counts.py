"""Parameters and FLOPs of a model from its config alone: closed forms, nothing is allocated."""

from dsv3_jax import config


def _attention(cfg: config.Model, norms: bool = True) -> int:
  a = cfg.attention
  if a.kind == "gqa":
    return cfg.dim * (a.heads * (a.qk_dim + a.v_dim) + a.cached)
  queries = (cfg.dim * a.heads * a.qk_dim if a.q_rank == 0 else
             cfg.dim * a.q_rank + a.q_rank * a.heads * a.qk_dim)
  latent = cfg.dim * (a.kv_rank + a.rope_dim)
  up = a.kv_rank * a.heads * (a.nope_dim + a.v_dim)
  return queries + latent + up + a.heads * a.v_dim * cfg.dim + (
      a.q_rank + a.kv_rank if norms else 0)


def _moe(cfg: config.Model, experts: int, bias: bool = True) -> int:
  """Router, `experts` routed experts, the shared ones."""
  m = cfg.moe
  router = (cfg.dim + bias) * m.experts
  return router + 3 * cfg.dim * m.ffn_dim * (experts + m.shared)


def _moe_block(cfg: config.Model, experts: int, vectors: bool = True) -> int:
  """One MoE layer; `vectors` counts its norm gains and router bias."""
  norms = 2 * cfg.dim if vectors else 0
  return _attention(cfg, vectors) + _moe(cfg, experts, vectors) + norms


def _main(cfg: config.Model, experts: int) -> int:
  dense = _attention(cfg) + 3 * cfg.dim * cfg.dense_ffn_dim + 2 * cfg.dim
  return (2 * cfg.vocab_size * cfg.dim + cfg.dim + cfg.dense_layers * dense +
          cfg.moe_layers * _moe_block(cfg, experts))


def _mtp(cfg: config.Model, experts: int) -> int:
  """One MTP module without the embedding and head that it borrows."""
  return _moe_block(cfg, experts) + 2 * cfg.dim * cfg.dim + 3 * cfg.dim


def parameters(cfg: config.Model) -> dict[str, int]:
  """{"main", "mtp"}: numbers in the trained tree, router biases included.

  The released model: 671,026,419,200 and 11,610,068,224.
  """
  every = cfg.moe.experts
  return {"main": _main(cfg, every), "mtp": cfg.mtp_depth * _mtp(cfg, every)}


def activated_parameters(cfg: config.Model) -> dict[str, int]:
  """{"main", "mtp"}: those that one token meets; the embedding and the head count whole."""
  active = cfg.moe.active
  return {"main": _main(cfg, active), "mtp": cfg.mtp_depth * _mtp(cfg, active)}


def layers(cfg: config.Model) -> dict[str, int]:
  """Parameters of parts: {"dense": a dense layer, "moe": an MoE layer without its routed experts,
  "experts": these, "mtp": what an MTP module has beyond an MoE layer}.
  """
  return {"dense": _attention(cfg) + 3 * cfg.dim * cfg.dense_ffn_dim + 2 * cfg.dim,
          "moe": _moe_block(cfg, 0), "experts": 3 * cfg.dim * cfg.moe.ffn_dim * cfg.moe.experts,
          "mtp": 2 * cfg.dim * cfg.dim + 3 * cfg.dim}


def flops_per_token(cfg: config.Model, sequence_length: int, causal: bool = True) -> float:
  """Training FLOPs a token: forward and backward, MTP included, recomputation left out.

  Six a matmul weight (the embedding is a look-up, the head runs once for the main model and once
  an MTP depth), and six an attended key and head dimension of scores and values.

  Args:
    cfg: the model.
    sequence_length: T.
    causal: count only the (T + 1) / 2 keys that a position sees on average; otherwise all T. The
      report's 250 GFLOP a token is the causal number at T = 4096 without MTP.
  """
  a = cfg.attention
  keys = (sequence_length + 1) / 2 if causal else sequence_length
  attended = a.heads * (a.qk_dim + a.v_dim) * keys
  head = cfg.vocab_size * cfg.dim
  dense = _attention(cfg, norms=False) + 3 * cfg.dim * cfg.dense_ffn_dim + attended
  moe = _moe_block(cfg, cfg.moe.active, vectors=False) + attended
  main = cfg.dense_layers * dense + cfg.moe_layers * moe + head
  mtp = cfg.mtp_depth * (moe + 2 * cfg.dim * cfg.dim + head)
  return 6.0 * (main + mtp)
