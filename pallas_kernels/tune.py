"""Finds the fastest configuration of the GEMM kernel for each of V3's shapes on this GPU.

    python -m pallas_kernels.tune                      every shape that the table lacks
    python -m pallas_kernels.tune --minutes 8          stops in time; the same command goes on
    python -m pallas_kernels.tune --only grouped --again
    python -m pallas_kernels.tune --dry                all steps on a tiny shape, on any machine

A shape's legal configurations, likeliest first by the model's estimate, are compiled; those that
spill registers are dropped; the rest run on random operands, several sets in turn (`timing`), and
have to give the first one's result. The fastest goes to tables/<device>.json, with the time of
each, after every shape. A shape counts as done if the table has it for this version of jax.

A rehearsal interprets what it would time, makes the times up, and never writes a table. Without a
GPU there is nothing to tune: the status is 2, and training uses the heuristic.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax

from pallas_kernels import cases, reference, shapes, timing
from pallas_kernels.aot import build, toolchain
from pallas_kernels.aot.report import Report
from pallas_kernels.mosaic import compat, tables
from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic.config import GemmConfig

AGREE = 1e-5  # DeepGEMM's metric against the definition; rounding to bf16 makes 1e-6 of it
ROWS = 256  # of a result that are compared
LATE = "no time was left"
DRY = shapes.Gemm("dense", 128, 128, 256)


@dataclasses.dataclass(frozen=True)
class Tried:
  """One configuration's outcome: its time, or why it has none."""

  config: GemmConfig
  us: float | None = None
  why: str = ""
  method: str = ""


def candidates(shape: shapes.Gemm, most: int) -> list[GemmConfig]:
  """The likeliest configurations of a shape, at most `most`."""
  return config_lib.candidates(*cases.arguments(shape))[:most]


def spill_reports(shape: shapes.Gemm, configs: list[GemmConfig], tools: toolchain.Toolchain,
                  jobs: int) -> Iterator[Report]:
  """What compiling each configuration says, in order."""
  abstract = jax.eval_shape(lambda: cases.gemm_operands(shape, jax.random.key(0)))

  def builder(config: GemmConfig) -> Callable:
    return lambda: (cases.gemm_call(shape, config), abstract)

  for _, report in build.reports([(str(i), builder(c)) for i, c in enumerate(configs)], tools,
                                 jobs=jobs):
    yield report


def tune(shape: shapes.Gemm, configs: list[GemmConfig], *, deadline: float,
         measure: Callable = timing.measure, interpret: bool = False, num_sms: int = 132
         ) -> list[Tried]:
  """Times configurations of a shape, in order; stops at the deadline (`time.monotonic`).

  Args:
    deadline: see above.
    measure: (operation, operand sets) to a `timing.Time`.
    interpret, num_sms: see `cases.gemm_call`.
  """
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(
      jax.eval_shape(lambda: cases.gemm_operands(shape, jax.random.key(0)))))
  make = jax.jit(cases.gemm_operands, static_argnums=0)
  seeds = jax.random.split(jax.random.key(time.time_ns() % 2**31), timing.sets_for(size))
  sets = [make(shape, key) for key in (seeds[:1] if interpret else seeds)]

  def compiled(config: GemmConfig):
    operation = cases.gemm_call(shape, config, num_sms=num_sms, interpret=interpret)
    return operation if interpret else jax.jit(operation).lower(*sets[0]).compile()

  compare, rows = jax.jit(reference.difference), min(ROWS, shape.m)
  want = jax.jit(lambda *args: cases.gemm_rows(shape, args, rows))(*sets[0])
  tried: list[Tried] = []
  # Compiling takes longer than running, and threads can do it while the device is busy.
  workers = 1 if interpret else min(8, os.cpu_count() or 1)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending = [pool.submit(compiled, config) for config in configs]
    for config, future in zip(configs, pending, strict=True):
      if time.monotonic() > deadline:
        future.cancel()
        tried.append(Tried(config, why=LATE))
        continue
      try:
        result = future.result()(*sets[0])
        wrong = float(compare(cases.first_rows(shape, result, rows), want))
        if not wrong < AGREE:
          tried.append(Tried(config, why=f"differs from the definition by {wrong:.2g}"))
          continue
        found = measure(cases.gemm_call(shape, config, num_sms=num_sms, interpret=interpret), sets)
      except Exception as error:  # one configuration that the device refuses must not end the run
        tried.append(Tried(config, why=f"{type(error).__name__}: {str(error)[:200]}"))
      else:
        tried.append(Tried(config, found.median, method=found.method))
  return tried


def record(shape: shapes.Gemm, tried: list[Tried]) -> dict | None:
  """The fastest configuration and what came of all; None where none ran."""
  timed = sorted((t for t in tried if t.us is not None), key=lambda t: t.us)
  if not timed:
    return None
  best = timed[0]
  return {
      "shape": shape.name, "config": best.config.to_dict(), "us": round(best.us, 3),
      "tflops": round(shape.flops / best.us / 1e6, 1), "method": best.method,
      "jax": jax.__version__, "times": [[round(t.us, 3), t.config.to_dict()] for t in timed],
      "dropped": [[t.why, t.config.to_dict()] for t in tried if t.us is None],
  }


def read(path: pathlib.Path) -> dict:
  """A table with its records; an empty one where there is no file."""
  found = json.loads(path.read_text()) if path.exists() else {}
  return {"gemm": {}, "measured": {}} | found


def write(path: pathlib.Path, table: dict) -> None:
  """Writes a table whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
  with os.fdopen(descriptor, "w") as file:
    json.dump(table, file, indent=1, sort_keys=True)
    file.write("\n")
  os.chmod(temporary, 0o644)
  os.replace(temporary, path)


def without_spills(shape: shapes.Gemm, configs: list[GemmConfig],
                   tools: toolchain.Toolchain | None, jobs: int
                   ) -> tuple[list[GemmConfig], list[Tried]]:
  """Configurations to time, and those that spill or do not compile."""
  if tools is None:
    return configs, []
  kept, dropped = [], []
  for config, report in zip(configs, spill_reports(shape, configs, tools, jobs), strict=True):
    if report.error or report.spills:
      dropped.append(Tried(config, why=report.error or f"spills {report.spills} bytes"))
    else:
      kept.append(config)
  return kept, dropped


def rehearse(tools: toolchain.Toolchain | None) -> dict:
  """All steps on a tiny shape; the times are invented."""
  configs = candidates(DRY, 2)
  if not compat.CLUSTERS:  # nor can this jax interpret them
    configs = [dataclasses.replace(c, cluster=None) for c in configs]
  kept, dropped = without_spills(DRY, configs, tools, jobs=1)
  invented = iter(range(1, 100))
  tried = tune(DRY, kept, deadline=time.monotonic() + 600, interpret=True, num_sms=2,
               measure=lambda *_: timing.Time(next(invented), 1.0, "invented"))
  return record(DRY, tried + dropped) or {}


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--minutes", type=float, default=60.0, help="for all (default %(default)g)")
  p.add_argument("--most", type=int, default=24,
                 help="configurations of a shape (default %(default)s)")
  p.add_argument("--only", nargs="+", default=[], metavar="TEXT",
                 help="shapes whose name contains one of these")
  p.add_argument("--again", action="store_true", help="also shapes that the table has")
  p.add_argument("--tables", type=pathlib.Path, default=tables.FOLDER, help="default: %(default)s")
  p.add_argument("--tools", type=pathlib.Path, metavar="FOLDER", help="see sass_check")
  p.add_argument("--json", type=pathlib.Path, help="write a summary there")
  p.add_argument("--dry", action="store_true")
  args = p.parse_args(argv)
  deadline = time.monotonic() + 60 * args.minutes
  if args.dry:
    jax.config.update("jax_platforms", "cpu")
  elif jax.default_backend() != "gpu":
    print("tune: no GPU: nothing was timed and no table written; the heuristic serves "
          "(--dry rehearses the steps)")
    return 2
  try:
    tools = toolchain.find(args.tools)
  except toolchain.MissingError as error:
    tools = None
    print(f"tune: spills are not checked: {error}")
  if args.dry:
    found = rehearse(tools)
    print(f"rehearsal: {found.get('shape')}: {len(found.get('times', []))} configurations ran, "
          f"{len(found.get('dropped', []))} were dropped; times are invented, nothing is written")
    for why, config in found.get("dropped", []):
      print(f"  {why}: {config}")
    if args.json:
      args.json.write_text(json.dumps({"dry": True, "shapes": [found]}, indent=1) + "\n")
    return int(not found)
  return _run(args, tools, deadline)


def _run(args: argparse.Namespace, tools: toolchain.Toolchain | None, deadline: float) -> int:
  """Tunes shape after shape and writes the table after each."""
  device = jax.devices()[0]
  path = args.tables / tables.path(device.device_kind).name
  table = read(path) | {"device": device.device_kind}
  done, missing, failed = [], [], []
  for shape in shapes.GEMMS:
    name = tables.key(*cases.arguments(shape))
    known = table["measured"].get(name)
    if args.only and not any(text in shape.name for text in args.only):
      continue
    if known and known["jax"] == jax.__version__ and not args.again:
      print(f"{shape.name}: kept, {known['us']:g} us")
      continue
    if time.monotonic() > deadline:
      missing.append(shape.name)
      continue
    kept, dropped = without_spills(shape, candidates(shape, args.most), tools, os.cpu_count() or 1)
    tried = tune(shape, kept, deadline=deadline, num_sms=device.core_count) + dropped
    found = record(shape, tried)
    if found is None or any(t.why == LATE for t in tried):
      if not any(t.why == LATE for t in tried):
        failed.append(shape.name)
      missing.append(shape.name)  # an entry stands for all its candidates, or the shape is open
      print(f"{shape.name}: unfinished: {tried[0].why if tried else 'no candidate'}", flush=True)
      continue
    table["gemm"][name], table["measured"][name] = found["config"], found
    table["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write(path, table)
    done.append({k: v for k, v in found.items() if k not in ("times", "dropped")})
    print(f"{shape.name}: {found['us']:g} us, {found['tflops']:g} TFLOP/s with {found['config']}; "
          f"{len(found['times'])} timed, {len(found['dropped'])} dropped", flush=True)
  if missing:
    print(f"unfinished: {', '.join(missing)}; the same command goes on")
  if args.json:
    args.json.write_text(json.dumps({"device": device.device_kind, "tuned": done,
                                     "unfinished": missing}, indent=1) + "\n")
  return int(bool(failed))


if __name__ == "__main__":
  sys.exit(main())
