"""Distillation of an expert's probabilities: what is kept of them, and the loss.

An expert's distribution q over the next token is kept as its k most likely tokens with their
log-probabilities, and what all others have together. With i over these k tokens and r for the rest,

    KL(q || p) = sum_i q_i (log q_i - log p_i) + q_r (log q_r - log p_r),

where the student's p_r is the probability that it gives to all tokens but these k. That is the
divergence of two distributions over k + 1 outcomes: never negative, 0 where the student gives these
tokens what the expert does, never above the divergence over all V tokens, and equal to it at k = V.
Why not cross-entropy against the k probabilities, renormalised: its least is at a student that
gives the rest nothing, and so teaches it to be surer than the expert; here the rest is one more
outcome, of which only the division is left to the student.

A token's loss is alpha * -log p(token) + (1 - alpha) * KL. Tokens without an expert (what is mixed
in, original answers) have -log p(token) alone.

q is conditioned on what the expert was asked, which may have the request for reflection where the
student's question has none: the student learns to do unasked what the expert does when asked.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.model import cross_entropy
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model.transformer import Hidden, Transformer
from dsv3_jax.train import state as state_lib

ARRAYS = ("top", "top_logprob", "rest_logprob", "taught")  # of a batch, beside tokens


def _split(x: jax.Array, chunk: int) -> jax.Array:
  """[P, ...] as [chunks, chunk, ...], zero-padded."""
  x = jnp.pad(x, [(0, -x.shape[0] % chunk)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, chunk, *x.shape[1:])


def _apart(log_cV: jax.Array, top_cA: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-probabilities of some tokens [c, k] and of all others together [c]; -inf if k = V."""
  top_logprob_cA = jnp.take_along_axis(log_cV, top_cA, axis=1)
  if top_cA.shape[1] == log_cV.shape[1]:
    return top_logprob_cA, jnp.full(log_cV.shape[:1], -jnp.inf)
  # Summed, not 1 - the others: that would round to 0, or below, where they have nearly all.
  rows = jnp.arange(log_cV.shape[0])[:, None]
  return top_logprob_cA, jax.nn.logsumexp(log_cV.at[rows, top_cA].set(-jnp.inf), axis=1)


def most_likely(h_PD: jax.Array, head_DV: jax.Array, count: int, chunk: int
                ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The `count` likeliest tokens int32 [P, k], their log-probabilities [P, k], the rest's [P].

  Args:
    h_PD: representations after the final norm.
    head_DV: head, in their dtype.
    count: k.
    chunk: tokens whose logits exist at once.
  """
  P = h_PD.shape[0]

  def one(h_cD):
    logits_cV = jnp.dot(h_cD, head_DV, preferred_element_type=jnp.float32)
    log_cV = jax.nn.log_softmax(logits_cV, axis=-1)
    top_cA = jax.lax.top_k(log_cV, count)[1].astype(jnp.int32)
    return top_cA, *_apart(log_cV, top_cA)

  found = jax.lax.map(one, _split(h_PD, min(chunk, P)))
  return tuple(x.reshape(-1, *x.shape[2:])[:P] for x in found)


def token_losses(h_PD: jax.Array, head_DV: jax.Array, target_P: jax.Array, top_PA: jax.Array,
                 top_logprob_PA: jax.Array, rest_logprob_P: jax.Array, chunk: int
                 ) -> tuple[jax.Array, jax.Array, jax.Array]:
  """-log p(target), KL(q || p) in nats, and whether the target is the likeliest; fp32 [P] each.

  Args:
    h_PD, head_DV, chunk: of the student, as of `most_likely`; logits are computed again in the
      backward pass, a chunk at a time.
    target_P: int32.
    top_PA, top_logprob_PA, rest_logprob_P: q, normalised; a rest of -inf counts nothing.
  """
  P = h_PD.shape[0]

  @jax.checkpoint
  def one(x):
    h_cD, target_c, top_cA, q_cA, rest_c = x
    logits_cV = jnp.dot(h_cD, head_DV, preferred_element_type=jnp.float32)
    log_cV = jax.nn.log_softmax(logits_cV, axis=-1)
    nll_c = -jnp.take_along_axis(log_cV, target_c[:, None], axis=1)[:, 0]
    p_cA, p_rest_c = _apart(log_cV, top_cA)
    kl_c = jnp.sum(jnp.exp(q_cA) * (q_cA - p_cA), axis=1)
    if top_cA.shape[1] < log_cV.shape[1]:
      there_c = rest_c > -jnp.inf
      gap_c = jnp.where(there_c, rest_c, 0) - jnp.where(there_c, p_rest_c, 0)
      kl_c += jnp.exp(rest_c) * gap_c
    return nll_c, kl_c, (log_cV.max(1) <= -nll_c).astype(jnp.float32)

  parts = tuple(_split(x, min(chunk, P)) for x in (
      h_PD, target_P, top_PA, top_logprob_PA, rest_logprob_P))
  return tuple(x.reshape(-1)[:P] for x in jax.lax.map(one, parts))


def _hidden(model: Transformer, batch: dict[str, jax.Array], runtime: config.Runtime,
            balance: config.Loss | None = None, axes: tuple[str, ...] = ()) -> Hidden:
  K, T = model.cfg.mtp_depth, batch["tokens"].shape[1] - 1
  unmasked = {name: batch[name] for name in ("tokens", "segments")}
  mtp_valid = [loss_lib.targets(unmasked, k)[1] for k in range(1, K + 1)]
  return model.hidden(
      model.embed(batch["tokens"], runtime), length=T, segments_BT=batch["segments"][:, :T],
      valid_BT=loss_lib.not_padding(batch)[:, :T],
      mtp_valid_KBT=jnp.stack(mtp_valid) if K else None, balance=balance, axes=axes,
      runtime=runtime)


def teacher(cfg: config.Model, runtime: config.Runtime, count: int) -> Callable:
  """(params, buffers, {"tokens", "segments"} [B, T + 1]) -> `most_likely` at each place, [B, T, .].

  The place is the one before the token that is predicted.
  """
  graphdef = state_lib.split(nnx.eval_shape(lambda: state_lib.build_model(cfg, 0)))[0]

  @jax.jit
  def run(params, buffers, batch):
    model = nnx.merge(graphdef, params, buffers)
    h_BTD = _hidden(model, batch, runtime).h_BTD
    B, T, D = h_BTD.shape
    found = most_likely(h_BTD.reshape(B * T, D), model.head_DV[...].astype(h_BTD.dtype), count,
                        runtime.head_chunk)
    return tuple(x.reshape(B, T, *x.shape[1:]) for x in found)

  return run


def loss_fn(model: Transformer, batch: dict[str, jax.Array], *, cfg: config.Distill,
            loss: config.Loss, mtp_weight: jax.Array | float, runtime: config.Runtime,
            denominator: jax.Array | float, share: jax.Array | float = 1.0,
            axes: tuple[str, ...] = ()) -> tuple[jax.Array, dict[str, jax.Array]]:
  """In place of `model.loss.loss_fn`, with that one's arguments and metrics.

  MTP modules learn the words, as there.

  Args:
    batch: also "top" int32 and "top_logprob" [B, T + 1, k], "rest_logprob" and "taught" (int8,
      whether there is an expert's distribution) [B, T + 1], each at the place of its token.
    cfg: alpha.
    model, loss, mtp_weight, runtime, denominator, share, axes: see there.

  Returns:
    Scalar and metrics as there; "loss_sum" is the words' cross-entropy, and "more" has "kl_expert":
    the divergence, as a mean over all targets, 0 for those without an expert.
  """
  K = model.cfg.mtp_depth
  hidden = _hidden(model, batch, runtime, loss, axes)
  head_DV = model.head_DV[...].astype(hidden.h_BTD.dtype)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  at = lambda name: flat(batch[name][:, 1:])
  predicted = [tuple(map(flat, loss_lib.targets(batch, k))) for k in range(K + 1)]
  target_P, weight_P = predicted[0]
  nll_P, kl_P, right_P = token_losses(
      flat(hidden.h_BTD), head_DV, target_P, at("top"), at("top_logprob"), at("rest_logprob"),
      runtime.head_chunk)
  taught_P = at("taught") > 0
  kl_P = jnp.where(taught_P, kl_P, 0)
  each_P = jnp.where(taught_P, cfg.alpha * nll_P + (1 - cfg.alpha) * kl_P, nll_P)
  total = jnp.sum(weight_P * each_P) / denominator
  mtp = [cross_entropy.linear_cross_entropy(flat(h_BTD), head_DV, *of, runtime.head_chunk)[0]
         for h_BTD, of in zip(hidden.mtp, predicted[1:], strict=True)]
  if K:
    total += mtp_weight / K * sum(mtp) / denominator
  total, routed = loss_lib.with_balance(total, hidden.stats, model.cfg.moe.experts, loss, share)
  return total, jax.lax.stop_gradient({
      "loss_sum": jnp.sum(weight_P * nll_P), "mtp_loss_sum": jnp.stack(mtp) if K else jnp.zeros(0),
      "tokens": weight_P.sum(),
      "mtp_tokens": jnp.stack([w.sum() for _, w in predicted[1:]]) if K else jnp.zeros(0),
      "correct": jnp.sum(weight_P * right_P),
      "more": {"kl_expert": jnp.sum(weight_P * kl_P) / denominator}, **routed})


def narrowed(top_NA: np.ndarray, top_logprob_NA: np.ndarray, rest_logprob_N: np.ndarray
             ) -> dict[str, np.ndarray]:
  """As it is kept on a disk: indices uint16 where they fit, log-probabilities fp16."""
  small = top_NA.max(initial=0) < 2**16
  logprob_NO = np.concatenate([top_logprob_NA, rest_logprob_N[:, None]], axis=1)
  return {"top": top_NA.astype(np.uint16 if small else np.int32),
          "logprob": logprob_NO.astype(np.float16)}


def widened(kept: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Inverse of `narrowed`, normalised again."""
  log_NO = kept["logprob"].astype(np.float32)
  log_NO = log_NO - np.log(np.exp(log_NO).sum(1, keepdims=True))
  return kept["top"].astype(np.int32), log_NO[:, :-1], log_NO[:, -1]
