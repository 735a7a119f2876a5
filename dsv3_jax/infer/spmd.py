"""Rounds of decoding over the devices of a mesh.

Attention is data-parallel: each device has rows and cache pages of its own, the latents being small
and the same for all heads. Experts are cut over all devices (`slots.py`), so all run each layer
together, also those without rows of their own. Arrays of rows are those of the first device, then
of the second, ...; so are the pages of the cache, which are numbered on each device from 0.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from dsv3_jax.infer import decode
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel.compiler import jit

ROWS = PartitionSpec(mesh_lib.BATCH)
_SAME = PartitionSpec()
_DRAWN = PartitionSpec(None, mesh_lib.BATCH)
_STATE = decode.State(ROWS, ROWS, ROWS, ROWS, ROWS, _SAME)


class Functions(NamedTuple):
  """`decode.prefill` and `decode.run` without `axes` and `halves`."""

  prefill: Callable[..., tuple[decode.State, decode.New]]
  run: Callable[..., tuple[decode.State, decode.New]]


def functions(mesh: jax.sharding.Mesh | None, specs: Any = None, halves: bool = False
              ) -> Functions:
  """The compiled functions for one device, or those of a mesh.

  Args:
    mesh: the devices; None: one.
    specs: of the weights (`slots.specs`).
    halves: whether they run two micro-batches, see `forward`.
  """
  bind = lambda f: functools.partial(f, halves=halves)
  if mesh is None:
    return Functions(bind(decode.prefill), bind(decode.run))
  static = tuple(name for name in decode.STATIC if name not in ("axes", "halves"))

  def prefill(weights, cache, tokens_BT, new_B, most, seen_BV, r, bias, stop_S, **how):
    local = functools.partial(_unjitted(decode.prefill), axes=mesh_lib.BATCH, halves=halves,
                              **how)
    given = (specs, ROWS, ROWS, ROWS, _SAME, ROWS, ROWS, _bias(bias), _SAME)
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=(_STATE, _DRAWN))(
        weights, cache, tokens_BT, new_B, most, seen_BV, r, bias, stop_S)

  def run(weights, state, alive_B, r, bias, stop_S, count, **how):
    local = functools.partial(_unjitted(decode.run), axes=mesh_lib.BATCH, halves=halves, **how)
    given = (specs, _STATE, ROWS, ROWS, _bias(bias), _SAME, _SAME)
    return jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=(_STATE, _DRAWN))(
        weights, state, alive_B, r, bias, stop_S, count)

  return Functions(
      jit(prefill, mesh, halves, static_argnames=(*static, "fresh"), donate_argnames=("cache",)),
      jit(run, mesh, halves, static_argnames=(*static, "most"), donate_argnames=("state",)))


def _unjitted(f: Callable) -> Callable:
  return getattr(f, "__wrapped__", f)


def _bias(bias: Any) -> PartitionSpec:
  return ROWS if bias is not None and bias.ndim == 2 else _SAME
