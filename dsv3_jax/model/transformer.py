"""The whole model: embedding, dense and MoE blocks, final norm, head, MTP modules.

Layers of one kind are stacked along a leading axis and run under `lax.scan`, so the 671B model is
some thirty arrays and traces in about a second. The module tree holds two kinds of variables,
`nnx.Param` and `routing.RouterBias`; nothing assigns to it after construction, and everything that
varies between calls is an argument. To train, split it:

    graphdef, params, buffers = nnx.split(model, nnx.Param, RouterBias)
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8.recipe import resolve
from dsv3_jax.model import layers, remat, rope
from dsv3_jax.model.block import Block, BlockCall, scan, stack
from dsv3_jax.model.moe import MoECall, MoEStats, expert_settings
from dsv3_jax.model.mtp import MTPModule
from dsv3_jax.parallel import context as context_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
  """What a forward pass gives."""

  logits_BTV: jax.Array  # fp32
  mtp_logits: tuple[jax.Array, ...]  # fp32 [B, T, V] a depth; the last k positions of depth k have
  # no input token and mean nothing
  counts_LE: jax.Array | None  # tokens routed to each expert, MoE layers then MTP depths


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
  """Representations ready for the head, and routing statistics."""

  h_BTD: jax.Array  # after the final norm
  mtp: tuple[jax.Array, ...]  # after each depth's output norm, [B, T, D]
  stats: MoEStats | None  # every field leads with L: MoE layers, then MTP depths


def shift(x: jax.Array, by: int) -> jax.Array:
  """Moves axis 1 left by `by` places and fills the end with zeros."""
  return jnp.pad(x[:, by:], [(0, 0), (0, min(by, x.shape[1]))] + [(0, 0)] * (x.ndim - 2))


class Transformer(nnx.Module):
  """DeepSeek-V3 (report section 2).

  Args:
    cfg: fixes every shape.
    rngs: `nnx.Rngs(seed)`; all weights are N(0, init_std^2), gains 1, router biases 0.
    dtype: of the parameters (router biases are always fp32).
  """

  def __init__(self, cfg: config.Model, *, rngs: nnx.Rngs, dtype=jnp.float32):
    self.cfg = cfg
    std = cfg.init_std

    def blocks(moe: bool, count: int):
      return stack(lambda r: Block(cfg, moe=moe, rngs=r, dtype=dtype), count, rngs)

    self.embedding_VD = layers.normal_param(rngs, (cfg.vocab_size, cfg.dim), std, dtype)
    self.dense = nnx.data(blocks(False, cfg.dense_layers))
    self.moe = nnx.data(blocks(True, cfg.moe_layers))
    self.final_norm_D = layers.ones_param(cfg.dim, dtype)
    self.head_DV = layers.normal_param(rngs, (cfg.dim, cfg.vocab_size), std, dtype)
    self.mtp = nnx.data(stack(lambda r: MTPModule(cfg, rngs=r, dtype=dtype), cfg.mtp_depth, rngs))

  def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array | None = None,
               runtime: config.Runtime = config.Runtime()) -> Output:
    """Logits of every position.

    Args:
      tokens_BT: int, in [0, vocab_size).
      segments_BT: int32; tokens see only their own segment. None: plain causal attention.
      runtime: dtypes and implementations.
    """
    graphdef, state = nnx.split(self)
    return _forward(graphdef, state, jnp.asarray(tokens_BT), segments_BT, runtime)

  def embed(self, tokens: jax.Array, runtime: config.Runtime, axes: tuple[str, ...] = ()
            ) -> jax.Array:
    """Embeddings [..., D] of int tokens [...], in the compute dtype; no scaling.

    `axes` cut the vocabulary (`layers.embed`).
    """
    return layers.embed(self.embedding_VD[...], tokens, runtime.compute_dtype, axes)

  def logits(self, h_BTD: jax.Array) -> jax.Array:
    """fp32 logits [B, T, V] of representations after their norm."""
    return jnp.einsum("btd,dv->btv", h_BTD, self.head_DV[...].astype(h_BTD.dtype),
                      preferred_element_type=jnp.float32)

  def hidden(self, embedded_BSD: jax.Array, *, length: int | None = None,
             segments_BT: jax.Array | None = None, valid_BT: jax.Array | None = None,
             mtp_valid_KBT: jax.Array | None = None,
             balance: config.Loss | None = None, axes: tuple[str, ...] = (),
             runtime: config.Runtime = config.Runtime(),
             ahead_KBTD: jax.Array | None = None) -> Hidden:
    """Runs all blocks.

    Args:
      embedded_BSD: embeddings of T tokens, or of T + 1 where the token after the last is known:
        MTP reads it.
      length: T; None: S. Of whole sequences, where `context` cuts them.
      segments_BT: int32 or None, see `__call__`.
      valid_BT: fp32 0/1, positions that count in routing statistics; None: all.
      mtp_valid_KBT: the same for each MTP depth; None: all positions but the last k of depth k.
      balance: losses with a positive weight are computed.
      axes: mesh axes that shard the batch; those among them named `node` and `gpu` also cut the
        routed experts, of whose weights only this device's are here. With `context` among them
        sequences are cut too (`parallel/context.py`): all arguments but `segments_BT` are then of
        this device's tokens.
      runtime: dtypes and implementations.
      ahead_KBTD: embeddings of the tokens k places after each, for MTP; None: from `embedded_BSD`.
    """
    B, S, _ = embedded_BSD.shape
    T = S if length is None else length
    context = context_lib.cut(T, axes)
    if segments_BT is None:
      positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    else:
      positions_BT = rope.positions_from_segments(segments_BT)
    if context is not None:
      positions_BT, T = context.own(positions_BT), T // context.shards
      missing = ahead_KBTD is None or mtp_valid_KBT is None  # here is not where a sequence ends
      if S != T or (missing and self.mtp is not None):
        raise ValueError(f"along context each device takes the embeddings of its {T} tokens, and "
                         f"what MTP sees as ahead_KBTD and mtp_valid_KBT; given are {S}")
    cos, sin = rope.rope_table(self.cfg.attention, positions_BT)
    held = (self.moe if self.dense is None else self.dense).attn.held
    moe_call = MoECall(valid_BT, balance, axes, runtime.gemm, resolve(runtime, held),
                       expert_settings(self.cfg.moe, runtime, axes))
    call = BlockCall(cos, sin, segments_BT, moe_call, runtime, context)

    def step(block, x_BTD, _):
      return block(x_BTD, call)

    step = remat.wrap_step(step, runtime.remat)
    x_BTD, stats = embedded_BSD[:, :T], []
    for layers_of_a_kind in (self.dense, self.moe):
      if layers_of_a_kind is not None:
        x_BTD, found = scan(layers_of_a_kind, step, x_BTD, runtime.layer_unroll)
        stats += [found] if found is not None else []
    h_BTD = layers.rms_norm(x_BTD, self.final_norm_D[...], self.cfg.norm_eps)
    mtp_hidden, mtp_stats = self._mtp(h_BTD if self.cfg.mtp_input == "normed" else x_BTD,
                                      embedded_BSD, call, mtp_valid_KBT, ahead_KBTD)
    stats += [mtp_stats] if mtp_stats is not None else []
    joined = jax.tree.map(lambda *s: jnp.concatenate(s), *stats) if stats else None
    return Hidden(h_BTD, mtp_hidden, joined)

  def _mtp(self, h_BTD, embedded_BSD, call: BlockCall, valid_KBT, ahead_KBTD):
    """Representations of each depth after its output norm, and stacked statistics."""
    if self.mtp is None:
      return (), None
    B, T, _ = h_BTD.shape
    depths = range(1, self.cfg.mtp_depth + 1)
    if ahead_KBTD is None:
      ahead_KBTD = jnp.stack([shift(embedded_BSD, k)[:, :T] for k in depths])
    if valid_KBT is None:
      index_T = jnp.arange(T)
      valid_KBT = jnp.stack([jnp.broadcast_to(index_T < embedded_BSD.shape[1] - k, (B, T))
                             for k in depths]).astype(jnp.float32)

    def step(module, h_BTD, x):
      embedded_BTD, valid_BT = x
      depth_call = call._replace(moe=call.moe._replace(valid_BT=valid_BT))
      h_BTD, stats = module(h_BTD, embedded_BTD, depth_call)
      return h_BTD, (module.readout(h_BTD), stats)

    step = remat.wrap_step(step, call.runtime.remat)
    _, (read_KBTD, stats) = scan(self.mtp, step, h_BTD, call.runtime.layer_unroll,
                                 (ahead_KBTD, valid_KBT))
    return tuple(read_KBTD), stats


@functools.partial(jax.jit, static_argnums=(0, 4))
def _forward(graphdef, state, tokens_BT, segments_BT, runtime) -> Output:
  """Compiled once for each model shape, so that calls from a notebook do not retrace."""
  model = nnx.merge(graphdef, state)
  hidden = model.hidden(model.embed(tokens_BT, runtime), segments_BT=segments_BT, runtime=runtime)
  return Output(model.logits(hidden.h_BTD), tuple(model.logits(h) for h in hidden.mtp),
                hidden.stats.counts_E if hidden.stats is not None else None)
