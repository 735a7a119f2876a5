"""Every kernel in every configuration that a call can choose, to be compiled by `sass_check`.

A GEMM's registers depend on kind and configuration, hardly on the shape: each pair is compiled on
the first shape that chooses it.
"""

import dataclasses
import json
from collections.abc import Callable

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
  """A configuration in a word: "128x192 s4 cm"."""
  cluster = f" c{config.cluster}" if config.cluster else ""
  waves = "w2" if config.rows == 128 else ""
  return f"{config.tile_m}{waves}x{config.tile_n} s{config.stages}{cluster}"


def chosen() -> dict[tuple[str, GemmConfig], shapes.Gemm]:
  """Kind and configuration of every choice for `shapes`: the heuristic's and the tables'."""
  known = [json.loads(path.read_text())["gemm"] for path in sorted(tables.FOLDER.glob("*.json"))]
  found: dict[tuple[str, GemmConfig], shapes.Gemm] = {}
  for shape in shapes.GEMMS:
    arguments = cases.arguments(shape)
    configs = [config_lib.heuristic(*arguments)]
    entries = (table.get(tables.key(*arguments)) for table in known)
    configs += [GemmConfig.from_dict(entry) for entry in entries if entry]
    for config in configs:
      found.setdefault((shape.kind, config), shape)
  return found


def _kernel(case: cases.Case, name: str) -> Kernel:
  return Kernel(name, lambda: (case.kernel(), case.abstract()), case.needs)


def kernels() -> list[Kernel]:
  """All of them."""
  gemms = [_kernel(cases.gemm_case(shape, config), f"{shape.name} {describe(config)}")
           for (_, config), shape in chosen().items()]
  families: dict[str, cases.Case] = {}  # the others have one configuration: one shape is enough
  for case in cases.others():
    families.setdefault(" ".join(w for w in case.name.split() if not w[0].isdigit()), case)
  return gemms + [_kernel(case, case.name) for case in families.values()]
