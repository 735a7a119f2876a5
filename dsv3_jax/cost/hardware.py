"""Devices: what their data sheets promise, and the shares of it that programs reach.

A `Hardware` is plain numbers in SI units (FLOP/s, bytes, bytes/s one way, dollars). `Shares` are
the few measured efficiencies that everything else is computed with. They were taken from published
measurements of single kernels on an H800, never from the time of a whole step, so that the step
time is a prediction:

    matmul, output   DeepGEMM's table of 2025-02-26, at 4096 rows: the main loop reaches `matmul` of
                     the peak, and then the results leave at `output` of the memory bandwidth.
                     Fitted to o_proj, kv_b; q_b, gate+up, down come out within 4 %, the narrow
                     2112 x 7168 at -17 %, the four grouped rows within 5 % (tests/cost)
    operands         the same table at 64 and 128 rows, which the operands' bytes limit: the mean
    attention        profile trace of the report's authors (profile-data), 4096 tokens on 112 of
                     132 SMs: 1.2 ms forward; backward what is left of the 22.0 ms of attention
                     kernels in 4 layers, 22.0 / 4 - 1.2 = 4.3 ms. The trace's
                     one backward kernel is 3.9 ms, which would be a share of 0.55, not 0.495
    stream, cast     the same trace: norms, RoPE, SwiGLU, permutation; casts and transposes. Their
                     milliseconds over the bytes that operations.py counts for them
    overlap          the same trace: share of an overlapped pair that the compute stream is busy
    slow, fast       DeepEP at 64 ranks, 46 GB/s, of which 7/8 cross, on links of 50; NVLink's 160
                     of 200 (report 3.2.2)

Other devices inherit these shares unless their own are known: an assumption, not a measurement.
"""

import dataclasses
import difflib
import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

from dsv3_jax import config
from dsv3_jax.config import ConfigError

HOPPER_SMS = 132


@dataclasses.dataclass(frozen=True)
class Shares:
  """Reached shares of a device's peaks; see the file's docstring for where they come from."""

  matmul: float = 0.717
  output: float = 0.585
  operands: float = 0.70
  attention_forward: float = 0.683
  attention_backward: float = 0.495
  stream: float = 0.64
  cast: float = 0.29
  overlap: float = 0.92
  fast: float = 0.80
  slow: float = 0.80

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 < value <= 1:
        raise ConfigError(f"hardware: shares.{field.name}={value} must lie in (0, 1]")


@dataclasses.dataclass(frozen=True)
class Hardware:
  """One device and its links.

  Attributes:
    name: as it is printed.
    bf16, fp8, fp32: dense matmul FLOP/s with operands of that kind.
    vector: fp32 FLOP/s outside the matrix units, where FP8 partial sums are promoted every 128
      values (report 3.3.2); 0: not needed.
    memory: bytes.
    bandwidth: bytes/s of that memory.
    fast, slow: bytes/s that a device sends within its fast domain (NVLink, ICI), and out of it
      (InfiniBand, DCN); 0: no such link.
    fast_devices: devices of a fast domain.
    hops: fast links that a row of an all-to-all crosses on its way; 1 behind a switch.
    sms: processors of a device, `comm_sms` of which move data; 0, 0 where others do.
    native_scales: what if the matrix units scaled and summed by themselves (report 3.5).
    fused_cast: what if FP8 casts happened on the way into the chip.
    transposed_reads: what if matmuls read their operands transposed.
    fused_attention: scores stay on the chip.
    price: dollars an hour; 0: not stated.
    shares: reached shares of these peaks.
    note: what to know of the figures.
  """

  name: str
  bf16: float
  fp8: float
  fp32: float
  memory: float
  bandwidth: float
  vector: float = 0.0
  fast: float = 0.0
  slow: float = 0.0
  fast_devices: int = 1
  hops: float = 1.0
  sms: int = 0
  comm_sms: int = 0
  native_scales: bool = False
  fused_cast: bool = False
  transposed_reads: bool = False
  fused_attention: bool = True
  price: float = 0.0
  shares: Shares = Shares()
  note: str = ""

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"hardware: {field.name}={value} must be a finite number")
    for name in ("bf16", "fp8", "fp32", "memory", "bandwidth", "fast_devices", "hops"):
      if getattr(self, name) <= 0:
        raise ConfigError(f"hardware: {name}={getattr(self, name)} must be positive")
    for name in ("vector", "fast", "slow", "sms", "comm_sms", "price"):
      if getattr(self, name) < 0:
        raise ConfigError(f"hardware: {name}={getattr(self, name)} must not be negative")
    if self.sms and self.comm_sms >= self.sms:
      raise ConfigError(f"hardware: comm_sms={self.comm_sms} leaves none of sms={self.sms} for "
                        "computing")

  @property
  def compute_share(self) -> float:
    """Share of the processors that compute."""
    return (self.sms - self.comm_sms) / self.sms if self.sms else 1.0

  def peak(self, precision: str) -> float:
    """Dense FLOP/s with operands in "fp8", "bf16" or "fp32"."""
    return {"fp8": self.fp8, "bf16": self.bf16, "fp32": self.fp32}[precision]


def _hopper(name: str, **figures) -> Hardware:
  """SXM5. Peaks: NVIDIA H100 data sheet, dense. fp32: TF32, what XLA multiplies fp32 with there."""
  return Hardware(**{
      "name": name, "bf16": 989.5e12, "fp8": 1979e12, "fp32": 494.7e12, "vector": 66.9e12,
      "memory": 80e9, "bandwidth": 3.35e12, "slow": 50e9,  # one 400 Gb/s adapter a GPU
      "fast_devices": 8, "sms": HOPPER_SMS,
      "comm_sms": 20,  # report 3.2.2; the trace's kernels run on the other 112
      **figures})


def _presets() -> dict[str, Hardware]:
  return {
      # NVLink 400 GB/s both ways (arXiv 2505.09343), of which about 160 one way are reached. Price:
      # the report's assumption.
      "h800": _hopper("H800", fast=200e9, price=2.0),
      # NVLink 900 GB/s both ways (data sheet). Prices differ between clouds: give yours with
      # --price.
      "h100": _hopper("H100", fast=450e9),
      # Data sheet: 141 GB HBM3e at 4.8 TB/s; the rest is an H100's.
      "h200": _hopper("H200", fast=450e9, memory=141e9, bandwidth=4.8e12),
      # HGX B200 data sheet at 1,000 W, dense: 2.25 and 4.5 PFLOP/s, TF32 1.1 PFLOP/s, 180 GB
      # at 8 TB/s, NVLink 1.8 TB/s both ways, 400 Gb/s adapters.
      # 24 SMs for communication: DeepEP V2's smaller setting.
      "b200": Hardware(
          "B200", bf16=2250e12, fp8=4500e12, fp32=1100e12, memory=180e9, bandwidth=8e12,
          fast=900e9, slow=50e9, fast_devices=8, sms=148, comm_sms=24,
          note="shares of a Hopper assumed; no promotion: scales of 1x32 (MX) in the matrix units"),
      # Cloud TPU's pages of v5p and TPU7x, per chip: peaks (no FP8 units on v5p), GiB, GB/s, ICI
      # both ways 1,200 GB/s, DCN 50 and 100 Gb/s. fp32: six bf16 passes. ICI is a torus of three
      # dimensions: within a cube of 4 x 4 x 4 a row crosses three links on average.
      "v5p": Hardware(
          "TPU v5p", bf16=459e12, fp8=459e12, fp32=459e12 / 6, memory=95 * 2**30,
          bandwidth=2765e9, fast=600e9, slow=6.25e9, fast_devices=8960,
          hops=3.0, note="shares of a Hopper assumed"),
      "ironwood": Hardware(
          "TPU7x (Ironwood)", bf16=2307e12, fp8=4614e12, fp32=2307e12 / 6, memory=192 * 2**30,
          bandwidth=7380e9, fast=600e9, slow=12.5e9, fast_devices=9216,
          hops=3.0, note="shares of a Hopper assumed"),
  }


HARDWARE: types.MappingProxyType[str, Hardware] = types.MappingProxyType(_presets())


def get(name: str) -> Hardware:
  """A preset by name, "cpu" (measured here, in some 0.2 s), or a JSON file's (`*.json`).

  Raises:
    ConfigError: no such preset (the nearest is named), or a file that does not describe one.
  """
  if name.endswith(".json"):
    return read(Path(name))
  name = name.lower()
  if name == "cpu":
    return measure_cpu()
  if name not in HARDWARE:
    near = difflib.get_close_matches(name, HARDWARE, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(HARDWARE)}, cpu"
    raise ConfigError(f"--hardware={name}: there is none such; {hint}, or a JSON file (--hardware="
                      "mine.json)")
  return HARDWARE[name]


def read(path: Path, inside: tuple[Path, ...] = ()) -> Hardware:
  """A `Hardware` from JSON: its fields, or {"base": "h100", changed fields}.

  Args:
    path: the file; its base may be another one.
    inside: files whose base this one is.

  Raises:
    ConfigError: no such file, not JSON, an unknown field, a wrong type or an impossible value.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ConfigError(f"--hardware={path}: {error.strerror}") from error
  except ValueError as error:
    raise ConfigError(f"--hardware={path}: not JSON ({error})") from error
  if not isinstance(values, dict):
    raise ConfigError(f"--hardware={path}: an object with the fields of a device is expected")
  base, shares = values.pop("base", None), values.get("shares", {})
  if not isinstance(shares, dict):
    raise ConfigError(f"--hardware={path}: shares={shares!r} must be an object, such as "
                      '{"overlap": 0.9}')
  if base is not None:
    if not isinstance(base, str):
      raise ConfigError(f"--hardware={path}: base={base!r} must be a device's name "
                        f"({', '.join(HARDWARE)}, cpu) or a JSON file's")
    files = (*inside, path.resolve())
    if base.endswith(".json") and Path(base).resolve() in files:
      raise ConfigError(f"--hardware={path}: base={base!r} is the file itself, or starts from it; "
                        f"name a device ({', '.join(HARDWARE)})")
    start = dataclasses.asdict(read(Path(base), files) if base.endswith(".json") else get(base))
    values = start | values | {"shares": start["shares"] | shares}
  missing = [f.name for f in dataclasses.fields(Hardware)
             if f.default is dataclasses.MISSING and f.name not in values]
  if missing:
    raise ConfigError(f"--hardware={path}: {', '.join(missing)} missing; give them, or a \"base\" "
                      f"({', '.join(HARDWARE)}) to start from")
  try:
    return config.from_dict(values, Hardware)
  except ConfigError as error:
    raise ConfigError(f"--hardware={path}: {error}") from error


def to_json(hardware: Hardware) -> str:
  """As `read` takes it."""
  return json.dumps(dataclasses.asdict(hardware), indent=2)


_CORE = """
import sys, time
import numpy as np
a, out = np.ones((512, 512), np.float32), np.empty((512, 512), np.float32)
source, best = np.ones(2**23, np.float32), [1e9, 1e9]
target = np.empty_like(source)
calls = lambda: np.matmul(a, a, out=out), lambda: np.copyto(target, source)
for i, call in enumerate(calls):
  call()
  end = time.perf_counter() + float(sys.argv[1]) / 2
  while time.perf_counter() < end:
    start = time.perf_counter()
    call()
    best[i] = min(best[i], time.perf_counter() - start)
print(2 * 512**3 / best[0], 2 * source.nbytes / best[1])
"""


def measure_cpu(seconds: float = 0.2) -> Hardware:
  """This machine: fp32 matmul and memory bandwidth, measured with numpy.

  A process with one thread measures one core, and the cores multiply: threads of several would wait
  for each other wherever another program holds a core, which makes numpy's matmul a tenth as fast
  on a busy machine. The best of many short calls counts, for the same reason. Shares are 1, since
  what is measured is what is reached; links there are none.

  Args:
    seconds: to spend, half on each, besides some 0.2 s to start.
  """
  threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"), "1")
  done = subprocess.run([sys.executable, "-c", _CORE, str(seconds)], env=os.environ | threads,
                        capture_output=True, text=True, check=True, timeout=60)
  core, rate = map(float, done.stdout.split())
  flops = core * (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                  else os.cpu_count() or 1)
  try:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  except (AttributeError, ValueError, OSError):
    memory = 8 * 2**30
  ones = Shares(**{f.name: 1.0 for f in dataclasses.fields(Shares)})
  return Hardware("CPU (measured)", bf16=flops, fp8=flops, fp32=flops, memory=float(memory),
                  bandwidth=rate, fused_attention=False, shares=ones,
                  note="bf16 and fp8 counted as fp32; shares of 1")
