"""What the training step asks of XLA where it runs on GPUs; the one place for such options.

    latency-hiding scheduler   starts an all-to-all early and awaits it late; without it each is
                               awaited where it starts
    two collectives in flight  one hop of dispatch between nodes, another within a node: they use
                               different links, and with one at a time some find no matmul to hide
                               behind (`benchmarks/overlap.py` shows it)

Runs need no XLA_FLAGS for them. What must stay off on a pipeline is the capture of loops and
conditionals in CUDA graphs (xla_gpu_enable_command_buffer=CONDITIONAL or WHILE): NCCL does not work
inside conditional nodes.
"""

from collections.abc import Callable

import jax

OPTIONS = {
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
}


def jit(function: Callable, mesh: jax.sharding.Mesh | None, **kwargs) -> Callable:
  """`jax.jit` with the options above where the mesh is of GPUs."""
  if mesh is not None and mesh.devices.flat[0].platform == "gpu":
    kwargs["compiler_options"] = OPTIONS
  return jax.jit(function, **kwargs)
