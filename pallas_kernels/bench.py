"""Times the kernels on V3's shapes against peers and the device's limits, in one process.

    python -m pallas_kernels.bench            writes benchmarks/results/kernels-<device>.json
    python -m pallas_kernels.bench --only dense mla
    python -m pallas_kernels.bench --dry      one tiny case a family, interpreted, untimed

A line: us | TFLOP/s | GB/s | x peer | x bf16 | % of limit | % of published. Each kernel is first
compared with its definition on its own random operands, and not timed where it is wrong; so is the
peer. The peer of a GEMM is cuBLASLt's block-scaled FP8 through torch, if torch sees the GPU
(grouped products have none); bf16 is XLA's `jnp.dot` or `lax.ragged_dot`; the peer of the others
is the same written in jnp and compiled by XLA. The limit is the longer of work over the data
sheet's FP8 (decode: bf16) rate and of bytes over the bandwidth of a copy, measured here. Published
are DeepGEMM's rates on an H800 (`shapes`).
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import re
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import cases, peers, reference, shapes, timing
from pallas_kernels.cases import Case
from pallas_kernels.mosaic import tables

TOLERANCE = 1e-3  # DeepGEMM's metric against the definition
ROWS = 256  # of a GEMM that are compared
_HEADER = ("kernel", "us", "TFLOP/s", "GB/s", "x peer", "x bf16", "% of limit", "% of published")
_WIDTHS = (34, 9, 8, 7, 7, 7, 10, 14)


@dataclasses.dataclass
class Line:
  """One kernel's numbers.

  Attributes:
    name: of the case.
    us, method: time of a call and how it was taken; None where the result was wrong.
    tflops, gbs: rates.
    error: DeepGEMM's metric against the definition.
    peer_us, bf16_us: times of the peers, None where there is none.
    limit_us: what the device allows at best.
    published: TFLOP/s.
    config: of a GEMM.
    note: what went wrong, if anything did.
  """

  name: str
  us: float | None = None
  method: str = ""
  tflops: float | None = None
  gbs: float | None = None
  error: float | None = None
  peer_us: float | None = None
  bf16_us: float | None = None
  limit_us: float | None = None
  published: float = 0.0
  config: dict | None = None
  note: str = ""

  def __str__(self) -> str:
    def ratio(over, under, percent=False):
      if not over or not under:
        return "-"
      return f"{100 * over / under:.0f} %" if percent else f"{over / under:.2f}x"

    us = f"{self.us:.1f}" if self.us else "-"
    rate = f"{self.tflops:.0f}" if self.tflops else "-"
    bytes_rate = f"{self.gbs:.0f}" if self.gbs else "-"
    cells = (self.name, us, rate, bytes_rate, ratio(self.peer_us, self.us),
             ratio(self.bf16_us, self.us), ratio(self.limit_us, self.us, True),
             ratio(self.tflops, self.published, True))
    return row(*cells) + (f"  {self.note}" if self.note else "")


def row(*cells: str) -> str:
  return " | ".join(c.ljust(w) for c, w in zip(cells, _WIDTHS, strict=True))


def difference(x, y) -> float:
  """DeepGEMM's metric over all leaves of two results; the worst of them, NaN where one is."""
  found = jax.jit(lambda x, y: jnp.stack(
      jax.tree.leaves(jax.tree.map(reference.difference, x, y))).max())
  return abs(float(found(x, y)))


def check(case: Case, operands: tuple, result) -> float:
  """The metric of a kernel's result against its definition."""
  if case.shape is None:
    return difference(result, jax.jit(case.plain)(*operands))
  rows = min(ROWS, case.shape.m)
  expected = jax.jit(lambda *args: cases.gemm_rows(case.shape, args, rows))(*operands)
  return difference(cases.first_rows(case.shape, result, rows), expected)


def operand_sets(make: Callable, seed: int) -> list[tuple]:
  """Enough random operand sets that none stays in the cache."""
  size = sum(math.prod(x.shape) * x.dtype.itemsize
             for x in jax.tree.leaves(jax.eval_shape(make, jax.random.key(0))))
  make = jax.jit(make)
  return [make(key) for key in jax.random.split(jax.random.key(seed), timing.sets_for(size))]


def copy_bandwidth() -> float:
  """Bytes/s, read and written, of the fastest plain pass over 512 MB."""
  sets = [(jax.random.bits(jax.random.key(i), (2**28,), jnp.uint16),) for i in range(4)]
  return 2 * 2**29 / timing.measure(lambda x: ~x, sets).median * 1e6


def measure(case: Case, *, num_sms: int, bandwidth: float, limits: shapes.Limits | None,
            torch, seed: int) -> Line:
  """All numbers of one case on the device."""
  line = Line(case.name, published=case.shape.published if case.shape else 0.0)
  rate = limits and (limits.bf16 if case.shape is None else limits.fp8)
  line.limit_us = 1e6 * max(case.bytes / bandwidth, case.flops / rate if rate else 0.0)
  sets = operand_sets(case.operands, seed)
  kernel = case.kernel(num_sms=num_sms)
  line.error = check(case, sets[0], jax.jit(kernel)(*sets[0]))
  if not line.error < TOLERANCE:
    line.note = f"WRONG: differs from the definition by {line.error:.2g}"
    return line
  found = timing.measure(kernel, sets)
  line.us, line.method = found.median, found.method
  line.tflops = case.flops / found.median / 1e6 or None
  line.gbs = case.bytes / found.median / 1e3
  if case.shape is None:
    line.peer_us = _attempt(line, "XLA", lambda: timing.measure(case.plain, sets).median)
  elif torch is not None and case.shape.kind in ("dense", "wgrad"):
    line.peer_us = _attempt(line, "cuBLASLt", lambda: _cublas(torch, case, sets))
  if case.shape is not None:
    del sets
    line.bf16_us = _attempt(line, "bf16", lambda: timing.measure(
        peers.bf16(case.shape), operand_sets(
            lambda key: peers.bf16_operands(case.shape, key), seed + 1)).median)
  return line


def _attempt(line: Line, what: str, run: Callable[[], float]) -> float | None:
  """A peer's time; what it refuses is noted."""
  try:
    return run()
  except Exception as error:  # a peer's failure is no reason to lose our own numbers
    line.note += f"{what}: {type(error).__name__}: {str(error).splitlines()[0][:120]} "
    return None


def _cublas(torch, case: Case, sets: list[tuple]) -> float:
  """Microseconds of cuBLASLt, once its result is right: a wrong layout of scales is silent."""
  run = peers.cublas(torch, case.shape)
  jax.block_until_ready(sets)
  converted = [peers.cublas_operands(torch, case.shape, s) for s in sets]
  result = jnp.from_dlpack(run(*converted[0]).contiguous())
  error = check(case, sets[0], result)
  if not error < TOLERANCE:
    raise ValueError(f"its result differs from the definition by {error:.2g}")
  return peers.measure_torch(torch, run, converted).median


def versions() -> dict[str, str]:
  found = {"python": platform.python_version()}
  for package in ("jax", "jaxlib", "jax-cuda13-plugin", "torch"):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def rehearse(case: Case) -> Line:
  """The case interpreted once and compared."""
  make = jax.jit(case.operands)
  operands = make(jax.random.key(0))
  result = jax.jit(case.kernel(num_sms=2, interpret=True))(*operands)
  line = Line(case.name, error=check(case, operands, result))
  line.note = f"{'agrees to' if line.error < TOLERANCE else 'WRONG:'} {line.error:.1g}"
  return line


def dry_cases() -> list[Case]:
  """One tiny GEMM and one tiny quantizer."""
  return [cases.gemm_case(shapes.Gemm("dense", 128, 128, 256), cases.TINY),
          cases.quantize_case("rows", 128, 256)]


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--only", nargs="+", default=[], metavar="TEXT",
                 help="cases whose name contains one of these")
  p.add_argument("--json", type=pathlib.Path,
                 help="default: benchmarks/results/kernels-<device>.json")
  p.add_argument("--dry", action="store_true")
  args = p.parse_args(argv)
  if args.dry:
    jax.config.update("jax_platforms", "cpu")
  else:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory too
    if jax.default_backend() != "gpu":
      print("bench: no GPU: nothing was timed (--dry rehearses)")
      return 2
  device = jax.devices()[0]
  content = {"device": device.device_kind, "dry": args.dry, "versions": versions(),
             "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
  if args.dry:
    found = dry_cases()
    run = rehearse
  else:
    found = [cases.gemm_case(s, tables.lookup(device.device_kind, *cases.arguments(s)))
             for s in shapes.GEMMS] + cases.others()
    bandwidth, torch = copy_bandwidth(), peers.torch_module()
    content["copy_GBs"] = bandwidth / 1e9
    print(f"{device.device_kind}: a copy moves {bandwidth / 1e12:.2f} TB/s; "
          + ("peer: cuBLASLt of torch " + torch.__version__ if torch else "no torch with CUDA"))

    def run(case):
      try:
        line = measure(case, num_sms=device.core_count, bandwidth=bandwidth, torch=torch,
                       limits=shapes.limits(device.device_kind), seed=os.getpid())
      except Exception as error:  # the other cases' numbers are still wanted
        line = Line(case.name, note=f"FAILED: {type(error).__name__}: {str(error)[:200]}")
      if case.shape is not None:
        config = tables.lookup(device.device_kind, *cases.arguments(case.shape))
        line.config = config.to_dict()
      return line

  slug = re.sub(r"[^a-z0-9]+", "_", device.device_kind.lower()).strip("_")
  path = args.json or pathlib.Path("benchmarks/results") / f"kernels-{slug}.json"
  print(row(*_HEADER))
  lines: list[Line] = []
  for case in found:
    if args.only and not any(text in case.name for text in args.only):
      continue
    lines.append(run(case))
    print(lines[-1], flush=True)
    if args.json or not args.dry:
      _write(path, content | {"lines": [dataclasses.asdict(x) for x in lines]})
  wrong = [x.name for x in lines if "WRONG" in x.note or "FAILED" in x.note]
  print(f"{len(lines)} cases, {len(wrong)} wrong" + (f": {', '.join(wrong)}" if wrong else ""))
  return int(bool(wrong) or not lines)


def _write(path: pathlib.Path, content: dict) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
  os.replace(temporary, path)


if __name__ == "__main__":
  sys.exit(main())
