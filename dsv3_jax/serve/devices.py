"""Several devices for a server: the mesh, experts in slots, and a record of their load."""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import balance, slots
from dsv3_jax.infer.disaggregated import Disaggregated, Reader, Writer
from dsv3_jax.infer.engine import Engine
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


def spread(weights: Parameters, cfg: config.Model, runtime: config.Runtime,
           sizes: config.Mesh | None, redundant: int = 0, load_LE: np.ndarray | None = None,
           after: int = 0) -> dict[str, Any]:
  """What `Engine` takes of its devices: weights, runtime, mesh, expert_LI.

  Args:
    weights, cfg, runtime: of a generator.
    sizes: of the mesh; None: one device.
    redundant, load_LE: see `balance.first`.
    after: how many of the devices are another engine's.

  Raises:
    ConfigError: fewer devices than that takes, or experts that cannot be cut so.
  """
  here = jax.devices()[after:]
  if sizes is None:
    return dict(weights=jax.device_put(weights, here[0]) if after else weights, runtime=runtime)
  mesh = mesh_lib.make_mesh(sizes, here)
  expert_LI = balance.first(cfg, mesh, redundant, load_LE)
  return dict(weights=slots.place(weights, expert_LI, mesh), mesh=mesh, expert_LI=expert_LI,
              runtime=config.replace(runtime, mesh=sizes))


def check(sizes: config.Mesh | None, apart: bool) -> None:
  """Raises ConfigError if there are too few devices, before a model is loaded.

  Args:
    sizes: of an engine's mesh; None: one device.
    apart: whether there are two engines.
  """
  needed = (1 + apart) * (sizes.devices if sizes else 1)
  if needed > len(jax.devices()):
    asked = " and ".join(["--mesh"] * (sizes is not None) + ["--apart"] * apart)
    raise ConfigError(
        f"{asked}: {needed} devices are needed, and {len(jax.devices())} {jax.default_backend()} "
        "device(s) are present; use fewer, or split a CPU with "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={needed}")


@contextlib.contextmanager
def beside(sizes: config.Mesh | None) -> Iterator[None]:
  """Arrays go to the host's memory meanwhile: a model that is cut over devices fits none of them.

  Args:
    sizes: of the mesh; None: nothing changes.
  """
  with jax.default_device(jax.devices("cpu")[0]) if sizes else contextlib.nullcontext():
    yield


def make_engine(apart: bool, record: str | None, cfg: config.Model, sizes: config.Mesh | None,
                redundant: int, load_LE: np.ndarray | None, weights: Parameters,
                runtime: config.Runtime, **how: Any) -> Engine | Disaggregated:
  """An engine, or two of which one reads prompts and the other writes.

  Args:
    apart: whether there are two, each on devices of its own.
    record: folder for the load of experts; of two engines "prefill" and "decode" within.
    cfg, sizes, redundant, load_LE, weights, runtime: see `spread`.
    how: the rest of `Engine`'s arguments.

  Raises:
    ConfigError: see `spread` and `Engine`.
    OSError: the folder cannot be written to.
  """
  def make(kind: type[Engine], name: str, after: int = 0) -> Engine:
    made = kind(cfg, **how, **spread(weights, cfg, runtime, sizes, redundant, load_LE, after))
    if record:
      made.batches.watch.on_load = Recorder(Path(record) / name)
    if load_LE is not None and made.balancer is not None:
      made.balancer.remember(load_LE)
    return made

  if not apart:
    return make(Engine, "")
  writer = make(Writer, "decode")
  return Disaggregated(make(Reader, "prefill", sizes.devices if sizes else 1), writer)


class Recorder:
  """Appends the load of each window to a file: a line of kind "load", its step the Unix time.

  Args:
    folder: is made if it is not there.

  Raises:
    OSError: it cannot be written to.
  """

  def __init__(self, folder: str | Path):
    Path(folder).mkdir(parents=True, exist_ok=True)
    self._path, self._last = Path(folder) / RECORD, 0
    self._append("")

  def __call__(self, load_LE: np.ndarray) -> None:
    """Takes a window; nobody was served in it: no line. A full disk is said and costs the line."""
    if not load_LE.any():
      return
    self._last = max(self._last + 1, int(time.time()))  # of equal steps a reader takes the last
    line = json.dumps({"kind": "load", "step": self._last, "load_LE": load_LE.astype(int).tolist()})
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
