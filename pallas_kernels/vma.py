"""Loop carries under `shard_map`: make a fresh array vary over the same mesh axes as others."""

import jax
import jax.numpy as jnp


def zeros(shape, dtype, *like: jax.Array) -> jax.Array:
  """Zeros whose varying mesh axes are the union of those of `like`; plain zeros elsewhere.

  `shard_map(check_vma=True)` wants a loop's carry to have one type throughout; an accumulator that
  will hold values computed from `like` therefore has to start out varying as they do.
  """
  return match(jnp.zeros(shape, dtype), *like)


def match(x: jax.Array, *like: jax.Array) -> jax.Array:
  """`x` made varying over every mesh axis that one of `like` varies over."""
  missing = tuple(sorted(frozenset().union(*map(_axes, like)) - _axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def _axes(x: jax.Array) -> frozenset[str]:
  """Mesh axes that `x` varies over; jax moved the attribute between releases."""
  aval = jax.typeof(x)
  return frozenset(aval.vma if hasattr(aval, "vma") else aval.mat.varying)
