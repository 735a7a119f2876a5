"""The Mosaic GPU modules inside a function's lowering for CUDA."""

from collections.abc import Callable

import jax


def modules(function: Callable, *args) -> list[bytes]:
  """Serialized modules of the Mosaic GPU kernels that `function` calls, in program order.

  Args:
    function: takes arrays; need not be jitted.
    args: arrays or `jax.ShapeDtypeStruct`s.
  """
  lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
  found: list[bytes] = []

  def walk(operation) -> None:
    for region in operation.regions:
      for block in region.blocks:
        for op in block.operations:
          op = op.operation
          if (op.name == "stablehlo.custom_call"
              and "mosaic_gpu" in str(op.attributes["call_target_name"])):
            found.append(op.attributes["mhlo.backend_config"]["module"].value_bytes)
          walk(op)

  walk(lowered.compiler_ir("stablehlo").operation)
  return found
