"""Drafts by MTP modules, for a forward pass of the main model to verify (report 2.2, 5.4.3).

Module k at position i combines the representation h_i^{k-1} with the embedding of token i + k, and
predicts token i + k + 1 (`model/mtp.py`). Let n be the position of the newest token, which was
drawn and is in no cache yet. The module's entries in the cache are settled up to position n - k,
for which token n is needed; beyond, it has seen drafts. A round of drafting therefore runs module k
over the positions that became settled since the last round and on to n - 1, where it predicts
token n + k:

    module 1   ... n-2  n-1               with tokens  ... n-1  n         predicts n + 1
    module 2   ... n-2  n-1                            ... n    n+1       predicts n + 2

Its first position is one before the first of module k - 1, whose representation there is the last
settled one of the round before: it is kept. Where more drafts are wanted than there are modules,
the last module goes on from its own output, one position further each time: what predicts token
n + k stands for what the module below would have said at the next position.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.infer import forward
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.parameters import MTP, Parameters
from dsv3_jax.model import layers, rope


class Tail(NamedTuple):
  """What a round goes on from: the newest tokens and the representations they were drawn from.

  Attributes:
    h_BTD: the main model's at the position before each of them.
    tokens_BT: int32; of row b the first new_B[b] count. The last of those is in no cache.
    new_B: int32, at least 1.
    kept: for each module but the first, [B, D], the representation of the module before at the
      first position that the round runs it over.
  """

  h_BTD: jax.Array
  tokens_BT: jax.Array
  new_B: jax.Array
  kept: tuple[jax.Array, ...]


def depth(cfg: config.Model, drafts: int) -> int:
  """M, modules that make `drafts` drafts."""
  return min(drafts, cfg.mtp_depth)


def main_input(weights: Parameters, h_BTD: jax.Array, cfg: config.Model) -> jax.Array:
  """What the first module gets of the main model's representations before the final norm."""
  if cfg.mtp_input == "normed":
    return layers.rms_norm(h_BTD, weights.final_norm_D, cfg.norm_eps)
  return h_BTD


def prefill(weights: Parameters, cache: Cache, h_BTD: jax.Array, tokens_BT: jax.Array,
            token_B: jax.Array, drafts: int, cfg: config.Model, runtime: config.Runtime
            ) -> tuple[Tail, Cache]:
  """Runs the modules over prompts, as far as the prompts' own tokens settle.

  Args:
    weights: the model's.
    cache: after the main model's pass over the prompts.
    h_BTD: that pass's result.
    tokens_BT: the prompts.
    token_B: drawn from the last representation of each.
    drafts: K, that each round makes.
    cfg, runtime: the model and implementations.

  Returns:
    The tail, for rounds of K drafts, and the cache with the modules' layers.
  """
  length_B, kept, kinds = cache.lengths_B, list(cache.layers), []
  start_B = jnp.zeros_like(length_B)
  h_BTD = main_input(weights, h_BTD, cfg)
  tail_BD = forward.last(h_BTD, length_B)
  for k in range(1, depth(cfg, drafts) + 1):
    tokens_BT = jnp.roll(tokens_BT, -1, axis=1)
    if k > 1:
      kinds.append(forward.last(h_BTD, length_B - k + 1))
    place = cfg.layers + k - 1
    h_BTD, kept[place] = _module(weights, weights.mtp[k - 1], h_BTD, tokens_BT, kept[place], cache,
                                 start_B, jnp.maximum(length_B - k, 0), cfg, runtime, fresh=True)
  rest = ((0, 0), (0, drafts))
  tail = Tail(jnp.pad(tail_BD[:, None], (*rest, (0, 0))), jnp.pad(token_B[:, None], rest),
              jnp.ones_like(length_B), tuple(kinds))
  return tail, Cache(tuple(kept), length_B, cache.pages_BN)


def propose(weights: Parameters, cache: Cache, tail: Tail, alive_B: jax.Array, drafts: int,
            draw: Callable[[int, jax.Array], jax.Array], cfg: config.Model,
            runtime: config.Runtime) -> tuple[jax.Array, tuple[jax.Array, ...], Cache]:
  """Drafts of the tokens after each row's newest.

  Args:
    weights: the model's.
    cache: its lengths are the newest tokens' positions.
    tail: of `prefill` or the last round.
    alive_B: bool; other rows' caches stay as they are.
    drafts: K.
    draw: the number of a draft, from 0, and its logits fp32 [B, V] to tokens int32 [B].
    cfg, runtime: the model and implementations.

  Returns:
    Drafts int32 [B, K], what the next tail keeps, and the cache with the modules' layers.
  """
  T, rows = tail.tokens_BT.shape[1], jnp.arange(alive_B.shape[0])
  cached, kept, found = list(cache.layers), [], []
  tokens_BS = jnp.pad(tail.tokens_BT, ((0, 0), (0, drafts)))  # followed by the drafts
  h_BTD, newest_BD, modules = tail.h_BTD, None, depth(cfg, drafts)
  for k in range(1, drafts + 1):
    if k <= modules:
      if k > 1:
        h_BTD = jnp.concatenate([tail.kept[k - 2][:, None], h_BTD], axis=1)
      new_B = tail.new_B + k - 1
      start_B, tokens_BT = cache.lengths_B - new_B, tokens_BS[:, :T + k - 1]
    else:
      start_B, tokens_BT = cache.lengths_B + k - modules - 1, found[-1][:, None]
      h_BTD, new_B = newest_BD[:, None], jnp.ones_like(tail.new_B)
    at = min(k, modules) - 1
    w, place = weights.mtp[at], cfg.layers + at
    h_BTD, cached[place] = _module(weights, w, h_BTD, tokens_BT, cached[place], cache, start_B,
                                   jnp.where(alive_B, new_B, 0), cfg, runtime)
    if k < modules:
      kept.append(h_BTD[rows, tail.new_B - 1])
    newest_BD = forward.last(h_BTD, new_B)
    found.append(draw(k - 1, _logits(weights, w, newest_BD, cfg)))
    tokens_BS = tokens_BS.at[rows, tail.new_B + k - 1].set(found[-1])
  return jnp.stack(found, 1), tuple(kept), Cache(tuple(cached), cache.lengths_B, cache.pages_BN)


def _module(weights: Parameters, w: MTP, h_BTD, tokens_BT, cached, cache: Cache, start_B, new_B,
            cfg: config.Model, runtime: config.Runtime, fresh: bool = False):
  """h^k [B, T, D] at positions from start_B on (which may be negative: those are left out of the
  cache), and the module's layer of the cache."""
  h_BTD = (layers.linear(layers.rms_norm(jnp.take(weights.embedding_VD, tokens_BT, axis=0),
                                         w.embed_norm_D, cfg.norm_eps), w.w_embed_DD)
           + layers.linear(layers.rms_norm(h_BTD, w.hidden_norm_D, cfg.norm_eps), w.w_hidden_DD))
  position_BT = start_B[:, None] + jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
  before = Cache((), start_B, cache.pages_BN)
  h_BTD, cached, _ = forward.block(h_BTD, w.layer, cached, before,
                                   rope.rope_table(cfg.attention, position_BT), new_B, cfg,
                                   runtime, fresh)
  return h_BTD, cached


def _logits(weights: Parameters, w: MTP, h_BD, cfg: config.Model) -> jax.Array:
  h_BD = layers.rms_norm(h_BD, w.out_norm_D, cfg.norm_eps)
  return jnp.einsum("bd,dv->bv", h_BD, weights.head_DV, preferred_element_type=jnp.float32)
