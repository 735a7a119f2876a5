"""A score for an answer, and how it is learned: Bradley-Terry (report 5.2; arXiv 2203.02155 eq. 1).

The score is read at an answer's end token, which has seen question and answer: the final hidden
state times one column of the head, that of the padding token. This token is never predicted, so its
column is no word's; in a reward model it is the score's vector, and the model keeps its parameters'
tree: every checkpoint, converter and sampler takes it as any other. Of a better and a worse answer

    loss = -log sigmoid(r_chosen - r_rejected) + centre (r_chosen + r_rejected)^2

where the second term keeps scores around 0, of which the first sees differences alone
(arXiv 2312.09244, appendix A). Beside it may stand the cross-entropy of text: of thoughts, which a
model that reads its score after one must be able to write (arXiv 2408.11791), or of the chosen
answers, so that the model does not forget to write (arXiv 2406.10216).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.infer.generate import rounded
from dsv3_jax.model import cross_entropy
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.posttrain.rewards.models import batches
from dsv3_jax.train import state as state_lib


def read(model: Transformer, h_BTD: jax.Array, pad: int) -> jax.Array:
  """Scores of all places, fp32 [B, T], of representations after the final norm."""
  return h_BTD.astype(jnp.float32) @ model.head_DV[...][:, pad].astype(jnp.float32)


def bradley_terry(score_BT: jax.Array, sign_BT: jax.Array, weight_BT: jax.Array,
                  segments_BT: jax.Array, centre: float
                  ) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of pairs, each in one row.

  Args:
    score_BT: fp32; what is differentiated.
    sign_BT: +1 at the end of a chosen answer, -1 at that of a rejected one, 0 elsewhere.
    weight_BT: fp32, of a pair, where the sign is +1.
    segments_BT: int32; 2k and 2k + 1 are pair k of its row.
    centre: see the module's docstring.

  Returns:
    fp32 scalars, sums over pairs by their weights: the loss, and "preference" (the loss without
    its second term), "pairs" (the weights), "right" (chosen above rejected), "margin",
    "chosen_score", "rejected_score".
  """
  B, T = score_BT.shape
  pair_BT = jnp.clip(segments_BT // 2, 0, T - 1)
  rows = jnp.arange(B)[:, None]
  # Pair k stands at place k of its row.
  of_pairs = lambda x_BT: jnp.zeros_like(score_BT).at[rows, pair_BT].add(x_BT)
  chosen_BT = of_pairs(jnp.where(sign_BT > 0, score_BT, 0))
  rejected_BT = of_pairs(jnp.where(sign_BT < 0, score_BT, 0))
  weight_BT = of_pairs(jnp.where(sign_BT > 0, weight_BT, 0))
  margin_BT = chosen_BT - rejected_BT
  total = lambda x_BT: jnp.sum(weight_BT * x_BT)
  preference = total(jax.nn.softplus(-margin_BT))
  return preference + centre * total((chosen_BT + rejected_BT) ** 2), {
      "preference": preference, "pairs": weight_BT.sum(), "right": total(margin_BT > 0),
      "margin": total(margin_BT), "chosen_score": total(chosen_BT),
      "rejected_score": total(rejected_BT)}


def loss_fn(model: Transformer, batch: dict[str, jax.Array], *, cfg: config.Reward, pad: int,
            loss: config.Loss, mtp_weight: jax.Array | float, runtime: config.Runtime,
            denominator: jax.Array | float, share: jax.Array | float = 1.0,
            axes: tuple[str, ...] = ()) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Bradley-Terry in place of `model.loss.loss_fn`, with that one's arguments and metrics.

  Balance losses stay. MTP modules are not trained.

  Args:
    batch: of `pairs.Pairs`.
    cfg: weights of the parts.
    pad: the token whose column of the head is the score's.
    model, loss, mtp_weight, runtime, denominator, share, axes: see there.

  Returns:
    Scalar and metrics as there, but of pairs in place of tokens: "loss_sum" is the sum of
    -log sigmoid, "tokens" of weights, "correct" of pairs ranked right; "more" has the margin,
    scores, and with cfg.text the text's cross-entropy, nats a token.
  """
  del mtp_weight
  B, T = batch["tokens"].shape[0], batch["tokens"].shape[1] - 1
  K = model.cfg.mtp_depth
  hidden = model.hidden(
      model.embed(batch["tokens"], runtime), length=T, segments_BT=batch["segments"][:, :T],
      valid_BT=loss_lib.not_padding(batch)[:, :T],
      mtp_valid_KBT=jnp.zeros((K, B, T)) if K else None, balance=loss, axes=axes, runtime=runtime)
  at = lambda name: batch[name][:, :T]
  total, found = bradley_terry(read(model, hidden.h_BTD, pad), at("sign"), at("weight"),
                               at("segments"), cfg.centre)
  more = {name: found[name] for name in ("margin", "chosen_score", "rejected_score")}
  if cfg.text:
    target_BT, weight_BT = loss_lib.targets(batch, 0)
    h_PD = hidden.h_BTD.reshape(B * T, -1)
    nll, _ = cross_entropy.linear_cross_entropy(
        h_PD, model.head_DV[...].astype(h_PD.dtype), target_BT.reshape(-1), weight_BT.reshape(-1),
        runtime.head_chunk)
    more["text_loss"] = nll / denominator
    total += cfg.text * more["text_loss"]
  total, routed = loss_lib.with_balance(total, hidden.stats, model.cfg.moe.experts, loss, share)
  return total, jax.lax.stop_gradient({
      "loss_sum": found["preference"], "mtp_loss_sum": jnp.zeros((K,)), "tokens": found["pairs"],
      "mtp_tokens": jnp.zeros((K,)), "correct": found["right"], "more": more,
      **routed})


class Scorer:
  """Scores of token sequences, read at their last tokens.

  Sequences of like length are scored together, in batches of one size and a few lengths, so that
  few programs are compiled.

  Args:
    cfg: the reward model's run; one device computes, in its runtime.compute_dtype.
    params, buffers: of its checkpoint.
    pad: the tokenizer's padding token.
    batch: sequences at a time.
  """

  def __init__(self, cfg: config.Config, params: Any, buffers: Any, pad: int, batch: int = 16):
    self._params, self._buffers, self._pad, self._batch = params, buffers, pad, batch
    graphdef = state_lib.split(nnx.eval_shape(lambda: state_lib.build_model(cfg.model, 0)))[0]
    self._read: Callable = jax.jit(functools.partial(
        _last, graphdef=graphdef, pad=pad,
        runtime=config.Runtime(compute_dtype=cfg.runtime.compute_dtype)))

  def __call__(self, sequences: Sequence[Sequence[int]]) -> list[float]:
    found = [0.0] * len(sequences)
    sizes: dict[int, list[int]] = {}
    for i, sequence in enumerate(sequences):
      sizes.setdefault(rounded(len(sequence)), []).append(i)
    for size, members in sorted(sizes.items()):
      for places in batches([0] * len(members), self._batch):
        rows = [members[k] for k in places]
        tokens_BT = np.full((self._batch, size), self._pad, np.int32)
        last_B = np.zeros(self._batch, np.int32)
        for b, i in enumerate(rows):
          tokens_BT[b, :len(sequences[i])], last_B[b] = sequences[i], len(sequences[i]) - 1
        score_B = np.asarray(self._read(self._params, self._buffers, tokens_BT, last_B))
        for b, i in enumerate(rows):
          found[i] = float(score_B[b])
    return found


def _last(params: Any, buffers: Any, tokens_BT: jax.Array, last_B: jax.Array,
          graphdef: nnx.GraphDef, pad: int, runtime: config.Runtime) -> jax.Array:
  model = nnx.merge(graphdef, params, buffers)
  # Attention is causal: what stands behind the last token is not seen.
  h_BTD = model.hidden(model.embed(tokens_BT, runtime), runtime=runtime).h_BTD
  return jnp.take_along_axis(read(model, h_BTD, pad), last_B[:, None], axis=1)[:, 0]
