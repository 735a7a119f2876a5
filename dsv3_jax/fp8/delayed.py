"""Delayed scaling: the amax of each tensor over the last steps, as explicit state.

A recipe with delayed operands keeps, for each linear layer's weight, the largest magnitudes that
its input x and its output's gradient dy had in each of the last `history` optimizer steps. The next
step scales by their maximum without looking at the data (which is the point: no pass over the
tensor before it can be quantized), and what exceeds that saturates.

The state is a tree beside the parameters, part of the training state and of checkpoints; recipes
without delayed operands have None. A step's amaxes come out of the backward pass as the "gradient"
of the amaxes that went in (`linear.gradient`), the only way out of a rematerialised scan that costs
no second pass; micro-batches and shards are combined by their maximum.
"""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.recipe import Recipe


def init(params: Any, recipe: Recipe | None) -> dict[str, Any] | None:
  """The history before the first step, zeros (unknown); None where the recipe keeps none.

  Returns:
    The nested dict of the parameters with linear layers alone: fp32 [..., 2, history], the leading
    axes those of stacked layers (experts share one entry), 2 for x and dy.
  """
  if recipe is None or not recipe.delayed:
    return None

  def visit(tree):
    found = {}
    for name, x in tree.items():
      if isinstance(x, dict):
        below = visit(x)
        found |= {name: below} if below else {}
      elif weights.axes(name) is not None:
        stack = x.shape[:x.ndim - len(name.rpartition("_")[2])]
        found[name] = jnp.zeros((*stack, 2, recipe.history), jnp.float32)
    return found

  return visit(params)


def assumed(history: Any) -> Any:
  """The amaxes to scale by, [..., 2]; 0 where nothing is known yet."""
  return jax.tree.map(lambda x: x.max(-1), history)


def record(history: Any, found: Any) -> Any:
  """The history with a step's amaxes [..., 2] in front, its oldest dropped.

  Amaxes that are no numbers are not recorded: such a step is skipped as a whole.
  """
  def push(old, new):
    new = jnp.where(jnp.isfinite(new), new, old[..., 0])
    return jnp.concatenate([new[..., None], old[..., :-1]], axis=-1)

  return jax.tree.map(push, history, found)
