"""FP8 numerics of a model: what each recipe would do to each linear layer, on real operands.

    from dsv3_jax.train import numerics

    operators = numerics.capture(model, {"tokens": tokens_BS}, config)
    operators["1.attn.w_o_HUD"].dy_MN             # arrays, to look at
    table = numerics.measure(operators, ["v3", "per_tensor_current"])
    table["operators"][0]["recipes"]["v3"]["error"]["dgrad"]

`capture` runs forward and backward once, without any recipe, and keeps x, w and dy of every linear
layer (`fp8.probe`). `measure` applies recipes to these operands (`fp8.measure`), so that recipes
are compared on the same numbers. Memory is what all layers' operands take together, a few times
the activations: choose a batch that fits.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8 import measure as measure_lib
from dsv3_jax.fp8 import weights
from dsv3_jax.fp8.probe import Probed, Taps
from dsv3_jax.fp8.recipe import Recipe, resolve
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import moe
from dsv3_jax.train import state

Record = dict[str, Any]


class Operator(NamedTuple):
  """One layer's linear operator and its operands, fp32."""

  parameter: str  # its weight's last name, such as w_o_HUD
  x_MK: jax.Array
  w: jax.Array  # [K, N]; routed experts [E, K, N]
  dy_MN: jax.Array  # as in training: the gradient of the mean loss over this batch
  rows: measure_lib.Rows | None = None  # of routed experts
  amax: jax.Array | None = None  # [2], what delayed scaling assumes of x and dy


def _leaves(params: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], jax.Array]]:
  """(path, array) of every linear layer's matrix."""
  found = []
  for name, x in params.items():
    if isinstance(x, dict):
      found += _leaves(x, (*path, name))
    elif weights.axes(name) is not None:
      found.append(((*path, name), x))
  return found


def _replace(tree: Any, changes: dict[tuple[str, ...], Any], path: tuple[str, ...] = ()) -> Any:
  return {name: _replace(x, changes, (*path, name)) if isinstance(x, dict)
          else changes.get((*path, name), x) for name, x in tree.items()}


def _matrix(path: tuple[str, ...], w: jax.Array) -> jax.Array:
  """[..., K, N] of a stacked parameter."""
  inputs, outputs = weights.axes(path[-1])
  lead = w.shape[:w.ndim - inputs - outputs]
  split = len(lead) + inputs
  return w.reshape(*lead, int(np.prod(w.shape[len(lead):split])), int(np.prod(w.shape[split:])))


def _is_routed(path: tuple[str, ...]) -> bool:
  return path[-1].rpartition("_")[2].startswith("E")


def _taps(path: tuple[str, ...], w: jax.Array, tokens: int, cfg: config.MoE) -> Taps:
  """Zeros in the operands' shapes, a layer axis in front."""
  L, (K, N), M, blocks = w.shape[0], _matrix(path, w).shape[-2:], tokens, None
  if _is_routed(path):
    pairs = jax.ShapeDtypeStruct((tokens, cfg.active), jnp.int32)
    block = moe.block_rows(tokens * cfg.active, cfg.experts)
    made = jax.eval_shape(lambda e: moe.plan(e, cfg.experts, block), pairs)
    M, blocks = made.pair_M.shape[0], made.group_m.shape[0]
  return Taps(jnp.zeros((L, M, K)), jnp.zeros((L, M, N)),
              None if blocks is None else jnp.zeros((L, blocks)))


def make_capture(graphdef: nnx.GraphDef, cfg: config.Config) -> Callable[..., Any]:
  """`capture(params, buffers, batch, mtp_weight)`: the `Taps` of every linear layer by its path.

  Args:
    graphdef: of `state.split`.
    cfg: `loss`, `model.moe` and `runtime` are used; linear layers run in runtime.compute_dtype.
  """
  # Any recipe makes layers look at what kind their weights are; probed ones then ignore it.
  runtime = config.replace(cfg.runtime, recipe="v3", fp8=config.FP8())

  @jax.jit
  def capture(params, buffers, batch, mtp_weight):
    B, S = batch["tokens"].shape
    found = dict(_leaves(params))
    taps = {p: _taps(p, w, B * (S - 1), cfg.model.moe) for p, w in found.items()}

    def total(taps):
      probed = {p: Probed(w, taps[p]) for p, w in found.items()}
      model = nnx.merge(graphdef, _replace(params, probed), buffers)
      return loss_lib.loss_fn(
          model, batch, loss=cfg.loss, mtp_weight=mtp_weight, runtime=runtime,
          denominator=jnp.maximum(loss_lib.target_tokens(batch), 1))[0]

    return jax.grad(total)(taps)

  return capture


def operators(params: Any, taps: dict[tuple[str, ...], Taps], cfg: config.Model,
              amax: Any = None) -> dict[str, Operator]:
  """Captured operands by operator, in the order of the layers.

  Names are "LAYER.path": layers of the main model by their number, "mtp0." for MTP modules.

  Args:
    params: of the capture.
    taps: its result.
    cfg: the model's.
    amax: from `delayed.assumed`, for recipes with delayed scaling; None: none is known.
  """
  first = {"dense": 0, "moe": cfg.dense_layers, "mtp": 0}
  found: dict[tuple[int, int, int], tuple[str, Operator]] = {}
  for order, (path, w) in enumerate(_leaves(params)):
    stack, *rest = path
    known = functools.reduce(lambda tree, name: tree[name], path, amax) if amax else None
    matrices = _matrix(path, w)
    for i in range(w.shape[0]):
      x_MK, dy_MN, group_m = (z if z is None else z[i] for z in taps[path])
      rows = None
      if group_m is not None:
        group_m = group_m.astype(jnp.int32)
        rows = measure_lib.Rows(jnp.arange(x_MK.shape[0]), jnp.maximum(group_m, 0),
                                jnp.sum(group_m >= 0))
      layer = f"mtp{i}" if stack == "mtp" else str(first[stack] + i)
      name = ".".join([layer, *(r for r in rest if r != "block")])
      key = (stack == "mtp", first[stack] + i, order)
      found[key] = name, Operator(path[-1], x_MK, matrices[i], dy_MN, rows,
                                  None if known is None else known[i])
  return dict(found[key] for key in sorted(found))


def capture(model: nnx.Module, batch: dict[str, Any], cfg: config.Config) -> dict[str, Operator]:
  """Operands of all linear layers of a model on one batch.

  Args:
    model: a `Transformer`.
    batch: {"tokens": int [B, T+1], ...} as for `loss.loss_fn`.
    cfg: `model` is taken from the module; the rest says how it runs and what the loss is.
  """
  cfg = config.replace(cfg, model=model.cfg)
  graphdef, params, buffers = state.split(model)
  taps = make_capture(graphdef, cfg)(params, buffers, jax.tree.map(jnp.asarray, batch),
                                     jnp.float32(cfg.loss.mtp_weight))
  return operators(params, taps, cfg.model)


def recipe(name: str, runtime: config.Runtime = config.Runtime()) -> Recipe:
  """A recipe by its name, with the overrides of `runtime.fp8`.

  Raises:
    ConfigError: there is none such.
  """
  # In a dtype that no recipe but "none" leaves everything in, so that each resolves to itself.
  other = "bfloat16" if name == "fp32" else "float32"
  return resolve(config.replace(runtime, recipe=name, compute_dtype=other), held=True)


def measure(found: dict[str, Operator], recipes: Iterable[str] = ("v3",),
            runtime: config.Runtime = config.Runtime(),
            say: Callable[[str], None] = lambda line: None) -> Record:
  """Statistics of every operator under every recipe, as JSON values.

  Args:
    found: of `capture`.
    recipes: names; `runtime.fp8` overrides fields of all of them.
    runtime: see there.
    say: told about progress.

  Returns:
    recipes: the names. exponents: of the histograms' bins. operators: for each its name, shape
    (K, N), amax {x, w, dy: {largest, histogram of the tiles' maxima}} and recipes {name:
    {underflow, saturation: {x, w, dy}, error: {fprop, dgrad, wgrad}}}; see `fp8.measure`.
  """
  chosen = {name: recipe(name, runtime) for name in recipes}
  rows = []
  for name, op in found.items():
    say(name)
    amax = {}
    for key, z in zip(measure_lib.OPERANDS, (op.x_MK, op.w, op.dy_MN), strict=True):
      counts, largest = jax.device_get(measure_lib.amaxes(z, key))
      amax[key] = {"largest": float(largest), "histogram": counts.tolist()}
    stats = {n: jax.tree.map(float, jax.device_get(
        measure_lib.layer(*op[1:], name=op.parameter, recipe=r))) for n, r in chosen.items()}
    rows.append({"name": name, "shape": list(op.w.shape[-2:]), "amax": amax, "recipes": stats})
  return {"recipes": list(chosen), "exponents": list(measure_lib.EXPONENTS), "operators": rows}


def record(found: dict[str, Operator], name: str, runtime: config.Runtime) -> Record:
  """A line's worth of `measure` under one recipe: lists over operators, no histograms."""
  measured = measure(found, (name,), runtime)
  rows = measured["operators"]
  lists: Record = {"recipe": name, "names": [r["name"] for r in rows],
                   "amax": {k: [r["amax"][k]["largest"] for r in rows]
                            for k in measure_lib.OPERANDS}}
  for key, parts in (("underflow", measure_lib.OPERANDS), ("saturation", measure_lib.OPERANDS),
                     ("error", measure_lib.GEMMS)):
    lists[key] = {p: [r["recipes"][name][key][p] for r in rows] for p in parts}
  return lists
