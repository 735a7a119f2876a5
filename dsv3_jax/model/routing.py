"""Expert selection, load balancing and its statistics (report 2.1.2, eq. 12-20).

Three selections live in this file, and they differ on purpose:

1. *Groups.* A group's score is the sum of its `group_top` largest **biased** affinities; the best
   `active_groups` groups stay. Masked experts get -inf, never 0: a biased affinity can be negative,
   and a zero would then win.
2. *Experts.* The A largest **biased** affinities within those groups. The gate values are the
   **unbiased** affinities of the selected experts, divided by their sum, times `scale`. The bias
   steers selection and nothing else; it gets no gradient.
3. *The balance loss* counts the A largest **unbiased** affinities over **all** experts (eq. 18).

The bias follows the load, not a gradient: after each optimizer step it rises by `speed` where an
expert got less than the mean load of the global batch and falls where it got more. Counts are
summed over every micro-batch and device first, and both live in fp32: near 0.5 the spacing of bf16
is coarser than the report's speed of 0.001.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax import config


class RouterBias(nnx.Variable):
  """The selection bias b_i of eq. 16: a buffer that no optimizer touches."""


class Routing(NamedTuple):
  """What a router decided for P tokens."""

  expert_PA: jax.Array  # int32, distinct in each row
  gate_PA: jax.Array  # fp32
  affinity_PE: jax.Array  # fp32, unbiased


def affinities(x_PD: jax.Array, w_router_DE: jax.Array, gate: str) -> jax.Array:
  """Token-to-expert affinities s, fp32 [P, E] (eq. 15): sigmoid, or softmax as in V2."""
  logits_PE = jnp.dot(x_PD.astype(jnp.float32), w_router_DE.astype(jnp.float32))
  return jax.nn.sigmoid(logits_PE) if gate == "sigmoid" else jax.nn.softmax(logits_PE, axis=-1)


def select(affinity_PE: jax.Array, bias_E: jax.Array, cfg: config.MoE) -> jax.Array:
  """Group-limited top-A experts by biased affinity, int32 [P, A], best first.

  Ties go to the lower expert number.
  """
  P, E = affinity_PE.shape
  biased_PE = jax.lax.stop_gradient(affinity_PE) + bias_E
  if cfg.active_groups < cfg.groups:
    grouped_PGe = biased_PE.reshape(P, cfg.groups, E // cfg.groups)
    score_PG = jax.lax.top_k(grouped_PGe, cfg.group_top)[0].sum(-1)
    kept_PM = jax.lax.top_k(score_PG, cfg.active_groups)[1]
    keep_PG = (kept_PM[:, :, None] == jnp.arange(cfg.groups)).any(1)
    biased_PE = jnp.where(keep_PG[:, :, None], grouped_PGe, -jnp.inf).reshape(P, E)
  return jax.lax.top_k(biased_PE, cfg.active)[1]


def route(x_PD: jax.Array, w_router_DE: jax.Array, bias_E: jax.Array, cfg: config.MoE) -> Routing:
  """Affinities, selection and gate values (eq. 12-16) of P tokens."""
  with jax.named_scope("router"):
    affinity_PE = affinities(x_PD, w_router_DE, cfg.gate)
    expert_PA = select(affinity_PE, bias_E, cfg)
    gate_PA = jnp.take_along_axis(affinity_PE, expert_PA, axis=1)
    if cfg.normalize:
      gate_PA = gate_PA / (gate_PA.sum(-1, keepdims=True) + 1e-20)
    return Routing(expert_PA, gate_PA * cfg.scale, affinity_PE)


def expert_counts(expert_PA: jax.Array, experts: int, valid_P: jax.Array | None = None
                  ) -> jax.Array:
  """Tokens routed to each expert, fp32 [E]; tokens with `valid_P` False are left out.

  Exact up to 2^24 tokens an expert.
  """
  weight_PA = jnp.ones(expert_PA.shape, jnp.float32)
  if valid_P is not None:
    weight_PA = weight_PA * valid_P[:, None]
  return jnp.zeros((experts,), jnp.float32).at[expert_PA].add(weight_PA)


def _fractions(affinity_BTE: jax.Array, expert_BTA: jax.Array, valid_BT: jax.Array,
               axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array]:
  """f and P of eq. 18-20 for each sequence, two [B, E]; `expert_BTA` are the counted experts.

  With mesh `axes` a sequence is cut over them: f is the whole's, and P is this shard's part of it
  times the number of shards.
  """
  B, _, E = affinity_BTE.shape
  A = expert_BTA.shape[-1]
  tokens_B = valid_BT.sum(1)
  row = jnp.arange(B)[:, None, None]
  counts_BE = jnp.zeros((B, E), jnp.float32).at[row, expert_BTA].add(
      jnp.broadcast_to(valid_BT[..., None], expert_BTA.shape))
  if axes:
    tokens_B, counts_BE = jax.lax.pmean((tokens_B, counts_BE), axes)
  tokens_B = jnp.where(tokens_B > 0, tokens_B, 1)
  share_BTE = affinity_BTE / affinity_BTE.sum(-1, keepdims=True)
  f_BE = E / (A * tokens_B[:, None]) * counts_BE
  p_BE = jnp.einsum("bte,bt->be", share_BTE, valid_BT) / tokens_B[:, None]
  return f_BE, p_BE


def sequence_balance(affinity_BTE: jax.Array, active: int, valid_BT: jax.Array,
                     axes: tuple[str, ...] = ()) -> jax.Array:
  """Sequence-wise balance loss without its weight (eq. 17-20), averaged over the sequences.

  The gradient flows through the mean affinity P alone; f is a count of the unbiased top-A. Mesh
  `axes` cut the sequences; the mean of the shards' results is then the loss.
  """
  expert_BTA = jax.lax.top_k(jax.lax.stop_gradient(affinity_BTE), active)[1]
  f_BE, p_BE = _fractions(affinity_BTE, expert_BTA, valid_BT, axes)
  return jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))


def expert_balance(affinity_BTE: jax.Array, expert_BTA: jax.Array, valid_BT: jax.Array,
                   axes: tuple[str, ...] = ()) -> jax.Array:
  """V2's expert-level loss without its weight: as eq. 17, counting the experts really selected.

  DeepSeek-V2 2.2.3. Affinities are normalised over the experts first, which changes nothing for a
  softmax gate and gives a sigmoid gate the same scale. `axes` as for `sequence_balance`.
  """
  f_BE, p_BE = _fractions(affinity_BTE, expert_BTA, valid_BT, axes)
  return jnp.mean(jnp.sum(f_BE * p_BE, axis=-1))


def batch_balance(affinity_BTE: jax.Array, active: int, valid_BT: jax.Array,
                  axes: tuple[str, ...] = ()) -> jax.Array:
  """Batch-wise auxiliary loss (report 4.5.3) without its weight: f and P over all sequences.

  Args:
    affinity_BTE: fp32, this shard's sequences.
    active: A.
    valid_BT: fp32 0/1.
    axes: mesh axes over which the batch is sharded. Counts are summed over them; P stays local,
      so that the mean of the shards' results is the whole batch's loss, and its gradient likewise.
  """
  B, T, E = affinity_BTE.shape
  flat_PE, valid_P = affinity_BTE.reshape(1, B * T, E), valid_BT.reshape(1, B * T)
  expert_PA = jax.lax.top_k(jax.lax.stop_gradient(flat_PE), active)[1]
  f_BE, p_BE = _fractions(flat_PE, expert_PA, valid_P, axes)
  return jnp.sum(f_BE * p_BE)


def update_bias(bias_LE: jax.Array, counts_LE: jax.Array, speed: jax.Array | float) -> jax.Array:
  """`b_i += speed * sign(mean load - load_i)` (report 2.1.2), fp32.

  Args:
    bias_LE: [..., E].
    counts_LE: [..., E] tokens of the global batch routed to each expert.
    speed: gamma; 0 leaves the bias as it is.
  """
  mean = counts_LE.mean(-1, keepdims=True)
  return bias_LE + speed * jnp.sign(mean - counts_LE).astype(bias_LE.dtype)


def max_vio(counts_LE: jax.Array) -> jax.Array:
  """MaxVio = (largest load - mean load) / mean load, [...] (arXiv 2408.15664); 0 is balance."""
  mean = counts_LE.mean(-1)
  return (counts_LE.max(-1) - mean) / jnp.maximum(mean, 1e-9)
