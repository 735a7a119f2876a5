"""Cross-entropy of a linear head without keeping the logits.

The loss is a sum, so its gradient is known as soon as the softmax is: the forward pass under
differentiation also forms the gradients of one chunk of tokens while its logits exist, and the
backward pass only multiplies by the incoming scalar. No logit is stored or computed twice, and the
memory is `chunk * V` whatever the number of tokens.

The head may be cut over mesh axes by words (`axes`): as much work, a part of the memory.
"""

import functools

import jax
import jax.numpy as jnp

from dsv3_jax import ops


def _split(x: jax.Array, chunk: int) -> jax.Array:
  """[P, ...] as [chunks, chunk, ...], zero-padded."""
  pad = -x.shape[0] % chunk
  x = jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1))
  return x.reshape(-1, chunk, *x.shape[1:])


def _chunk_loss(h_cD, w_DV, target_c, weight_c, axes):
  """Loss and correct predictions of a chunk, d loss / d logits [c, V] fp32, and h for dw.

  With `axes`, c of the last two are the chunks of all devices and V is this device's words.
  """
  c = h_cD.shape[0]
  if axes:
    h_cD, target_c, weight_c = (jax.lax.all_gather(x, axes, tiled=True)
                                for x in (h_cD, target_c, weight_c))
    target_c = target_c - jax.lax.axis_index(axes) * w_DV.shape[1]
  logits_cV = jnp.dot(h_cD, w_DV, preferred_element_type=jnp.float32)
  top_c = logits_cV.max(-1)
  top_c = jax.lax.pmax(top_c, axes) if axes else top_c
  exp_cV = jnp.exp(logits_cV - top_c[:, None])
  sum_c = exp_cV.sum(-1)
  # Targets that are other devices' words pick 0.
  picked_c = jnp.take_along_axis(logits_cV, target_c[:, None], axis=1, mode=_mode(axes),
                                 fill_value=0)[:, 0]
  if axes:
    picked_c = jnp.where(target_c >= 0, picked_c, 0)  # below 0 counts from the end
    sum_c, picked_c = jax.lax.psum((sum_c, picked_c), axes)
  nll_c = weight_c * (top_c + jnp.log(sum_c) - picked_c)
  right_c = weight_c * (picked_c >= top_c)
  if axes:
    mine = jax.lax.axis_index(axes) * c
    nll_c, right_c = (jax.lax.dynamic_slice_in_dim(x, mine, c) for x in (nll_c, right_c))
  is_target = jnp.arange(w_DV.shape[1], dtype=jnp.int32) == target_c[:, None]
  dlogits_cV = exp_cV * (weight_c / sum_c)[:, None] - jnp.where(is_target, weight_c[:, None], 0)
  return nll_c.sum(), right_c.sum(), dlogits_cV, h_cD


def _mode(axes):
  return "fill" if axes else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def linear_cross_entropy(h_PD: jax.Array, w_DV: jax.Array, target_P: jax.Array,
                         weight_P: jax.Array, chunk: int, axes: tuple[str, ...] = ()
                         ) -> tuple[jax.Array, jax.Array]:
  """Weighted sum of `-log softmax(h w)[target]`, and of correct top-1 predictions.

  Args:
    h_PD: representations.
    w_DV: head, in the dtype of `h_PD`.
    target_P: int32 in [0, V) of the whole vocabulary.
    weight_P: fp32; 0 leaves a token out. Not differentiated.
    chunk: tokens whose logits exist at once.
    axes: mesh axes that cut the vocabulary, inside shard_map: `w_DV` holds this device's words.
      The devices along them bring tokens of their own and as many each; representations travel, a
      chunk at a time. What the loss is multiplied by must be alike on all of them, since the
      gradient of `w_DV` is that of all their tokens.

  Returns:
    Two fp32 scalars, of this device's tokens; only the first has a gradient.
  """
  def body(carry, x):
    loss, correct, *_ = _chunk_loss(x[0], w_DV, x[1], x[2], axes)
    return (carry[0] + loss, carry[1] + correct), None

  parts = tuple(_split(x, min(chunk, h_PD.shape[0])) for x in (h_PD, target_P, weight_P))
  zero = ops.varying_zeros((), jnp.float32, h_PD, w_DV, target_P, weight_P)
  return jax.lax.scan(body, (zero, zero), parts)[0]


def _fwd(h_PD, w_DV, target_P, weight_P, chunk, axes):
  def body(carry, x):
    loss, correct, dw_DV = carry
    h_cD, target_c, weight_c = x
    loss_c, correct_c, dlogits_cV, h_all_cD = _chunk_loss(h_cD, w_DV, target_c, weight_c, axes)
    dlogits_cV = dlogits_cV.astype(h_cD.dtype)
    if axes:  # partial sums over the words, added up in fp32
      dh_cD = jnp.einsum("cv,dv->cd", dlogits_cV, w_DV, preferred_element_type=jnp.float32)
      dh_cD = jax.lax.psum_scatter(dh_cD, axes, scatter_dimension=0, tiled=True)
      dh_cD = dh_cD.astype(h_cD.dtype)
    else:
      dh_cD = jnp.einsum("cv,dv->cd", dlogits_cV, w_DV)
    dw = jnp.dot(h_all_cD.T, dlogits_cV, preferred_element_type=jnp.float32)
    return (loss + loss_c, correct + correct_c, dw_DV + dw), dh_cD

  parts = tuple(_split(x, min(chunk, h_PD.shape[0])) for x in (h_PD, target_P, weight_P))
  like = (h_PD, w_DV, target_P, weight_P)
  start = (ops.varying_zeros((), jnp.float32, *like), ops.varying_zeros((), jnp.float32, *like),
           ops.varying_zeros(w_DV.shape, jnp.float32, *like))
  (loss, correct, dw_DV), dh = jax.lax.scan(body, start, parts)
  dh_PD = dh.reshape(-1, h_PD.shape[1])[:h_PD.shape[0]]
  return (loss, correct), (dh_PD, dw_DV.astype(w_DV.dtype))


def _bwd(chunk, axes, residuals, cotangents):
  del chunk, axes
  dh_PD, dw_DV = residuals
  g = cotangents[0]
  return dh_PD * g.astype(dh_PD.dtype), dw_DV * g.astype(dw_DV.dtype), None, None


linear_cross_entropy.defvjp(_fwd, _bwd)
