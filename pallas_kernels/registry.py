"""Every kernel with arguments to compile it for.

`pallas_kernels.sass_check` compiles them, `pallas_kernels.correctness` runs them.
"""

import dataclasses
from collections.abc import Callable

import jax

Abstract = jax.ShapeDtypeStruct


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


def kernels() -> list[Kernel]:
  """All of them, in every configuration that a heuristic or a table chooses for `shapes`."""
  return []
