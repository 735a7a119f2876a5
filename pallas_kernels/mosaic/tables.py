"""Measured configurations of the GEMM kernels, one committed JSON file a device.

    {"gemm": {"dense,one,N7168,K2048,M4096,bfloat16": {"rows": 64, "tile_n": 192, ...}, ...}, ...}

`python -m pallas_kernels.tune` writes them. Weights have few shapes, tokens come in any number:
so the tokens' axis (M of a product, K of a weight gradient) counts as the power of two above.
"""

import functools
import json
import pathlib
import re

import jax.numpy as jnp

from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic.config import GemmConfig

FOLDER = pathlib.Path(__file__).parent.parent / "tables"


def path(device: str) -> pathlib.Path:
  """Where the table of a device kind (as jax names it) lies or would lie."""
  return FOLDER / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json")


def key(kind: str, M: int, N: int, K: int, G: int, out_dtype) -> str:
  """Name of an entry; arguments as `config.clocks`."""
  bucket = lambda size: 1 << max(size - 1, 0).bit_length()
  if config_lib.one_d(kind):
    K = bucket(K)
  else:
    M = bucket(M)
  many = "many" if G > 1 else "one"
  return f"{kind},{many},N{N},K{K},M{M},{jnp.dtype(out_dtype).name}"


@functools.cache
def read(device: str) -> dict:
  """The device's table; {} where there is none."""
  found = path(device)
  return json.loads(found.read_text()) if found.exists() else {}


def lookup(device: str, kind: str, M: int, N: int, K: int, G: int = 1, out_dtype=jnp.bfloat16
           ) -> GemmConfig:
  """The measured configuration, or `config.heuristic` where none is or it cannot run.

  Args:
    device: device kind.
    Others as `config.clocks`.
  """
  entry = read(device).get("gemm", {}).get(key(kind, M, N, K, G, out_dtype))
  if entry is not None:
    config = GemmConfig.from_dict(entry)
    if not config_lib.legal(config, kind, M, N, K, out_dtype):
      return config
  return config_lib.heuristic(kind, M, N, K, G, out_dtype)
