"""The device mesh. One axis so far: `data`, over which a micro-batch's sequences are split."""

import jax
import numpy as np

from dsv3_jax import config

DATA = "data"
AXES = (DATA,)  # order of the mesh's axes; slowest links first


def make_mesh(sizes: config.Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """A mesh with Auto axes named `AXES`.

  Args:
    sizes: devices along each axis.
    devices: the devices to take from; all of the process group's where None.

  Raises:
    ConfigError: the mesh needs more devices than there are.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(sizes, axis) for axis in AXES)
  needed = int(np.prod(shape))
  if needed > len(devices):
    raise config.ConfigError(
        f"runtime.mesh.data={sizes.data} needs {needed} devices and {len(devices)} "
        f"{devices[0].platform} device(s) are present; lower it, or split a CPU with "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}")
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(np.array(devices[:needed]).reshape(shape), AXES, axis_types=auto)
