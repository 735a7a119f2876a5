"""Test session set-up: CPU, split into 8 virtual devices, before anything imports jax."""

import gc
import os

# The flag is read when the backend starts, and xdist's workers inherit it through this same file.
os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICES = "--xla_force_host_platform_device_count=8"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a network

# Tracing a model makes many objects and little garbage. By default Python looks through all objects
# a thousand times on the way, those of torch and transformers among them: a third of its time.
gc.set_threshold(50_000, 20, 20)
