"""Speculative sampling: drafts kept or replaced so that what comes out is the main model's own.

A draft d drawn from q is kept with probability min(1, p(d) / q(d)); the first one that is not is
replaced by a draw from max(p - q, 0), normalised, and what follows it is dropped. If all are kept
one more token is drawn from p. The tokens are distributed as draws from p one by one are
(arXiv 2211.17192, appendix A.1). A greedy row's p is one token, so the same rule keeps the drafts
that are the most likely token and is exact.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.infer import sampler

_ACCEPT, _REPLACE = 1, 2  # what a position's randomness is for; 0: the draft, see `sampler.draw`


def accept(drafts_BK: jax.Array, draft_scores_BKV: jax.Array, scores_BTV: jax.Array,
           seed_B: jax.Array, position_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keeps drafts and draws the token after those that are kept.

  Args:
    drafts_BK: int32, each drawn from its `draft_scores_BKV`.
    draft_scores_BKV: fp32 log-probabilities that the drafts were drawn from.
    scores_BTV: the main model's, T = K + 1: at the drafts' places and after the last one.
    seed_B: uint32.
    position_B: place in its sequence of the first draft.

  Returns:
    tokens int32 [B, T], of which the first `count` count, and count int32 [B], from 1 to T.
  """
  rows = jnp.arange(drafts_BK.shape[0])

  def likeliest(drafts_BK, draft_scores_BKV, scores_BTV, seed_B, position_B):
    best_BT = jnp.argmax(scores_BTV, -1).astype(jnp.int32)
    kept_B = jnp.cumprod(drafts_BK == best_BT[:, :-1], axis=1).sum(1)
    return kept_B, best_BT[rows, kept_B]

  kept_B, token_B = jax.lax.cond(
      sampler.certain(scores_BTV), likeliest, _drawn, drafts_BK, draft_scores_BKV, scores_BTV,
      seed_B, position_B)
  tokens_BT = jnp.pad(drafts_BK, ((0, 0), (0, 1))).at[rows, kept_B].set(token_B)
  return tokens_BT, kept_B.astype(jnp.int32) + 1


def _drawn(drafts_BK, draft_scores_BKV, scores_BTV, seed_B, position_B):
  """How many drafts of each row are kept, and the token after them."""
  B, K = drafts_BK.shape
  at_BT = position_B[:, None] + jnp.arange(K + 1)
  keys_BT = jax.vmap(jax.vmap(lambda s, t: jax.random.fold_in(jax.random.key(s), t), (None, 0)))(
      seed_B, at_BT)
  fold = jax.vmap(jax.vmap(jax.random.fold_in, (0, None)), (0, None))
  of_draft = lambda s_BKV: jnp.take_along_axis(s_BKV, drafts_BK[..., None], axis=2)[..., 0]
  u_BK = jax.vmap(jax.vmap(jax.random.uniform))(fold(keys_BT[:, :K], _ACCEPT))
  ratio_BK = jnp.exp(of_draft(scores_BTV[:, :K]) - of_draft(draft_scores_BKV))
  kept_B = jnp.cumprod(u_BK < ratio_BK, axis=1).sum(1)
  rows = jnp.arange(B)
  p_BV = jnp.exp(scores_BTV[rows, kept_B])
  q_BTV = jnp.pad(jnp.exp(draft_scores_BKV), ((0, 0), (0, 1), (0, 0)))  # none after the last draft
  rest_BV = jnp.maximum(p_BV - q_BTV[rows, kept_B], 0)
  rest_BV = jnp.where(rest_BV.sum(1, keepdims=True) > 0, rest_BV, p_BV)  # p and q but for rounding
  key_B = fold(keys_BT, _REPLACE)[rows, kept_B]
  return kept_B, jax.vmap(jax.random.categorical)(key_B, jnp.log(rest_BV)).astype(jnp.int32)
