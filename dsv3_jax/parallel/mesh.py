"""The device mesh: which devices share sequences, experts and layers.

    pipe     layers: each rank has stages of the pipeline
    data     sequences alone: every group of experts exists once for each
    context  tokens: each has a part of the same sequences (`context.py`)
    node     sequences and experts, joined by slow links
    gpu      sequences and experts, joined by fast links

The last axis has neighbouring devices, so `gpu` should be the devices of one machine. The axes are
Auto: what stands outside `shard_map` is cut by XLA as its operands are.
"""

import jax
import numpy as np

from dsv3_jax import config

PIPE, DATA, CONTEXT, NODE, GPU = "pipe", "data", "context", "node", "gpu"
AXES = (PIPE, DATA, CONTEXT, NODE, GPU)  # order of the mesh's axes; slowest links first
BATCH = (DATA, NODE, GPU)  # cut the sequences of a micro-batch
TOKENS = (DATA, CONTEXT, NODE, GPU)  # cut its tokens
EXPERTS = (NODE, GPU)  # cut the routed experts


def make_mesh(sizes: config.Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh with Auto axes named `AXES`.

  Args:
    sizes: devices along each axis.
    devices: the devices to take from; all of the process group's where None.

  Raises:
    ConfigError: the mesh needs more devices than there are, or would leave out a process.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(sizes, axis) for axis in AXES)
  needed = sizes.devices
  if needed > len(devices):
    raise config.ConfigError(
        f"{sizes.describe()} needs {needed} devices and {len(devices)} "
        f"{devices[0].platform} device(s) are present; lower it, or split a CPU with "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}")
  idle = {d.process_index for d in devices} - {d.process_index for d in devices[:needed]}
  if idle:
    raise config.ConfigError(
        f"{sizes.describe()} takes {needed} of {len(devices)} devices and none "
        f"of process(es) {sorted(idle)}; raise it to {len(devices)}, or start fewer processes")
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(np.array(devices[:needed]).reshape(shape), AXES, axis_types=auto)


def several(mesh: jax.sharding.Mesh | None, axes: tuple[str, ...]) -> tuple[str, ...]:
  """Those of `axes` that have more than one device; none of no mesh."""
  return () if mesh is None else tuple(a for a in axes if mesh.shape[a] > 1)


def cut(mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> jax.sharding.NamedSharding:
  """Leading axes over `axes`, written as jit writes what it returns: without those of one device.

  Equal shardings that are written otherwise are looked up as other arguments.
  """
  found = several(mesh, axes)
  spec = jax.sharding.PartitionSpec(*[found[0] if len(found) == 1 else found] * bool(found))
  return jax.sharding.NamedSharding(mesh, spec)
