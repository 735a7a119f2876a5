"""Several devices for a server: the mesh, experts in slots, and a record of their load."""

import json
import logging
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import balance, slots
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.parallel import mesh as mesh_lib

_log = logging.getLogger(__name__)
RECORD = "metrics.jsonl"  # as in a run's workdir, so that who reads one reads the other


def sizes(text: str) -> config.Mesh:
  """The mesh that `NODESxGPUS`, or `COPIESxNODESxGPUS`, names.

  Raises:
    ConfigError: it is neither.
  """
  if not re.fullmatch(r"([1-9]\d*x){1,2}[1-9]\d*", text):
    raise ConfigError(f"--mesh={text}: write NODESxGPUS, such as 2x4, or COPIESxNODESxGPUS, which "
                      "has all experts so many times")
  *data, node, gpu = map(int, text.split("x"))
  return config.Mesh(data=data[0] if data else 1, node=node, gpu=gpu)


def spread(cfg: config.Model, weights: Parameters, runtime: config.Runtime, sizes: config.Mesh,
           redundant: int = 0, load_LE: np.ndarray | None = None) -> dict[str, Any]:
  """What `Engine` takes for several devices: weights, runtime, mesh, expert_LI.

  Args:
    cfg, weights, runtime: of a generator.
    sizes: of the mesh.
    redundant, load_LE: see `balance.first`.

  Raises:
    ConfigError: fewer devices than the mesh has, or experts that cannot be cut so.
  """
  mesh = mesh_lib.make_mesh(sizes)
  expert_LI = balance.first(cfg, mesh, redundant, load_LE)
  return dict(weights=slots.place(weights, expert_LI, mesh), mesh=mesh, expert_LI=expert_LI,
              runtime=config.replace(runtime, mesh=sizes))


class Recorder:
  """Appends the load of each window to a file: a line of kind "load", its step the Unix time.

  Args:
    folder: is made if it is not there.

  Raises:
    OSError: it cannot be written to.
  """

  def __init__(self, folder: str | Path):
    Path(folder).mkdir(parents=True, exist_ok=True)
    self._path = Path(folder) / RECORD
    self._append("")

  def __call__(self, load_LE: np.ndarray) -> None:
    """Takes a window; nobody was served in it: no line. A full disk is said and costs the line."""
    if not load_LE.any():
      return
    line = json.dumps({"kind": "load", "step": int(time.time()),
                       "load_LE": load_LE.astype(int).tolist()})
    try:
      self._append(line + "\n")
    except OSError as error:
      _log.error("%s: the load of a window is lost: %s", self._path, error)

  def _append(self, text: str) -> None:
    # One write, so that a line is whole or, on a crash, the last one.
    with open(self._path, "ab") as file:
      if text and file.tell() and not self._ends():
        text = "\n" + text
      file.write(text.encode())

  def _ends(self) -> bool:
    with open(self._path, "rb") as file:
      file.seek(-1, os.SEEK_END)
      return file.read() == b"\n"
