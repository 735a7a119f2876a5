"""Where a run's numbers go: metrics.jsonl, TensorBoard, Weights & Biases, and the terminal."""

import importlib.util
import json
import math
import os
import sys
import time
import warnings
from typing import Any

import jax
import numpy as np

from dsv3_jax import files
from dsv3_jax.config import ConfigError

# Dense bf16 peak FLOP/s of a device, from the makers' data sheets.
_PEAKS = {
    "H100": 989.4e12, "H200": 989.4e12, "H800": 989.4e12, "A100": 312e12, "B200": 2250e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12,
    "TPU v6": 918e12,
}


def peak_flops(devices: int = 1) -> float:
  """FLOP/s of `devices` devices together: the data sheet's, or measured with a matmul (0.2 s)."""
  device = jax.local_devices()[0]
  for name, peak in _PEAKS.items():
    if name.lower() in device.device_kind.lower():
      return peak * devices
  size = 1024
  x = jax.device_put(np.ones((size, size), np.float32), device)
  matmul = jax.jit(lambda a: a @ a)
  matmul(x).block_until_ready()
  best, end = math.inf, time.perf_counter() + 0.15
  while time.perf_counter() < end:
    start = time.perf_counter()
    matmul(x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  # Virtual CPU devices share the cores that this matmul kept busy.
  return 2 * size**3 / best * (1 if device.platform == "cpu" else devices)


def plain(value: Any) -> Any:
  """Arrays and numpy scalars as JSON values; what is not finite becomes None."""
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [plain(v) for v in value]
  if isinstance(value, np.ndarray | np.generic | jax.Array):
    return plain(np.asarray(value).tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


class JsonLines:
  """metrics.jsonl: one object a line, appended and flushed.

  Args:
    path: the file.
    step: the step that the run goes on from; lines of later steps, and a line cut short by a
      crash, are removed first.
  """

  def __init__(self, path: str, step: int):
    if os.path.exists(path):
      with open(path, "rb") as f:
        lines = f.read().splitlines(keepends=True)
      kept = [line for line in lines if self._keep(line, step)]
      if kept != lines:
        files.write_atomic(path, b"".join(kept))
    self._file = open(path, "a")

  @staticmethod
  def _keep(line: bytes, step: int) -> bool:
    try:
      return line.endswith(b"\n") and json.loads(line)["step"] <= step
    except (ValueError, KeyError, TypeError):
      return False

  def write(self, record: dict[str, Any]) -> None:
    self._file.write(json.dumps(record) + "\n")
    self._file.flush()

  def sync(self) -> None:
    """To the disk: a checkpoint must not be newer than the lines before it."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    self._file.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
  """The numbers of a metrics line as {"train/loss": ...}, for TensorBoard and W&B."""
  found = {}
  for key, value in {**record, **record.get("time", {})}.items():
    values = {key: value}
    if isinstance(value, list) and key == "mtp_loss":
      values = {f"{key}_{i + 1}": v for i, v in enumerate(value)}
    for name, v in values.items():
      if isinstance(v, int | float) and not isinstance(v, bool) and name != "step":
        found[f"{record['kind']}/{name}"] = float(v)
  return found


class TensorBoard:
  """Event files under workdir/tensorboard."""

  def __init__(self, folder: str, step: int):
    # tensorboardX imports torch wherever it is installed, eight seconds for nothing.
    hidden = {} if "torch" in sys.modules else {"torch": None}
    sys.modules.update(hidden)
    try:
      from tensorboardX import SummaryWriter
    finally:
      for name in hidden:
        del sys.modules[name]
    purge = step + 1 if step else None
    self._writer = SummaryWriter(folder, purge_step=purge, flush_secs=30)

  def write(self, record: dict[str, Any]) -> None:
    for name, value in scalars(record).items():
      self._writer.add_scalar(name, value, record["step"])
    if record["kind"] == "load":
      load_LE = np.asarray(record["load_LE"], np.float32)
      for layer, load_E in enumerate(load_LE):
        self._writer.add_histogram(f"load/layer_{layer}", load_E, record["step"])

  def close(self) -> None:
    self._writer.close()


class WandB:
  """Weights & Biases, wanted where its own environment names a project (WANDB_PROJECT).

  Args:
    folder: the run's workdir; a resumed run goes on with the W&B run that is noted there.
    config: plain dictionary.

  Raises:
    ConfigError: W&B does not start, for want of a login for example.
  """

  @staticmethod
  def wanted() -> bool:
    """Whether to log there; warns where it was asked for and is not installed."""
    project = os.environ.get("WANDB_PROJECT")
    if not project or os.environ.get("WANDB_MODE") == "disabled":
      return False
    if "wandb" in sys.modules or importlib.util.find_spec("wandb") is not None:
      return True
    warnings.warn(f"WANDB_PROJECT={project} asks for Weights & Biases, but the package wandb is "
                  "not installed: nothing is sent there; pip install wandb, or unset "
                  "WANDB_PROJECT", stacklevel=2)
    return False

  def __init__(self, folder: str, config: dict[str, Any]):
    path = os.path.join(folder, "wandb_run_id")
    known = None
    if os.path.exists(path):
      with open(path) as f:
        known = f.read().strip()
    try:
      import wandb

      self._run = wandb.init(dir=folder, config=config, resume="allow",
                             id=os.environ.get("WANDB_RUN_ID") or known)
      self._run.define_metric("*", step_metric="step")  # a resumed run repeats steps
    except Exception as error:  # no login, no network, settings: the library raises many kinds
      raise ConfigError(f"Weights & Biases does not start: {error}; run `wandb login`, set "
                        "WANDB_MODE=offline, or unset WANDB_PROJECT") from error
    files.write_atomic(path, f"{self._run.id}\n")

  def write(self, record: dict[str, Any]) -> None:
    self._run.log(scalars(record) | {"step": record["step"]})

  def close(self) -> None:
    self._run.finish()


# --- the terminal ---------------------------------------------------------------------------------


def _short(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def progress_line(record: dict[str, Any], total_steps: int, eta_s: float | None) -> str:
  """One line of numbers about a training step."""
  loss = record["loss"]
  timing = record["time"]
  parts = [f"step {record['step']:,}/{total_steps:,}",
           f"loss {loss:.4f}" if loss is not None else "loss nan",
           f"{timing['tokens_per_s']:,.0f} tok/s"]
  if eta_s is not None:
    parts.append(f"ETA {_short(eta_s)}")
  if record["max_vio"] is not None:
    parts.append(f"MaxVio {record['max_vio']:.2f}")
  if timing.get("mfu") is not None:
    parts.append(f"MFU {timing['mfu']:.0%}")
  if record["skipped"]:
    parts.append(f"skipped {record['skipped']}")
  return "  ".join(parts)


class Silent:
  """A terminal that shows nothing; the interface of `ui` in `loop.run`."""

  def note(self, text: str) -> None:
    """Says something once."""

  def progress(self, line: str, done: float) -> None:
    """Shows where the run stands; `done` is its finished share."""

  def close(self) -> None:
    """Leaves the terminal as it was."""


class Lines(Silent):
  """For logs: prints a progress line every few seconds."""

  def __init__(self, every_s: float = 5.0, stream: Any = None):
    self._every_s = every_s
    self._stream = stream or sys.stdout
    self._last = -math.inf

  def note(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def progress(self, line: str, done: float) -> None:
    now = time.monotonic()
    if now - self._last >= self._every_s or done >= 1:
      self._last = now
      self.note(line)


class Live(Silent):
  """For people: one line that stays in its place, with a bar."""

  def __init__(self):
    from rich.console import Console
    from rich.live import Live as RichLive

    self._console = Console()
    self._live = RichLive(console=self._console, refresh_per_second=4, transient=False)
    self._live.start()

  def note(self, text: str) -> None:
    self._console.print(text, markup=False, highlight=False)

  def progress(self, line: str, done: float) -> None:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    grid = Table.grid(padding=(0, 1))
    grid.add_row(ProgressBar(total=1.0, completed=done, width=18), line)
    self._live.update(grid)

  def close(self) -> None:
    self._live.stop()


def terminal() -> Silent:
  """A live line on a terminal, plain lines elsewhere."""
  return Live() if sys.stdout.isatty() else Lines()


# --- all of it ------------------------------------------------------------------------------------


class Metrics:
  """Sends each record everywhere that it belongs.

  Args:
    workdir: the run's folder.
    step: the step that the run goes on from.
    config: plain dictionary, for W&B.
  """

  def __init__(self, workdir: str, step: int, config: dict[str, Any]):
    # First what can fail, so that nothing is left open.
    self._others: list[Any] = [WandB(workdir, config)] if WandB.wanted() else []
    self._others.append(TensorBoard(os.path.join(workdir, "tensorboard"), step))
    self._lines = JsonLines(os.path.join(workdir, "metrics.jsonl"), step)

  def write(self, record: dict[str, Any]) -> dict[str, Any]:
    """Writes a record (arrays allowed) and returns it as plain JSON values."""
    record = plain(record)
    self._lines.write(record)
    for other in self._others:
      other.write(record)
    return record

  def sync(self) -> None:
    self._lines.sync()

  def close(self) -> None:
    self._lines.close()
    for other in self._others:
      other.close()


class Unwritten:
  """The interface of `Metrics` in processes that write nothing."""

  def write(self, record: dict[str, Any]) -> dict[str, Any]:
    return plain(record)

  def sync(self) -> None:
    pass

  def close(self) -> None:
    pass


def load_of(counts_LE: Any) -> np.ndarray:
  """Relative expert load: 1 where an expert got its share of its layer's tokens."""
  counts_LE = np.asarray(counts_LE, np.float32)
  return counts_LE / np.maximum(counts_LE.mean(-1, keepdims=True), 1e-9)
