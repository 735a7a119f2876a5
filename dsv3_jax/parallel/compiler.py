"""What steps over several devices ask of XLA where those are GPUs; runs need no XLA_FLAGS for it.

XLA splits an all-to-all into start and done, and one of two schedulers puts these apart:

    latency hiding   decides by its own estimates what to do between the two. Without it the step
                     that has no pipeline would await each where it starts.
    plain            starts at once and awaits as late as dependencies allow. With it a pipeline's
                     op FB, or a step of serving, is done as `interleave.py` has planned, every
                     all-to-all behind matmuls; the other one's estimates leave some of them none
                     (`benchmarks/overlap.py`).

What must stay off on a pipeline is the capture of loops in CUDA graphs
(xla_gpu_enable_command_buffer=WHILE or CONDITIONAL): NCCL does not work inside such nodes.
"""

from collections.abc import Callable

import jax


def options(planned: bool) -> dict[str, bool]:
  """XLA's options for a step that `interleave.py` has planned, or has not."""
  return {"xla_gpu_enable_latency_hiding_scheduler": not planned}


def jit(function: Callable, mesh: jax.sharding.Mesh, planned: bool, **kwargs) -> Callable:
  """`jax.jit` with the options where the mesh is of GPUs."""
  if mesh.devices.flat[0].platform == "gpu":
    kwargs["compiler_options"] = options(planned)
  return jax.jit(function, **kwargs)
