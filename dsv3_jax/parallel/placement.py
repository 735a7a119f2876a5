"""Where parameters lie, and how whole ones and summed gradients come of that (report 3.2, ZeRO-1).

A parameter has a home and a place of use. At home, between steps, each device keeps what nobody
else must keep: of routed experts those of its `node` and `gpu`, and of embedding and head its part
of the vocabulary where that is cut too (both stay cut in use); and with ZeRO-1 of every array the
part that the remaining mesh axes cut out of its largest axis. Adam's moments and the fp32 masters
are there, and the update changes a part where it lies. For use, a step collects what this device
computes with: the layers of its stages, whole but for what stays cut. Its gradients go the same way
back, summed.

                         to use                               back home
    replicated           nothing                              all-reduce
    ZeRO-1               all-gather                           reduce-scatter
    layers, pipeline     all-to-all over pipe (parts of      reduce-scatter, then all-to-all
                         all layers for all parts of
                         some), then all-gather

So the home does not depend on the schedule, and a checkpoint is that of a single device.

All functions but `places` and `specs` are called inside shard_map. Sums are taken in the same
groups of devices with ZeRO-1 and without, so that both give the same bits.
"""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax import config
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import sharding


@dataclasses.dataclass(frozen=True)
class Place:
  """One array's home; a leaf of trees.

  Attributes:
    rank: axes of the array.
    kept_dim, kept: the axis that is cut in use too, of experts or the vocabulary, and the mesh axes
      that cut it; None, ().
    dim, shards: the axis that ZeRO-1 cuts and the mesh axes, in the order of the parts; None, ().
    zero: whether it is cut there. Where it is not, `shards` still orders the sums.
  """

  rank: int
  kept_dim: int | None
  kept: tuple[str, ...]
  dim: int | None
  shards: tuple[str, ...]
  zero: bool

  @property
  def spec(self) -> PartitionSpec:
    cut: list[Any] = [None] * self.rank
    if self.kept:
      cut[self.kept_dim] = self.kept
    if self.zero and self.shards:
      cut[self.dim] = self.shards
    return PartitionSpec(*cut) if any(cut) else PartitionSpec()


def _name(path: Any) -> str:
  return str(getattr(path[-1], "key", path[-1]))


def place(name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh, zero: bool,
          vocab: bool = False) -> Place:
  """The home of a parameter, from its name's shape letters.

  A leading E, of an array with more letters, counts routed experts, and is cut over `node` and
  `gpu`; the E of a router's output is not. With `vocab` a V is cut so too. Axes before the letters
  (stacked layers) are never cut.

  Raises:
    ValueError: the experts, or the vocabulary, do not divide among the devices.
  """
  letters = sharding.shape_letters(name)
  lead = len(shape) - len(letters)
  kept, kept_dim = (), None
  experts = letters.startswith("E") and len(letters) > 1
  if experts or (vocab and "V" in letters):
    kept, kept_dim = mesh_lib.several(mesh, mesh_lib.EXPERTS), lead + letters.index(
        "E" if experts else "V")
    devices = math.prod(mesh.shape[a] for a in kept)
    if shape[kept_dim] % devices:
      what = "experts" if experts else "words of the vocabulary"
      raise ValueError(f"{name}: {shape[kept_dim]} {what} cannot be cut over {devices} devices "
                       f"({', '.join(kept)}); choose a mesh whose node * gpu divides them")
  # pipe last: `take` and `put` then exchange over it what the others have cut already.
  free = [a for a in mesh_lib.several(mesh, (*mesh_lib.TOKENS, mesh_lib.PIPE)) if a not in kept]
  groups = [group for n in range(len(free), 0, -1) for group in itertools.combinations(free, n)]
  size = lambda group: math.prod(mesh.shape[a] for a in group)
  for group in sorted(groups, key=size, reverse=True):  # most devices first
    dims = [d for d in range(lead, len(shape)) if d != kept_dim and shape[d] % size(group) == 0]
    if dims:
      dim = max(dims, key=lambda d: shape[d])
      return Place(len(shape), kept_dim, kept, dim, group, zero)
  return Place(len(shape), kept_dim, kept, None, (), zero)


def places(params: Any, mesh: jax.sharding.Mesh, runtime: config.Runtime | None = None,
           zero: bool | None = None) -> Any:
  """The tree of the parameters with a `Place` for each (arrays or their shapes).

  `zero`: instead of what `runtime` says. Without either nothing is cut but experts.
  """
  runtime = runtime or config.Runtime()
  zero = runtime.zero > 0 if zero is None else zero
  return jax.tree_util.tree_map_with_path(
      lambda path, x: place(_name(path), x.shape, mesh, zero, runtime.shard_vocab), params)


def specs(homes: Any) -> Any:
  return jax.tree.map(lambda home: home.spec, homes)


def shardings(homes: Any, mesh: jax.sharding.Mesh) -> Any:
  return jax.tree.map(lambda home: NamedSharding(mesh, home.spec), homes)


# --- one array ----------------------------------------------------------------------------------


def whole(x: jax.Array, home: Place) -> jax.Array:
  """The array for use: all of it but the experts (or words) elsewhere."""
  if not (home.zero and home.shards):
    return x
  return lax.all_gather(x, home.shards, axis=home.dim, tiled=True)


def summed(g: jax.Array, home: Place, axes: tuple[str, ...]) -> jax.Array:
  """The sum over devices of an array's gradient, at home.

  Args:
    g: of the array for use, this device's part of the sum.
    home: of the array.
    axes: mesh axes over which the gradients differ: several's of all axes.
  """
  return _summed(g, home, axes, home.dim)


def _summed(g, home, axes, dim):
  within = tuple(a for a in home.shards if a in axes)
  rest = tuple(a for a in axes if a not in within and a not in home.kept)
  if within:
    g = (lax.psum_scatter(g, within, scatter_dimension=dim, tiled=True) if home.zero
         else lax.psum(g, within))
  return lax.psum(g, rest) if rest else g


def square_sums(grads: Any, homes: Any) -> jax.Array:
  """Sum of the squares of all gradients at home, fp32, the same bits on all devices.

  Each device squares one part of each array, with ZeRO-1 or without.
  """
  sums: dict[tuple[str, ...], Any] = {}

  def add(g, home):
    if home.shards and not home.zero:
      n = g.shape[home.dim] // math.prod(lax.axis_size(a) for a in home.shards)
      g = lax.dynamic_slice_in_dim(g, lax.axis_index(home.shards) * n, n, home.dim)
    axes = home.kept + home.shards
    sums[axes] = sums.get(axes, 0.0) + jnp.square(g.astype(jnp.float32)).sum()

  jax.tree.map(add, grads, homes)
  return sum(lax.psum(x, axes) if axes else x for axes, x in sums.items())


# --- stacks of layers, for a pipeline -----------------------------------------------------------


def _elsewhere(home: Place) -> tuple[Place, bool]:
  """The home without `pipe`, and whether `pipe` cuts it."""
  shards = tuple(a for a in home.shards if a != mesh_lib.PIPE)
  return (dataclasses.replace(home, shards=shards),
          home.zero and mesh_lib.PIPE in home.shards)


def take(x: jax.Array, home: Place, layers: np.ndarray) -> jax.Array:
  """This rank's layers of a stack, for use.

  Args:
    x: at home, [L, ...].
    home: of it.
    layers: int [R, n], the layers of each rank; numbers below 0 give any layer.

  Returns:
    [n, ...].
  """
  layers = np.maximum(layers, 0)
  others, exchange = _elsewhere(home)
  if exchange:
    parts = x[layers]  # [R, n, ...]: of all ranks' layers the part that lies here
    x = lax.all_to_all(parts, mesh_lib.PIPE, 0, home.dim + 1, tiled=True)[0]
  else:
    x = jnp.take(x, jnp.asarray(layers)[lax.axis_index(mesh_lib.PIPE)], axis=0)
  return whole(x, others)


def put(rows: jax.Array, home: Place, layers: np.ndarray, depth: int, axes: tuple[str, ...]
        ) -> jax.Array:
  """The reverse of `take` for gradients: summed over devices and over copies of a layer, at home.

  Args:
    rows: [n, ...], this rank's part; rows whose number is below 0 are left out.
    home: of the stack.
    layers: as `take`'s.
    depth: L.
    axes: as `summed`'s.
  """
  others, exchange = _elsewhere(home)
  rows = _summed(rows, others, tuple(a for a in axes if a != mesh_lib.PIPE), home.dim)
  if not exchange:
    return lax.psum(_rows_to_layers(rows, layers, depth), mesh_lib.PIPE)
  parts = lax.all_to_all(rows[None], mesh_lib.PIPE, home.dim + 1, 0, tiled=True)  # [R, n, ...]
  flat = layers.reshape(-1)
  used = np.flatnonzero(flat >= 0)
  parts = parts.reshape(flat.size, *parts.shape[2:])
  zeros = sharding.varying(jnp.zeros((depth, *parts.shape[1:]), parts.dtype),
                           tuple(sharding.varies(parts)))
  return zeros.at[flat[used]].add(parts[used])


def _rows_to_layers(rows, layers, depth, maximum=False):
  mine = jnp.asarray(np.where(layers < 0, depth, layers))[lax.axis_index(mesh_lib.PIPE)]
  zeros = sharding.varying(jnp.zeros((depth, *rows.shape[1:]), rows.dtype),
                           tuple(sharding.varies(rows)))
  at = zeros.at[mine]
  return at.max(rows, mode="drop") if maximum else at.add(rows, mode="drop")


def gather_layers(rows: jax.Array, layers: np.ndarray, depth: int, maximum: bool = False
                  ) -> jax.Array:
  """Statistics of this rank's layers, [n, ...], to [L, ...] on every rank.

  Summed over copies of a layer, or their largest, at least 0, where `maximum`.
  """
  found = _rows_to_layers(rows, layers, depth, maximum)
  return (lax.pmax if maximum else lax.psum)(found, mesh_lib.PIPE)
