"""A model's parameters and buffers by their attribute paths."""

import os
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from dsv3_jax import config
from dsv3_jax.interop import names
from dsv3_jax.model.transformer import Transformer

PathLike = str | os.PathLike


def abstract(cfg: config.Model, dtype: Any) -> tuple[nnx.GraphDef, nnx.State]:
  """Graph and shapes of the model; nothing is allocated."""
  shape = nnx.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0), dtype=dtype))
  return nnx.split(shape)


def flat(state: nnx.State) -> dict[names.Path, Any]:
  """Parameters and buffers by attribute path."""
  return traverse_util.flatten_dict(nnx.to_pure_dict(state))


def param_dtype(dtype: Any) -> np.dtype:
  """A dtype that parameters may have, by name or object; ValueError lists them."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
    raise ValueError(f"dtype={dtype!r} must be float32, bfloat16 or float16")
  return found
