"""The training objective: main loss, MTP losses and balance losses (report eq. 17, 24, 25).

    total = L_main + (lambda / D) * sum_k L_MTP^k + sum over MoE layers of the balance losses

Every token-wise loss is divided by one number, the main targets of the whole global batch. So the
totals of micro-batches and shards add up to the batch's loss, and L_MTP^k is divided by T although
it has T - k terms, as eq. 24 says.
"""

import types

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.model import cross_entropy
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.transformer import Transformer, shift
from dsv3_jax.parallel import context as context_lib
from dsv3_jax.parallel import mesh as mesh_lib

# Names in the metrics of the balance losses that `config.Loss` weighs.
BALANCES = types.MappingProxyType({
    "balance": "sequence_balance", "batch_balance": "batch_balance",
    "expert_balance": "expert_balance"})


def not_padding(batch: dict[str, jax.Array]) -> jax.Array:
  """fp32 [B, T + 1], 1 where a token is text: it may be masked as a target and count all the same.

  Segments of -1 are padding; a batch without segments may say "valid" instead.
  """
  if "segments" in batch:
    return (batch["segments"] >= 0).astype(jnp.float32)
  return batch.get("valid", jnp.ones_like(batch["tokens"])).astype(jnp.float32)


def targets(batch: dict[str, jax.Array], depth: int) -> tuple[jax.Array, jax.Array]:
  """Target and weight of each position at prediction depth `depth` (0: the next token).

  Position i predicts token i + depth + 1. Its weight is 0 where that token does not exist, is
  masked, is padding or lies in another segment than token i.

  Args:
    batch: "tokens" int32 [B, T + 1], optionally "segments" int32, "mask" and "valid" of the same
      shape.
    depth: 0 for the main model, k for MTP depth k.

  Returns:
    int32 [B, T] and fp32 [B, T].
  """
  tokens_BS = batch["tokens"]
  T, ahead = tokens_BS.shape[1] - 1, depth + 1
  exists_T = jnp.arange(T) + ahead <= T
  weight_BT = shift(not_padding(batch), ahead)[:, :T] * exists_T
  if "mask" in batch:
    weight_BT *= shift(batch["mask"], ahead)[:, :T].astype(jnp.float32)
  if "segments" in batch:
    segments_BS = batch["segments"]
    same = shift(segments_BS, ahead)[:, :T] == segments_BS[:, :T]
    weight_BT *= same
  return shift(tokens_BS, ahead)[:, :T], weight_BT


def target_tokens(batch: dict[str, jax.Array]) -> jax.Array:
  """Number of main targets in a batch, fp32 scalar: the denominator of `loss_fn`."""
  return targets(batch, 0)[1].sum()


def vocabulary_axes(runtime: config.Runtime, axes: tuple[str, ...]) -> tuple[str, ...]:
  """The mesh axes that cut the vocabulary, of those that shard the batch."""
  return tuple(a for a in mesh_lib.EXPERTS if a in axes) if runtime.shard_vocab else ()


def with_balance(total: jax.Array, stats: MoEStats | None, experts: int, loss: config.Loss,
                 share: jax.Array | float) -> tuple[jax.Array, dict[str, jax.Array]]:
  """A loss with the balance losses added, and the metrics of `loss_fn` that are of routing.

  Args:
    total: the loss without them.
    stats: of `Transformer.hidden`, over all MoE layers; None where there is none.
    experts: E.
    loss, share: of `loss_fn`.
  """
  balances = dict.fromkeys(BALANCES, jnp.zeros(()))
  if stats is None:
    return total, {"counts_LE": jnp.zeros((0, experts)), "dropped": jnp.zeros(()), **balances}
  for name, kind in BALANCES.items():
    balances[name] = getattr(stats, kind).sum() * share
    total += getattr(loss, kind) * balances[name]
  return total, {"counts_LE": stats.counts_E, "dropped": stats.dropped.sum(), **balances}


def loss_fn(model: Transformer, batch: dict[str, jax.Array], *, loss: config.Loss,
            mtp_weight: jax.Array | float, runtime: config.Runtime,
            denominator: jax.Array | float, share: jax.Array | float = 1.0,
            axes: tuple[str, ...] = ()) -> tuple[jax.Array, dict[str, jax.Array]]:
  """This micro-batch's part of the batch's loss.

  Args:
    model: differentiate with respect to its `nnx.Param` variables.
    batch: see `targets`; whole sequences, also where `axes` cut them.
    loss: weights of the balance losses.
    mtp_weight: lambda.
    runtime: dtypes and implementations.
    denominator: main targets of the global batch.
    share: this micro-batch's share of the global batch's sequences, divided by the parts of each.
    axes: mesh axes that shard the batch, or the sequences (see `Transformer.hidden`).

  Returns:
    fp32 scalar, and additive fp32 metrics: loss_sum, mtp_loss_sum [K], tokens, mtp_tokens [K],
    correct, counts_LE, dropped (token-expert pairs), and the balance losses, unweighted, times
    share, 0 where their weight is: balance (sequence-wise), batch_balance, expert_balance.
  """
  K = model.cfg.mtp_depth
  tokens_BS = batch["tokens"]
  T = tokens_BS.shape[1] - 1
  segments_BT = batch["segments"][:, :T] if "segments" in batch else None
  valid_BT = not_padding(batch)[:, :T]
  predicted = [targets(batch, k) for k in range(K + 1)]
  # Statistics of an MTP depth count the positions whose target exists, masked or not.
  unmasked = {name: x for name, x in batch.items() if name != "mask"}
  mtp_valid = [targets(unmasked, k)[1] for k in range(1, K + 1)]

  words, read, ahead_KBTD = vocabulary_axes(runtime, axes), tokens_BS, None
  context = context_lib.cut(T, axes)
  if context is not None:  # targets and MTP's inputs may be tokens of others: shift, then cut
    read = jnp.stack([shift(tokens_BS, k)[:, :T] for k in range(K + 1)])
    read, valid_BT, predicted, mtp_valid = (
        context.own(read, 2), *jax.tree.map(context.own, (valid_BT, predicted, mtp_valid)))
  embedded = model.embed(read, runtime, words)
  if context is not None:
    embedded, ahead_KBTD = embedded[0], embedded[1:]
  hidden = model.hidden(
      embedded, length=T, segments_BT=segments_BT, valid_BT=valid_BT,
      mtp_valid_KBT=jnp.stack(mtp_valid) if K else None, balance=loss, axes=axes, runtime=runtime,
      ahead_KBTD=ahead_KBTD)
  head_DV = model.head_DV[...].astype(hidden.h_BTD.dtype)
  sums, corrects = [], []
  for h_BTD, (target_BT, weight_BT) in zip((hidden.h_BTD, *hidden.mtp), predicted, strict=True):
    with jax.named_scope("head_loss"):
      nll, correct = cross_entropy.linear_cross_entropy(
          h_BTD.reshape(-1, h_BTD.shape[-1]), head_DV, target_BT.reshape(-1),
          weight_BT.reshape(-1), runtime.head_chunk, words)
    sums.append(nll)
    corrects.append(correct)

  total = sums[0] / denominator
  if K:
    total += mtp_weight / K * sum(sums[1:]) / denominator
  total, routed = with_balance(total, hidden.stats, model.cfg.moe.experts, loss, share)
  return total, jax.lax.stop_gradient({
      "loss_sum": sums[0], "mtp_loss_sum": jnp.stack(sums[1:]) if K else jnp.zeros((0,)),
      "tokens": predicted[0][1].sum(),
      "mtp_tokens": jnp.stack([w.sum() for _, w in predicted[1:]]) if K else jnp.zeros((0,)),
      "correct": corrects[0], **routed})
