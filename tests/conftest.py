"""Test session set-up: CPU, split into 8 virtual devices, before anything imports jax."""

import gc
import importlib.metadata
import os

# Flags are read when the backend starts; xdist's workers and what tests start inherit them.
os.environ["JAX_PLATFORMS"] = "cpu"
# As in `quick`, for what is computed outside of functions compiled by it: tests run tiny programs
# once each, so compiling costs more than running. XLA dies of a flag that it does not know.
_FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_GIVEN = os.environ.get("XLA_FLAGS", "").split()
os.environ["XLA_FLAGS"] = " ".join(_GIVEN + [f for f in _FLAGS if f not in _GIVEN])
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network

# Tracing a model makes many objects and little garbage. By default Python looks through all objects
# a thousand times on the way, those of torch and transformers among them: a third of its time.
gc.set_threshold(50_000, 20, 20)
