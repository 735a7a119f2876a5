"""PartitionSpecs from the shape letters that names end in (CONTRIBUTING.md, "Names and shapes")."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.parallel import mesh as mesh_lib

# Which mesh axes cut which letter. Parameters have rules of their own (`placement.py`).
RULES = {"B": mesh_lib.BATCH}


def shape_letters(name: str) -> str:
  """The part of a name after its last underscore if that is shape letters, else ""."""
  _, cut, letters = name.rpartition("_")
  return letters if cut and letters.isalpha() and letters[0].isupper() else ""


def spec(name: str, ndim: int | None = None,
         rules: dict[str, str | tuple[str, ...]] | None = None) -> PartitionSpec:
  """The PartitionSpec of an array named `name`, e.g. "tokens_BT" or "w_gate_EDF".

  Args:
    name: a name whose part after the last underscore is its shape letters, or has none.
    ndim: the array's rank; where it exceeds the letters, the leading axes (stacked layers,
      micro-batches) are not cut.
    rules: letter -> mesh axis or axes; `RULES` where None.

  Raises:
    ValueError: two letters of one name fall on the same mesh axis, or `ndim` is below the number
      of letters.
  """
  rules = RULES if rules is None else rules
  letters = shape_letters(name)
  ndim = len(letters) if ndim is None else ndim
  if ndim < len(letters):
    raise ValueError(f"{name}: {len(letters)} shape letters on an array of rank {ndim}")
  axes = [rules.get(letter) or None for letter in letters]
  used = [a for axis in axes if axis is not None for a in ((axis,) if isinstance(axis, str)
                                                           else axis)]
  if len(set(used)) != len(used):
    raise ValueError(f"{name}: two of its letters fall on one mesh axis ({', '.join(used)})")
  return PartitionSpec(*([None] * (ndim - len(letters)) + axes)) if used else PartitionSpec()


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh, name: str = "tokens_BS", ndim: int = 3
                   ) -> NamedSharding:
  """For a batch: [A, B, S] is micro-batches after one another, sequences over `mesh.BATCH`.

  Axes with one device cut nothing and are left out, so that inside shard_map arrays vary over the
  others alone (`mesh.several`).
  """
  return NamedSharding(mesh, spec(name, ndim, {"B": mesh_lib.several(mesh, mesh_lib.BATCH)}))


def varies(x: jax.Array) -> frozenset[str]:
  """Mesh axes over which `x` differs, inside `shard_map`; none outside."""
  aval = jax.typeof(x)
  return frozenset(aval.vma if hasattr(aval, "vma") else aval.mat.varying)  # renamed in jax 0.11


def varying(tree: Any, axes: tuple[str, ...]) -> Any:
  """Inside `shard_map`: marks every leaf as differing between the devices of `axes`.

  No data moves; leaves that differ already stay as they are. What is differentiated with respect
  to varying values gives each device its own gradient, to be summed once.
  """

  def cast(x):
    missing = tuple(a for a in axes if a not in varies(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return jax.tree.map(cast, tree) if axes else tree
