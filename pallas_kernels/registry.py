"""Every kernel in every configuration that a call can choose, to be compiled by `sass_check`.

A GEMM's registers depend on kind, configuration and the result's type, hardly on the shape: each of
these is compiled on the first shape that chooses it.
"""

import dataclasses
import json
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import cases, shapes
from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic import tables
from pallas_kernels.mosaic.config import GemmConfig


@dataclasses.dataclass(frozen=True)
class Kernel:
  """A kernel in one configuration.

  Attributes:
    name: family, shape and configuration.
    build: gives the function and its abstract arguments.
    needs: instructions that its machine code must hold.
  """

  name: str
  build: Callable[[], tuple[Callable, tuple]]
  needs: tuple[str, ...] = ()


def describe(config: GemmConfig) -> str:
  """A configuration in short: tile, stages, cluster, raster, what is out of the ordinary."""
  c = config
  words = [f"{c.tile_m}{'w2' if c.rows == 128 else ''}x{c.tile_n}", f"s{c.stages}",
           f"c{c.cluster}" if c.cluster else "", f"r{c.raster_minor}:{c.raster_width}",
           "" if c.overlap else "plain", "fence" if c.fence else "",
           f"regs{c.registers}" if c.registers != GemmConfig().registers else ""]
  return " ".join(filter(None, words))


Choice = tuple[str, GemmConfig, str]  # kind, configuration, dtype of the result


def chosen() -> dict[Choice, shapes.Gemm]:
  """Every choice for `shapes`, the heuristic's and the tables', and the first shape that has it."""
  known = [json.loads(path.read_text())["gemm"] for path in sorted(tables.FOLDER.glob("*.json"))]
  found: dict[Choice, shapes.Gemm] = {}
  for shape in shapes.GEMMS:
    # Layers take sums in fp32 too.
    dtypes = (jnp.bfloat16, jnp.float32) if shape.kind in ("dense", "grouped") else (None,)
    for dtype in dtypes:
      arguments = cases.arguments(shape, dtype)
      entries = (table.get(tables.key(*arguments)) for table in known)
      configs = [config_lib.heuristic(*arguments),
                 *(GemmConfig.from_dict(entry) for entry in entries if entry)]
      for config in configs:
        found.setdefault((shape.kind, config, jnp.dtype(arguments[-1]).name), shape)
  return found


def _gemm(choice: Choice, shape: shapes.Gemm) -> Kernel:
  kind, config, dtype = choice
  case = cases.gemm_case(shape, config)
  options = {} if config_lib.one_d(kind) else {"out_dtype": dtype}
  return Kernel(f"{shape.name} {describe(config)} {dtype}",
                lambda: (case.kernel(**options), case.abstract()), case.needs)


def _accumulating(kind: str, config: GemmConfig, shape: shapes.Gemm) -> Kernel:
  """A weight gradient that adds to an array."""
  case = cases.gemm_case(shape, config)

  def build():
    abstract = case.abstract()
    sum_of = jax.eval_shape(case.kernel(), *abstract)
    return (lambda *args: case.kernel(accumulate=args[-1])(*args[:-1])), (*abstract, sum_of)

  return Kernel(f"{shape.name} {describe(config)} accumulating", build, case.needs)


def _case(case: cases.Case, **options) -> Kernel:
  name = " ".join([case.name, *(k if v is True else f"{k} {v}" for k, v in options.items())])
  return Kernel(name, lambda: (case.kernel(**options), case.abstract()), case.needs)


def kernels() -> list[Kernel]:
  """All of them."""
  choices = chosen()
  found = [_gemm(choice, shape) for choice, shape in choices.items()]
  found += [_accumulating(kind, config, shape) for (kind, config, _), shape in choices.items()
            if config_lib.one_d(kind)]
  found.append(_case(cases.gemm_case(shapes.DENSE[4]), interval=32))
  families: dict[str, cases.Case] = {}  # the others have one configuration: one shape is enough
  for case in cases.others():
    families.setdefault(" ".join(w for w in case.name.split() if not w[0].isdigit()), case)
  found += [_case(case) for case in families.values()]
  return found + [_case(case, pow2=True) for name, case in families.items()
                  if name.startswith(("quantize", "swiglu"))]
