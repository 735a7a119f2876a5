"""Turn after turn until every (token, expert) pair has been served, however small the buffers.

The first turn is ordinary code: XLA overlaps it and autodiff keeps its residuals. The rest stands
in a loop whose number of trips all devices of the expert axes agree on, zero as a rule. A
`while_loop` has no reverse derivative, and turns kept for one would need the memory that bounded
buffers save; so its backward pass is the same loop, where each turn runs forward once more and then
back.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.parallel import buffers, dispatch, hops, sharding

Body = Callable[[Any, jax.Array, dispatch.Route], jax.Array]


def run(body: Body, operands: Any, expert_PA: jax.Array, gate_PA: jax.Array, experts: int,
        block: int, settings: buffers.Settings) -> tuple[jax.Array, jax.Array]:
  """Sum over turns of `body(operands, gate_ZK, route)`.

  Args:
    body: pure; linear in what travels, so that the sum over turns is the whole; gives [P, D]. It
      may close over static values only.
    operands: tree of arrays; those of fp32 and bf16 are differentiated.
    expert_PA, gate_PA, experts, block, settings: see `dispatch.route`.

  Returns:
    [P, D]; and the pairs that this device dropped, int32 (0 unless overflow="drop").
  """
  leaves, treedef = jax.tree.flatten(operands)
  axes = set(settings.axes).union(*map(sharding.varies, [expert_PA, gate_PA, *leaves]))
  # All vary over the same axes: a sum over devices, in one loop's derivative and not in another's,
  # would wait for ever.
  leaves, expert_PA, gate_PA = sharding.varying((leaves, expert_PA, gate_PA), tuple(sorted(axes)))
  moving = tuple(x.dtype in (jnp.float32, jnp.bfloat16) for x in leaves)
  smooth, fixed = _part(leaves, moving)

  def turn(smooth, gate_PA, fixed, expert_PA, at):
    route, needed, left = dispatch.route(expert_PA, gate_PA, experts, block, settings, at)
    values = jax.tree.unflatten(treedef, _join(smooth, fixed, moving))
    return body(values, dispatch.gates(gate_PA, route), route), needed, left

  y_PD, needed, left = turn(smooth, gate_PA, fixed, expert_PA, None)
  sizes = tuple(lax.axis_size(axis) for axis in settings.axes)
  local = experts // hops.size(settings.axes)
  enough = buffers.room(*expert_PA.shape, local, sizes, settings).complete
  if enough or settings.overflow == "drop":
    return y_PD, left
  return y_PD + _rest(turn, smooth, gate_PA, fixed, expert_PA, needed), jnp.zeros_like(left)


def _part(leaves, moving):
  return (tuple(x for x, m in zip(leaves, moving, strict=True) if m),
          tuple(x for x, m in zip(leaves, moving, strict=True) if not m))


def _join(smooth, fixed, moving):
  smooth, fixed = iter(smooth), iter(fixed)
  return [next(smooth) if m else next(fixed) for m in moving]


def _advance(at: jax.Array, needed: jax.Array) -> jax.Array:
  """The next turn: the last number counts up to what is needed, then the one before it."""
  digits = list(at)
  carry = jnp.ones((), jnp.int32)
  for i in range(len(digits) - 1, 0, -1):
    digits[i] = digits[i] + carry
    carry = (digits[i] >= needed[i]).astype(jnp.int32)
    digits[i] = jnp.where(carry == 1, 0, digits[i])
  return jnp.stack([digits[0] + carry, *digits[1:]])


def _loop(step, needed, start):
  """Folds `step(at, total) -> (total, needed)` over all turns but the first."""
  def body(carry):
    at, total = carry
    total, needed = step(at, total)
    return _advance(at, needed), total

  first = _advance(jnp.zeros_like(needed), needed)
  return lax.while_loop(lambda carry: carry[0][0] < needed[0], body, (first, start))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rest(turn, smooth, gate_PA, fixed, expert_PA, needed):
  def step(at, total):
    y_PD, needed, _ = turn(smooth, gate_PA, fixed, expert_PA, at)
    return total + y_PD, needed

  like = jax.eval_shape(lambda: turn(smooth, gate_PA, fixed, expert_PA, jnp.zeros_like(needed))[0])
  return _loop(step, needed, _zeros(like, expert_PA))


def _rest_fwd(turn, smooth, gate_PA, fixed, expert_PA, needed):
  inputs = (smooth, gate_PA, fixed, expert_PA, needed)
  return _rest(turn, *inputs), inputs


def _rest_bwd(turn, inputs, dy_PD):
  smooth, gate_PA, fixed, expert_PA, needed = inputs

  def step(at, total):
    def forward(smooth, gate_PA):
      y_PD, needed, _ = turn(smooth, gate_PA, fixed, expert_PA, at)
      return y_PD, needed

    _, pull, needed = jax.vjp(forward, smooth, gate_PA, has_aux=True)
    return jax.tree.map(jnp.add, total, pull(dy_PD)), needed

  grads = _loop(step, needed, _zeros((smooth, gate_PA), expert_PA))
  return *grads, tuple(None for _ in fixed), None, None


_rest.defvjp(_rest_fwd, _rest_bwd)


def _zeros(tree, like):
  """Zeros to start a sum with, varying as `like` does."""
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)
  return sharding.varying(zeros, tuple(sorted(sharding.varies(like))))
