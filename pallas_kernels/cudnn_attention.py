"""Training attention through cuDNN's fused kernels, which accept key width 192 and value width 128.

The public `jax.nn.dot_product_attention` insists on equal head widths, so this calls the entry
below it, which is private to jax. Every call is guarded: anything unexpected is a
NotImplementedError, and the caller falls back to the XLA form.
"""

import jax
import jax.numpy as jnp


def takes(dtype, segments_BT: jax.Array | None) -> bool:
  """Whether `attention` may take such a call."""
  return (jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)
          and segments_BT is None)


def attention(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHU: jax.Array, *, scale: float,
              segments_BT: jax.Array | None = None) -> jax.Array:
  """Causal attention [B, T, H, U] on a CUDA device.

  Raises:
    NotImplementedError: not a GPU, not a 16-bit dtype, segments given, or this jax has no such
      entry.
  """
  if not takes(q_BTHK.dtype, segments_BT):
    raise NotImplementedError(
        "cuDNN attention needs a CUDA device, 16-bit floats and no segments; given "
        f"{jax.default_backend()}, {q_BTHK.dtype}, segments: {segments_BT is not None}")
  try:
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
  except ImportError as error:
    raise NotImplementedError("this jax has no cuDNN attention") from error
  try:
    return cudnn.dot_product_attention(
        q_BTHK, k_BTHK, v_BTHU, scale=scale, mask_type=cudnn.MaskType.CAUSAL)
  except (TypeError, AttributeError, RuntimeError, ValueError) as error:
    raise NotImplementedError(f"cuDNN attention refused the call: {error}") from error
