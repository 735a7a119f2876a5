"""Configurations of the GEMM kernels: limits, the model's choice, tables.

Oracle: laws, and figures that compiling to sm_90a gave.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic import tables
from pallas_kernels.mosaic.config import GemmConfig

SHAPES = [  # DeepSeek-V3's, then awkward ones
    ("dense", 4096, 7168, 16384, 1), ("dense", 4096, 32768, 512, 1), ("dense", 128, 2112, 7168, 1),
    ("dense", 1, 8, 8, 1), ("grouped", 32768, 4096, 7168, 4), ("masked", 256, 7168, 2048, 4),
    ("wgrad", 7168, 2112, 4096, 1), ("grouped_wgrad", 7168, 4096, 16384, 4),
    ("grouped", 128, 48, 130, 300), ("masked", 7, 100, 100, 1),
]


def dtype(kind):
  return jnp.float32 if config_lib.one_d(kind) else jnp.bfloat16


def test_json_round_trip():
  """Law: what was written is what is read; a key of another release is named."""
  config = GemmConfig(rows=128, cluster="n", fence=True)
  assert GemmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  with pytest.raises(ValueError, match="no tile_k"):
    GemmConfig.from_dict({**config.to_dict(), "tile_k": 128})


@pytest.mark.parametrize("change, reason", [
    (dict(rows=96), "rows"), (dict(tile_n=24), "tile_n"), (dict(cluster="k"), "cluster"),
    (dict(stages=8), "shared memory"), (dict(rows=128, tile_n=192, stages=2), "registers"),
    (dict(stages=1), "stages"), (dict(registers=41), "registers"),
])
def test_limits(change, reason):
  """Law: each limit has its own words."""
  config = dataclasses.replace(GemmConfig(), **change)
  assert reason in config_lib.legal(config, "dense", 4096, 4096, 4096)


def test_limits_of_groups():
  """Law: a tile lies in one group, and blocks that share B's rows in the same."""
  assert "groups" in config_lib.legal(GemmConfig(rows=128, stages=3), "grouped", 512, 512, 512)
  assert "group" in config_lib.legal(GemmConfig(cluster="m"), "masked", 512, 512, 512)
  assert config_lib.legal(GemmConfig(cluster="m"), "grouped", 512, 512, 512) is None


def test_ring_of_short_stages():
  """Law: as many bytes of operands, unless their scales no longer fit."""
  config = GemmConfig(stages=5)
  assert config_lib.ring(config, "dense", jnp.bfloat16, 128) == 5
  assert config_lib.ring(config, "dense", jnp.bfloat16, 32) == 20
  full = config_lib.candidates("wgrad", 7168, 2112, 4096, 1, jnp.float32)[0]
  assert full.stages < config_lib.ring(full, "wgrad", jnp.float32, 32) <= 4 * full.stages


def test_shared_memory():
  """Figures: ring, scales, staging, each from a multiple of 1024, and barriers."""
  config = GemmConfig(tile_n=192, stages=4)
  ring = 4 * (128 + 192) * 128
  assert config_lib.shared_memory(config, "dense") == ring + 2048 + 128 * 192 * 2 + 8 * 14
  assert (config_lib.shared_memory(config, "wgrad", jnp.float32)
          == ring + 2048 + 3072 + 128 * 192 * 4 + 8 * 14)


@pytest.mark.parametrize("kind, M, N, K, G", SHAPES)
def test_candidates(kind, M, N, K, G):
  """Law: all can run, differ, are few, and the first is the model's choice."""
  found = config_lib.candidates(kind, M, N, K, G, dtype(kind))
  assert 5 <= len(found) <= 40
  assert len(set(found)) == len(found)
  assert all(config_lib.legal(c, kind, M, N, K, dtype(kind)) is None for c in found)
  assert config_lib.heuristic(kind, M, N, K, G, dtype(kind)) == found[0]


def test_choices_are_sensible():
  """Figures: large tiles that share operands where there is work, small ones where memory rules."""
  large = config_lib.heuristic("dense", 4096, 7168, 16384)
  assert large.tile_m * large.tile_n >= 128 * 160 and large.cluster
  small = config_lib.heuristic("dense", 64, 2112, 7168)
  assert small.tile_m == 64 and small.tile_n <= 64 and small.stages >= 8


def test_model_is_monotonic():
  """Law: more work is never estimated to take less time."""
  config, rng = GemmConfig(cluster="n"), np.random.default_rng(0)
  for _ in range(50):
    M, N, K = (int(rng.integers(1, 9)) * 1024 for _ in range(3))
    base = config_lib.clocks(config, "dense", M, N, K)
    for more in ((2 * M, N, K), (M, 2 * N, K), (M, N, 2 * K)):
      assert config_lib.clocks(config, "dense", *more) >= base


def test_tables(tmp_path, monkeypatch):
  """Law: the device's entry is taken, for tokens up to the next power of two; else the model."""
  monkeypatch.setattr(tables, "FOLDER", tmp_path)
  tables.read.cache_clear()
  device, config = "NVIDIA H100 80GB HBM3", GemmConfig(tile_n=96, stages=3)
  too_big = dataclasses.replace(config, stages=16)
  tables.path(device).write_text(json.dumps({"gemm": {
      tables.key("dense", 4000, 7168, 2048, 1, jnp.bfloat16): config.to_dict(),
      tables.key("dense", 100, 7168, 2048, 1, jnp.bfloat16): too_big.to_dict()}}))
  assert tables.path(device).name == "nvidia_h100_80gb_hbm3.json"
  assert tables.lookup(device, "dense", 2049, 7168, 2048) == config
  assert tables.lookup(device, "dense", 4096, 7168, 2048) == config
  for args in (("dense", 4097, 7168, 2048), ("dense", 4096, 7168, 4096),
               ("dense", 4096, 7168, 2048, 1, jnp.float32), ("dense", 128, 7168, 2048)):
    assert tables.lookup(device, *args) == config_lib.heuristic(*args)
  assert tables.lookup("cpu", "dense", 4096, 7168, 2048) == config_lib.heuristic(
      "dense", 4096, 7168, 2048)
  tables.read.cache_clear()


def test_table_keys():
  """Law: the tokens' axis is counted in powers of two, others exactly."""
  key = lambda *args: tables.key(*args, 1, jnp.float32)
  assert key("wgrad", 7168, 2112, 4000) == key("wgrad", 7168, 2112, 4096)
  assert key("wgrad", 7168, 2112, 4096) != key("wgrad", 7000, 2112, 4096)
  assert key("dense", 1, 8, 8) != key("dense", 2, 8, 8)
