"""Eight H100s that are not there: devices to compile programs of XLA for.

    devices = topology.h100s(tools)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(2, 4), ("data", "model"), ...)
    compiled = jax.jit(f).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()

`shapes` are `jax.ShapeDtypeStruct`s with shardings on the mesh. The program cannot be run; its text
(`compiled.as_text()`) is what such a machine would run, but for the choice of matmul algorithms,
which takes a device to time them. XLA picks instructions by platform, not by default backend: the
latter stays what it is, and so does what asks for it.
"""

import pathlib

import jax
from jax.experimental import topologies

from pallas_kernels.aot import toolchain

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# Without a device there is nothing to time.
OPTIONS = {"xla_gpu_autotune_level": 0}


def h100s(tools: pathlib.Path | None = None) -> list[jax.Device]:
  """The devices; as many hosts as processes, that is one.

  Args:
    tools: see `toolchain.find`.

  Raises:
    MissingError: the plugin is absent.
  """
  from jax._src import xla_bridge  # public is only a variable that jax reads at its start

  library = toolchain.plugin(tools)
  if "cuda" not in xla_bridge._topology_factories:
    xla_bridge.register_plugin("cuda", library_path=str(library))
  described = topologies.get_topology_desc(platform="cuda", target_config=_H100, topology="1x1x8")
  return list(described.devices)
