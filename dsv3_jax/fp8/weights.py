"""Weights with their quantized forms: made once an optimizer step, used by every micro-batch.

`prepare` takes the tree of fp32 masters and puts a `Weight` where a linear layer's matrix was. The
masters stay what is differentiated: a linear layer's backward pass gives its weight gradient to
`Weight.master`, and nothing to the quantized forms. Stacked layers and experts lead with their
axes, so `lax.scan` cuts a `Weight` into those of single layers like any pytree.

The parameter's name says how it multiplies: `w_o_HUD` has two input axes, experts' weights lead
with E, the last letters are outputs. Embedding, head, router and norms are not linear layers of the
recipe and are left alone.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import ops
from dsv3_jax.fp8.formats import E4M3, encode_pow2
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.fp8.quantize import quantize
from dsv3_jax.fp8.recipe import Operand, Recipe

Held = QTensor | jax.Array  # an operand, quantized or not


@functools.partial(jax.tree_util.register_dataclass,
                   data_fields=["master", "fprop", "dgrad", "amax"],
                   meta_fields=["inputs", "outputs"])
@dataclasses.dataclass(frozen=True)
class Weight:
  """One linear layer's weight.

  Attributes:
    master: [..., *inputs, *outputs], where its gradient goes; None where there is none (a model
      loaded to compute from its FP8 weights).
    fprop: [..., prod(inputs), prod(outputs)]; None: quantized from the master where it is used.
    dgrad: [..., prod(outputs), prod(inputs)]; None: the transpose of `fprop`.
    amax: fp32 [..., 2], the largest magnitudes to assume of x and dy (delayed scaling), 0: unknown.
      Its "gradient" is what was found. None where the recipe has no history.
    inputs, outputs: sizes of the axes it contracts and of those it gives.
  """

  master: jax.Array | None
  fprop: Held | None
  dgrad: Held | None
  amax: jax.Array | None
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]

  def __getitem__(self, key) -> "Weight":
    """`[...]`, as nnx variables read their values."""
    if key is not Ellipsis:
      raise IndexError(f"a weight is read whole, with [...], not with [{key}]")
    return self


def hold(x: jax.Array, operand: Operand, floor: float, amax: jax.Array | None = None) -> Held:
  """`x` as the operand says; quantized along its last two axes."""
  if operand.format is not None:
    if amax is None and (is_tiles(operand, 1, 128) or is_tiles(operand, 128, 1)):
      try:
        return from_scaled(ops.fp8_quantize(x, operand.tile, pow2=operand.scale == "pow2",
                                            floor=floor, impl=operand.impl), operand)
      except NotImplementedError:
        pass
    return quantize(x, operand.format, operand.tile, scale=operand.scale, floor=floor, amax=amax)
  if operand.dtype is None or operand.dtype == x.dtype:
    return x
  if operand.dtype == "bfloat16":  # XLA may skip a cast that is cast back later, but not this
    x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return x.astype(operand.dtype)


def is_tiles(operand: Operand, rows: int, columns: int) -> bool:
  """Whether the operand is E4M3 in such tiles, with scales of its own: what kernels quantize."""
  return operand.format is E4M3 and operand.tile == (rows, columns) and not operand.delayed


def from_scaled(x: ops.Scaled, operand: Operand) -> QTensor:
  """What a kernel quantized as `operand` says; powers of two are kept as bytes."""
  scales = encode_pow2(x.scales) if operand.scale == "pow2" else x.scales
  return QTensor(x.codes, scales, E4M3, x.tile, x.codes.shape[-1]).validate()


def quantized(w: Weight, recipe: Recipe, transposed: bool = True) -> Weight:
  """`w` with its quantized forms, made from the master where they are missing."""
  fprop, dgrad = w.fprop, w.dgrad
  if fprop is None:
    lead = w.master.shape[:w.master.ndim - len(w.inputs) - len(w.outputs)]
    matrix = w.master.reshape(*lead, math.prod(w.inputs), math.prod(w.outputs))
    if is_tiles(recipe.fprop_w, 128, 128) and recipe.dgrad_w == recipe.fprop_w:
      try:
        both = ops.fp8_quantize_weight(matrix, pow2=recipe.fprop_w.scale == "pow2",
                                       floor=recipe.floor, impl=recipe.impl)
        return dataclasses.replace(w, **{name: from_scaled(x, recipe.fprop_w) for name, x in
                                         zip(("fprop", "dgrad"), both, strict=True)})
      except NotImplementedError:
        pass
    fprop = hold(matrix, recipe.fprop_w, recipe.floor)
    if recipe.dgrad_w != recipe.fprop_w and transposed:
      dgrad = hold(matrix, recipe.dgrad_w, recipe.floor).mT
  if dgrad is None and transposed:
    dgrad = fprop.mT  # exact: bytes move and blocks turn
  return dataclasses.replace(w, fprop=fprop, dgrad=dgrad)


def axes(name: str) -> tuple[int, int] | None:
  """Numbers of input and output axes of the parameter `name`; None: no linear layer's matrix."""
  letters = name.rpartition("_")[2]
  if not name.startswith("w_") or name.startswith("w_router"):
    return None
  inputs = 2 if name.startswith("w_o_") else 1
  return inputs, len(letters) - letters.startswith("E") - inputs


def bare(master: jax.Array, inputs: int, outputs: int | None = None) -> Weight:
  """A weight without quantized forms; without `outputs` every axis after the inputs is one."""
  outputs = master.ndim - inputs if outputs is None else outputs
  split = master.ndim - outputs
  return Weight(master, None, None, None, master.shape[split - inputs:split], master.shape[split:])


def _name(path: Any) -> str:
  return str(getattr(path[-1], "key", path[-1]))


def prepare(params: Any, recipe: Recipe | None, amax: Any = None) -> Any:
  """The parameter tree with a quantized `Weight` for each matrix of a linear layer.

  Args:
    params: nested dict of masters; leaves that are no such matrix come back as they are.
    recipe: None gives `params` back.
    amax: from `delayed.assumed`; None: no history.
  """
  if recipe is None:
    return params

  def make(path, master):
    found = axes(_name(path))
    if found is None:
      return master
    w = quantized(bare(master, *found), recipe)
    if amax is None:
      return w
    given = functools.reduce(lambda tree, entry: tree[entry.key], path, amax)
    return dataclasses.replace(w, amax=given)

  with jax.named_scope("quantize_weights"):
    return jax.tree_util.tree_map_with_path(make, params)


def with_masters(prepared: Any, params: Any, amax: Any = None) -> Any:
  """`prepared` with other masters (and amaxes): those to differentiate with respect to."""
  is_weight = lambda x: isinstance(x, Weight)

  def put(path, w, master):
    if not is_weight(w):
      return master
    if amax is None:
      return dataclasses.replace(w, master=master)
    given = functools.reduce(lambda tree, entry: tree[entry.key], path, amax)
    return dataclasses.replace(w, master=master, amax=given)

  return jax.tree_util.tree_map_with_path(put, prepared, params, is_leaf=is_weight)


def without_masters(prepared: Any) -> Any:
  """`prepared` without the masters and what is no weight of a recipe; for `with_masters` alone."""
  is_weight = lambda x: isinstance(x, Weight)
  return jax.tree.map(lambda w: dataclasses.replace(w, master=None) if is_weight(w) else
                      jnp.zeros(w.shape[:1]), prepared, is_leaf=is_weight)


def value(held: Held) -> jax.Array:
  """fp32 values of an operand."""
  return held.dequantize() if isinstance(held, QTensor) else held.astype(jnp.float32)


def plain(w: Weight | jax.Array, dtype) -> jax.Array:
  """The weight as an ordinary array, for code outside any recipe."""
  if not isinstance(w, Weight):
    return w.astype(dtype)
  if w.fprop is None:
    return w.master.astype(dtype)
  lead = w.fprop.shape[:-2]
  return value(w.fprop).astype(dtype).reshape(*lead, *w.inputs, *w.outputs)
