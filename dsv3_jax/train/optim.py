"""AdamW of the report's section 4.2 as an optax chain, with both moments' dtypes selectable.

optax's `mu_dtype` covers the first moment alone; `scale_by_adam` here stores either in bfloat16
(report 3.3.3 keeps both so) or, for study, in block-wise FP8 (`fp8.moments`). The arithmetic is
float32 whatever the storage: the moment that divides is the one before rounding. Storing rounds to
nearest even, in FP8 stochastically.

The chain takes the learning rate, the gradient norm and whether the step is good as extra arguments
of `update`: the step has computed the norm already, and a learning rate that is an argument never
retraces. Nothing
here reads an array twice that XLA could not fuse into one pass.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config
from dsv3_jax.fp8 import moments
from dsv3_jax.fp8.qtensor import QTensor


class AdamState(NamedTuple):
  count: jax.Array  # int32, updates applied
  mu: Any  # first moment, the tree of the parameters, in mu_dtype (a QTensor a leaf for float8)
  nu: Any  # second moment, in nu_dtype; float8 holds its square root


def scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: Any = jnp.float32,
                  nu_dtype: Any = jnp.float32) -> optax.GradientTransformationExtraArgs:
  """Adam (arXiv 1412.6980) with float32 arithmetic and moments stored in the given dtypes.

  `update(..., good=)` keeps the moments where `good` is False. The choice is made before the update
  reads them: a later one would keep both versions alive and XLA would copy the donated moments
  (measured: 81 MiB a step at 10M parameters, 9 % of the step).

  Args:
    b1, b2, eps: Adam's.
    mu_dtype, nu_dtype: of the stored moments; "float8" is block-wise (see `fp8.moments`).
  """

  def init(params):
    def zeros(dtype):
      if dtype == moments.NAME:
        return jax.tree.map(lambda p: moments.zeros(p.shape), params)
      return jax.tree.map(lambda p: jnp.zeros(p.shape, dtype), params)

    return AdamState(jnp.zeros([], jnp.int32), zeros(mu_dtype), zeros(nu_dtype))

  def update(grads, state, params=None, *, good=True, **extra):
    del params, extra
    f32 = jnp.float32

    def blend(beta, moment, old, new):
      old = moments.load(old, root=moment == 1) if isinstance(old, QTensor) else old.astype(f32)
      return jnp.where(good, beta * old + (1 - beta) * new, old)

    count = state.count + jnp.asarray(good, jnp.int32)
    mu = jax.tree.map(lambda g, m: blend(b1, 0, m, g), grads, state.mu)
    nu = jax.tree.map(lambda g, v: blend(b2, 1, v, g * g), grads, state.nu)
    scale_m = 1 / (1 - jnp.power(f32(b1), count))
    scale_v = 1 / (1 - jnp.power(f32(b2), count))
    updates = jax.tree.map(lambda m, v: (m * scale_m) / (jnp.sqrt(v * scale_v) + eps), mu, nu)
    mu, nu = _store(mu, mu_dtype, 0, count), _store(nu, nu_dtype, 1, count)
    if moments.NAME in (mu_dtype, nu_dtype):  # quantized again, one code in a million would change
      mu, nu = jax.tree.map(lambda n, o: jnp.where(good, n, o), (mu, nu), (state.mu, state.nu))
    return updates, AdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(init, update)


def _store(tree: Any, dtype: Any, moment: int, count: jax.Array) -> Any:
  """fp32 moments (0: first, 1: second) as they are kept."""
  if dtype != moments.NAME:
    return jax.tree.map(lambda x: x.astype(dtype), tree)
  leaves, structure = jax.tree.flatten(tree)
  # The generator that XLA brings: threefry would take longer than all the rest of the optimizer.
  key = jax.random.fold_in(jax.random.key(moment, impl="unsafe_rbg"), count)
  keys = jax.random.split(key, len(leaves))
  return jax.tree.unflatten(structure, [moments.store(x, key, root=moment == 1)
                                        for x, key in zip(leaves, keys, strict=True)])


def clip_by_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
  """Global-norm clipping by the `grad_norm` given to `update`."""

  def update(grads, state, params=None, *, grad_norm, **extra):
    del params, extra
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(grad_norm, 1e-30))
    return jax.tree.map(lambda g: g * factor, grads), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_by_lr() -> optax.GradientTransformationExtraArgs:
  """Multiplies by minus the `lr` given to `update`."""

  def update(updates, state, params=None, *, lr, **extra):
    del params, extra
    return jax.tree.map(lambda u: -lr * u, updates), state

  return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _is_vector(path) -> bool:
  """Whether a parameter is a gain vector: one shape letter after its last underscore.

  Stacking gives a vector a leading layer axis, so the rank does not tell; the name does.
  """
  return len(str(getattr(path[-1], "key", path[-1])).rpartition("_")[2]) == 1


def decay_mask(params: Any) -> Any:
  """True for the parameters that decay: all but the norm gains."""
  return jax.tree_util.tree_map_with_path(lambda path, _: not _is_vector(path), params)


def make_optimizer(optim: config.Optim) -> optax.GradientTransformationExtraArgs:
  """The chain; `update(grads, state, params, grad_norm=, lr=, good=)` gives additive updates."""
  steps = [clip_by_norm(optim.clip_norm)] if optim.clip_norm else []
  steps.append(scale_by_adam(optim.beta1, optim.beta2, optim.eps, optim.mu_dtype,
                             optim.nu_dtype))
  if optim.weight_decay:
    mask = None if optim.decay_vectors else decay_mask
    steps.append(optax.add_decayed_weights(optim.weight_decay, mask))
  return optax.with_extra_args_support(optax.chain(*steps, scale_by_lr()))
