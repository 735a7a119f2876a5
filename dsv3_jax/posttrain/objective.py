"""GRPO's objective (report eq. 26-28; arXiv 2402.03300).

For a problem q, outputs o_1 .. o_G are drawn from the policy as it was, and what is maximised is

    J = mean over outputs of [ min(r A, clip(r, 1 - low, 1 + high) A) - beta KL ]

with the ratio r of the probabilities that today's policy and the one that drew give to an output,
the advantage A = (reward - mean of the group) / std of the group, and

    KL = p_ref / p - log(p_ref / p) - 1,

the estimator of the divergence from a reference that is never negative and has the right mean.
There is no critic: the group is the baseline. A group whose rewards are all alike has no advantage.

The report writes r and KL of whole outputs. Everybody computes them token by token, each token of
an output with the output's advantage (DeepSeekMath's eq. 3): a product of hundreds of ratios is
outside any clip after one step. Both are here (`ratio`). What a token weighs comes with the batch
(`groups.weights`), so that sums over micro-batches and devices are the objective of the batch.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model.transformer import Transformer

MORE = ("objective", "kl", "entropy", "clipped_low", "clipped_high", "drift")


def token_logprobs(h_PD: jax.Array, head_DV: jax.Array, target_P: jax.Array, chunk: int,
                   temperature: float = 1.0) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of targets and entropies (nats), fp32 [P] each; the first differentiable.

  Args:
    h_PD: representations after the final norm.
    head_DV: head, in their dtype.
    target_P: int32.
    chunk: tokens whose logits exist at once, in the backward pass too.
    temperature: that tokens are drawn at; logits are divided by it.
  """
  P, D = h_PD.shape
  chunk = min(chunk, P)
  pad = -P % chunk
  h = jnp.pad(h_PD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
  target = jnp.pad(target_P, (0, pad)).reshape(-1, chunk)

  @jax.checkpoint
  def one(x):
    h_cD, target_c = x
    logits_cV = jnp.dot(h_cD, head_DV, preferred_element_type=jnp.float32)
    log_cV = jax.nn.log_softmax(logits_cV / temperature, axis=-1)
    entropy_c = -jnp.sum(jnp.exp(log_cV) * log_cV, axis=-1)
    return (jnp.take_along_axis(log_cV, target_c[:, None], axis=1)[:, 0],
            jax.lax.stop_gradient(entropy_c))

  logprob, entropy = jax.lax.map(one, (h, target))
  return logprob.reshape(-1)[:P], entropy.reshape(-1)[:P]


def grpo(logprob_BT: jax.Array, old_BT: jax.Array, ref_BT: jax.Array, advantage_BT: jax.Array,
         weight_BT: jax.Array, output_BT: jax.Array, cfg: config.GRPO
         ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Minus the objective, and its parts.

  Args:
    logprob_BT: of the tokens under today's policy; what is differentiated.
    old_BT: under the policy that drew them.
    ref_BT: under the reference.
    advantage_BT: of each token's output.
    weight_BT: fp32 of each token in the sum, 0 for what is no output's token.
    output_BT: int32, number of the output in its row; anything where the weight is 0.
    cfg: clipping, KL and ratio.

  Returns:
    fp32 scalars: the loss; and "objective", "kl" (estimate, to the reference), "clipped_low" and
    "clipped_high" (share of the weight whose ratio was cut at 1 - low and 1 + high, and lost its
    gradient), "drift" (mean |log r|).
  """
  step_BT, gap_BT = logprob_BT - old_BT, ref_BT - logprob_BT
  counted_BT = (weight_BT > 0).astype(jnp.float32)
  if cfg.ratio == "sequence":
    whole = functools.partial(_of_outputs, output_BT=output_BT, counted_BT=counted_BT)
    step_BT, gap_BT = whole(step_BT), whole(gap_BT)
  # What is not counted may be anything, also infinite; times 0 that would be nan.
  step_BT, gap_BT = (jnp.where(counted_BT > 0, x, 0) for x in (step_BT, gap_BT))
  ratio_BT = jnp.exp(step_BT)
  cut_BT = jnp.clip(ratio_BT, 1 - cfg.clip_low, 1 + cfg.clip_high)
  gain_BT = jnp.minimum(ratio_BT * advantage_BT, cut_BT * advantage_BT)
  kl_BT = jnp.exp(gap_BT) - gap_BT - 1
  total = lambda x_BT: jnp.sum(weight_BT * x_BT)
  objective = total(gain_BT - cfg.kl * kl_BT)
  low_BT = (ratio_BT < 1 - cfg.clip_low) & (advantage_BT < 0)
  high_BT = (ratio_BT > 1 + cfg.clip_high) & (advantage_BT > 0)
  return -objective, {"objective": objective, "kl": total(kl_BT), "clipped_low": total(low_BT),
                      "clipped_high": total(high_BT), "drift": total(jnp.abs(step_BT))}


def _of_outputs(x_BT: jax.Array, output_BT: jax.Array, counted_BT: jax.Array) -> jax.Array:
  """Each token's output's sum of x over its counted tokens."""
  B, T = x_BT.shape
  output_BT = jnp.clip(output_BT, 0, T - 1)
  rows = jnp.arange(B)[:, None]
  x_BT = jnp.where(counted_BT > 0, x_BT, 0)
  sums_BT = jnp.zeros_like(x_BT).at[rows, output_BT].add(x_BT)
  return jnp.take_along_axis(sums_BT, output_BT, axis=1)


def predicted(model: Transformer, batch: dict[str, jax.Array], cfg: config.GRPO,
              runtime: config.Runtime, balance: config.Loss | None = None,
              axes: tuple[str, ...] = ()) -> tuple[jax.Array, jax.Array, Any]:
  """Log-probabilities of a batch's tokens, each at the place before it: fp32 [B, T].

  Args:
    model: MTP modules have no part.
    batch: "tokens" int32 [B, T + 1] and "segments".
    cfg: its temperature.
    runtime, axes: see `model.loss.loss_fn`.
    balance: balance losses that statistics are wanted for.

  Returns:
    These, entropies [B, T], and the layers' statistics.
  """
  B, T = batch["tokens"].shape[0], batch["tokens"].shape[1] - 1
  K = model.cfg.mtp_depth
  hidden = model.hidden(
      model.embed(batch["tokens"], runtime), length=T, segments_BT=batch["segments"][:, :T],
      valid_BT=loss_lib.not_padding(batch)[:, :T],
      mtp_valid_KBT=jnp.zeros((K, B, T)) if K else None, balance=balance, axes=axes,
      runtime=runtime)
  h_PD = hidden.h_BTD.reshape(B * T, -1)
  logprob_P, entropy_P = token_logprobs(
      h_PD, model.head_DV[...].astype(h_PD.dtype), loss_lib.targets(batch, 0)[0].reshape(-1),
      runtime.head_chunk, cfg.temperature)
  return logprob_P.reshape(B, T), entropy_P.reshape(B, T), hidden.stats


def loss_fn(model: Transformer, batch: dict[str, jax.Array], *, cfg: config.GRPO,
            loss: config.Loss, mtp_weight: jax.Array | float, runtime: config.Runtime,
            denominator: jax.Array | float, share: jax.Array | float = 1.0,
            axes: tuple[str, ...] = ()) -> tuple[jax.Array, dict[str, jax.Array]]:
  """GRPO in place of `model.loss.loss_fn`, with that one's arguments and metrics.

  Balance losses stay. MTP modules are not trained.

  Args:
    batch: of `groups.batch`.
    cfg: of the objective.
    model, loss, mtp_weight, runtime, denominator, share, axes: see there.

  Returns:
    Scalar and metrics as there; "loss_sum" is the drawn tokens' cross-entropy at the temperature,
    and "more" has MORE.
  """
  del mtp_weight, denominator
  logprob_BT, entropy_BT, stats = predicted(model, batch, cfg, runtime, loss, axes)
  weight_BT, at = loss_lib.targets(batch, 0)[1], lambda name: batch[name][:, 1:]
  scale_BT = at("weight") * weight_BT
  total, more = grpo(logprob_BT, at("old"), at("ref"), at("advantage"), scale_BT, at("segments"),
                     cfg)
  more["entropy"] = jnp.sum(scale_BT * entropy_BT)
  total, routed = loss_lib.with_balance(total, stats, model.cfg.moe.experts, loss, share)
  K = model.cfg.mtp_depth
  return total, jax.lax.stop_gradient({
      "loss_sum": -jnp.sum(jnp.where(weight_BT > 0, logprob_BT, 0)),
      "mtp_loss_sum": jnp.zeros((K,)), "tokens": weight_BT.sum(), "mtp_tokens": jnp.zeros((K,)),
      "correct": jnp.zeros(()), "more": more, **routed})
