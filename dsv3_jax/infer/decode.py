"""Rounds of decoding, compiled: drafts if there are any, one pass of the main model, draws.

A round takes each row's newest token, which is in no cache yet, and K drafts of what follows
(`infer/draft.py`), runs the main model over these K + 1 tokens at once, and keeps of the drafts
what stands (`infer/verify.py`): from 1 to K + 1 new tokens. Without drafts it is a plain decode
step. What a rejected draft left in the cache lies beyond the row's length and is written over.

Over several devices (`infer/spmd.py`) each has rows of its own and runs the same rounds, as long as
any row anywhere has tokens left.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config, ops
from dsv3_jax.infer import draft as draft_lib
from dsv3_jax.infer import forward as forward_lib
from dsv3_jax.infer import sampler, verify
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.draft import Tail
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.sampler import Rows


class State(NamedTuple):
  """Between two calls.

  Attributes:
    cache: all but each row's newest token.
    token_B: int32, the newest tokens.
    left_B: int32, tokens that a row may still draw; none are drawn once a stop token was.
    seen_BV: bool, for the repetition penalty, or None.
    tail: for drafts, or None.
    counts_LE: fp32, tokens that each expert of each MoE layer has had, on all devices together.
  """

  cache: Cache
  token_B: jax.Array
  left_B: jax.Array
  seen_BV: jax.Array | None
  tail: Tail | None
  counts_LE: jax.Array


class New(NamedTuple):
  """What N rounds drew: of row b in round n the first count_NB[n, b] of T = K + 1.

  Log-probabilities are the model's: of temperature 1, without penalties, bias or truncation.
  """

  count_NB: jax.Array  # int32, 0 where a row was not alive
  tokens_NBT: jax.Array  # int32
  logprobs_NBT: jax.Array  # fp32
  top_tokens_NBTX: jax.Array  # int32, the X most likely tokens at each place
  top_logprobs_NBTX: jax.Array


STATIC = ("drafts", "cfg", "runtime", "tops", "axes", "halves")


@functools.partial(jax.jit, static_argnames=(*STATIC, "fresh"), donate_argnames=("cache",))
def prefill(weights: Parameters, cache: Cache, tokens_BT: jax.Array, new_B: jax.Array,
            most: jax.Array, seen_BV: jax.Array | None, r: Rows, bias: jax.Array | None,
            stop_S: jax.Array, *, drafts: int, cfg: config.Model, runtime: config.Runtime,
            tops: int = 0, fresh: bool = True, axes: tuple[str, ...] = (), halves: bool = False
            ) -> tuple[State, New]:
  """Prompts, or chunks of them, into the cache, and the token after each.

  Args:
    weights: the model's.
    cache: donated.
    tokens_BT, new_B: of row b the first new_B[b] tokens are its prompt.
    most: tokens to draw, this one included; one for all rows.
    seen_BV: bool, tokens of the prompts, or None without a repetition penalty.
    r: the rows' settings.
    bias: [V] or [B, V], added to the logits, or None.
    stop_S: tokens that end a row.
    drafts: K, of each later round.
    cfg, runtime: the model and implementations.
    tops: X, likeliest tokens to give with each one drawn.
    fresh: the cache is empty; drafts want it to be.
    axes: mesh axes whose devices have rows of their own, inside shard_map.
    halves: run two micro-batches, see `forward`.
  """
  assert not drafts or fresh and not halves
  h_BTD, counts_LE, cache = forward_lib.forward(weights, cache, tokens_BT, new_B, cfg, runtime,
                                                fresh, halves)
  logits_BV = forward_lib.readout(weights, forward_lib.last(h_BTD, new_B), cfg)
  scores_BV = sampler.scores(logits_BV, r, seen_BV, _each(bias))
  token_B = sampler.draw(scores_BV, r.seed_B, cache.lengths_B)
  tail = None
  if drafts:
    tail, cache = draft_lib.prefill(weights, cache, h_BTD, tokens_BT, token_B, drafts, cfg, runtime)
  count_B = jnp.ones_like(new_B)
  tokens_BT = token_B[:, None]
  left_B = _left(most, count_B, tokens_BT, stop_S)
  new = New(count_B, tokens_BT, *_said(logits_BV[:, None], tokens_BT, tops))
  state = State(cache, token_B, left_B, _marked(seen_BV, tokens_BT, count_B), tail,
                _everywhere(counts_LE, axes))
  return (state,
          jax.tree.map(lambda x: x[None], new))


@functools.partial(jax.jit, static_argnames=(*STATIC, "most"), donate_argnames=("state",))
def run(weights: Parameters, state: State, alive_B: jax.Array, r: Rows, bias: jax.Array | None,
        stop_S: jax.Array, count: jax.Array, *, most: int, drafts: int, cfg: config.Model,
        runtime: config.Runtime, tops: int = 0, axes: tuple[str, ...] = (), halves: bool = False
        ) -> tuple[State, New]:
  """Up to `count` <= `most` rounds, fewer when no row has tokens left to draw.

  Args:
    weights: the model's.
    state: donated.
    alive_B: bool; other rows draw no more.
    r, bias, stop_S, drafts, cfg, runtime, tops, axes, halves: as for `prefill`.
    count: rounds.
    most: N, rounds that there is room for in the result.
  """
  assert not (drafts and halves)
  B, T, before_LE = state.token_B.shape[0], drafts + 1, state.counts_LE
  zeros = lambda shape, dtype=jnp.float32: ops.varying_zeros(shape, dtype, state.token_B)
  state = state._replace(left_B=jnp.where(alive_B, state.left_B, 0),
                         counts_LE=zeros(before_LE.shape))
  more = lambda state: _everywhere(jnp.sum(state.left_B > 0), axes) > 0

  def step(carry):
    i, _, state, new = carry
    state, one = _round(weights, state, r, bias, stop_S, drafts, cfg, runtime, tops, halves)
    new = jax.tree.map(lambda all, x: all.at[i].set(x), new, one)
    return i + 1, more(state), state, new

  empty = New(zeros((most, B), jnp.int32), zeros((most, B, T), jnp.int32), zeros((most, B, T)),
              zeros((most, B, T, tops), jnp.int32), zeros((most, B, T, tops)))
  _, _, state, new = jax.lax.while_loop(lambda carry: (carry[0] < count) & carry[1], step,
                                        (jnp.int32(0), more(state), state, empty))
  return state._replace(counts_LE=before_LE + _everywhere(state.counts_LE, axes)), new


def _everywhere(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  return jax.lax.psum(x, axes) if axes else x


def _round(weights, state: State, r: Rows, bias, stop_S, drafts: int, cfg, runtime, tops: int,
           halves: bool) -> tuple[State, New]:
  """One round; what it drew without the axis N."""
  cache, alive_B, tail = state.cache, state.left_B > 0, None
  tokens_BT, place_B = state.token_B[:, None], cache.lengths_B + 1  # of the first to be drawn
  if drafts:
    drafts_BK, kept, draft_scores_BKV, cache = _drafted(weights, state, alive_B, r, bias, drafts,
                                                        cfg, runtime)
    tokens_BT = jnp.concatenate([tokens_BT, drafts_BK], 1)
  new_B = jnp.where(alive_B, drafts + 1, 0)
  h_BTD, counts_LE, after = forward_lib.forward(weights, cache, tokens_BT, new_B, cfg, runtime,
                                                halves=halves)
  logits_BTV = forward_lib.readout(weights, h_BTD, cfg)
  scores_BTV = _scores(logits_BTV, r, state.seen_BV, bias, tokens_BT)
  if drafts:
    drawn_BT, count_B = verify.accept(drafts_BK, draft_scores_BKV, scores_BTV, r.seed_B, place_B)
    tail = Tail(draft_lib.main_input(weights, h_BTD, cfg), drawn_BT, count_B, kept)
  else:
    drawn_BT = sampler.draw(scores_BTV[:, 0], r.seed_B, place_B)[:, None]
    count_B = jnp.ones_like(new_B)
  newest_B = jnp.take_along_axis(drawn_BT, count_B[:, None] - 1, axis=1)[:, 0]
  count_B = jnp.where(alive_B, count_B, 0)
  cache = Cache(after.layers, cache.lengths_B + count_B, cache.pages_BN)
  state = State(cache, jnp.where(alive_B, newest_B, state.token_B),
                _left(state.left_B, count_B, drawn_BT, stop_S),
                _marked(state.seen_BV, drawn_BT, count_B), tail, state.counts_LE + counts_LE)
  return state, New(count_B, drawn_BT, *_said(logits_BTV, drawn_BT, tops))


def _drafted(weights, state: State, alive_B, r: Rows, bias, drafts: int, cfg, runtime) -> Any:
  """Drafts [B, K], what the tail keeps, scores [B, K, V] that they were drawn from, the cache."""
  seen_BV, scores = state.seen_BV, []

  def draw(k: int, logits_BV: jax.Array) -> jax.Array:
    nonlocal seen_BV
    scores.append(sampler.scores(logits_BV, r, seen_BV, _each(bias)))
    token_B = sampler.draw(scores[-1], r.seed_B, state.cache.lengths_B + 1 + k)
    seen_BV = _marked(seen_BV, token_B[:, None], jnp.ones_like(token_B))
    return token_B

  drafts_BK, kept, cache = draft_lib.propose(weights, state.cache, state.tail, alive_B, drafts,
                                             draw, cfg, runtime)
  return drafts_BK, kept, jnp.stack(scores, 1), cache


def _scores(logits_BTV, r: Rows, seen_BV, bias, tokens_BT) -> jax.Array:
  """Scores [B, T, V]; at each place the tokens before it count as seen."""
  B, T, V = logits_BTV.shape
  seen = None
  if seen_BV is not None:
    at_BTV = jax.nn.one_hot(tokens_BT, V, dtype=jnp.int32)
    seen = ((jnp.cumsum(at_BTV, 1) > 0) | seen_BV[:, None]).reshape(-1, V)
  each = jax.tree.map(lambda x: jnp.repeat(x, T), r)
  return sampler.scores(logits_BTV.reshape(-1, V), each, seen, _each(bias, T)).reshape(B, T, V)


def _each(bias, T: int = 1):
  """A bias as [B T, V] or [1, V]."""
  if bias is None or bias.ndim == 1:
    return bias if bias is None else bias[None]
  return jnp.repeat(bias, T, axis=0)


def _said(logits_BTV, tokens_BT, tops: int):
  """Log-probabilities of tokens, and the likeliest tokens with theirs."""
  own_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
  chosen_BT = jnp.take_along_axis(own_BTV, tokens_BT[..., None], axis=2)[..., 0]
  top_BTX, token_BTX = jax.lax.top_k(own_BTV, tops)
  return chosen_BT, token_BTX.astype(jnp.int32), top_BTX


def _left(left_B, count_B, tokens_BT, stop_S):
  """Tokens left to draw after `count_B`, none after a stop token."""
  counts_BT = jnp.arange(tokens_BT.shape[1]) < count_B[:, None]
  stops_B = ((tokens_BT[..., None] == stop_S).any(2) & counts_BT).any(1)
  return jnp.where(stops_B, 0, jnp.maximum(left_B - count_B, 0))


def _marked(seen_BV, tokens_BT, count_B):
  if seen_BV is None:
    return None
  counts_BT = jnp.arange(tokens_BT.shape[1]) < count_B[:, None]
  where_BT = jnp.where(counts_BT, tokens_BT, seen_BV.shape[1])
  return seen_BV.at[jnp.arange(seen_BV.shape[0])[:, None], where_BT].set(True, mode="drop")
