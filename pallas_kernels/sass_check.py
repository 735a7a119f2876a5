"""Compiles every kernel and every table entry to sm_90a, without a GPU, and looks for spills.

    python -m pallas_kernels.sass_check                     all; `make sass` installs what it needs
    python -m pallas_kernels.sass_check --only gemm --json report.json
    python -m pallas_kernels.sass_check --function study.py:make --keep out

`--function FILE:NAME` checks a function of one's own: `NAME()` returns the function and a tuple of
its arguments (arrays or `jax.ShapeDtypeStruct`s). `--keep` leaves PTX, cubin and SASS behind.

The status is 1 where a kernel spills, lacks an instruction that it should have, or does not
compile; 0 otherwise, also where the tool chain is absent, which is said.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import runpy
import sys
from collections.abc import Iterable

import jax

from pallas_kernels import registry
from pallas_kernels.aot import build, toolchain
from pallas_kernels.aot.report import COUNTED, Report

_HEADER = ("kernel", "registers", "spill st/ld", "stack", "shared", *COUNTED, "verdict")


def verdict(report: Report, needs: Iterable[str] = ()) -> str:
  """"ok", or what is wrong.

  Args:
    report: of a kernel.
    needs: instructions that must occur where the machine code was read.
  """
  if report.error:
    return f"FAILED: {report.error}"
  if report.spills:
    return "SPILLS"
  missing = [name for name in needs if report.instructions and not report.instructions.get(name)]
  return f"NO {', '.join(missing)}" if missing else "ok"


def row(name: str, report: Report, said: str) -> tuple[str, ...]:
  """A kernel's cells, in the order of the header."""
  if report.error:
    return (name, *["-"] * (len(_HEADER) - 2), " ".join(said.split())[:160])
  counts = [str(report.instructions.get(c, 0)) if report.instructions else "-" for c in COUNTED]
  return (name, str(report.registers), f"{report.spill_stores}/{report.spill_loads}",
          str(report.stack), str(report.shared), *counts, said)


def table(rows: list[tuple[str, ...]]) -> str:
  """Markdown."""
  rows = [_HEADER, *rows]
  widths = [max(len(r[i]) for r in rows) for i in range(len(_HEADER))]
  lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |"
           for r in rows]
  return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _function(where: str) -> registry.Kernel:
  """The kernel of `--function FILE:NAME`."""
  path, _, name = where.rpartition(":")
  if not path:
    raise SystemExit(f"--function {where}: write FILE.py:NAME, where NAME() returns a function and "
                     "a tuple of its arguments")
  sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
  return registry.Kernel(name, runpy.run_path(path)[name])


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--only", nargs="+", default=[], metavar="TEXT",
                 help="kernels whose name contains one of these")
  p.add_argument("--function", metavar="FILE:NAME", help="a function in place of the registry")
  p.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the reports there too")
  p.add_argument("--keep", type=pathlib.Path, metavar="FOLDER",
                 help="keep PTX, assembler reports, cubins and SASS")
  p.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1),
                 help="compilers at a time (default %(default)s)")
  p.add_argument("--timeout", type=float, default=build.TIMEOUT_S, metavar="S",
                 help="seconds a module may take (default %(default)g)")
  p.add_argument("--tools", type=pathlib.Path, metavar="FOLDER",
                 help="where the wheels were installed (pip install --target)")
  args = p.parse_args(argv)
  try:
    tools = toolchain.find(args.tools)
  except toolchain.MissingError as error:
    print(f"sass_check: skipped: {error}")
    return 0
  jax.config.update("jax_platforms", "cpu")  # a plugin without its device would only complain
  kernels = [_function(args.function)] if args.function else registry.kernels()
  kernels = [k for k in kernels if not args.only or any(text in k.name for text in args.only)]
  if not kernels:
    print(f"sass_check: no kernel's name contains {' or '.join(args.only)}")
    return 1
  if args.keep:
    args.keep.mkdir(parents=True, exist_ok=True)
  needs = {k.name: k.needs for k in kernels}
  found, rows = [], []
  for name, report in build.reports([(k.name, k.build) for k in kernels], tools, jobs=args.jobs,
                                    timeout_s=args.timeout, keep=args.keep):
    said = verdict(report, needs[name])
    found.append({"name": name, "verdict": said, **dataclasses.asdict(report)})
    rows.append(row(name, report, said))
    print(f"{len(rows)}/{len(kernels)} {name}: {said}", file=sys.stderr, flush=True)
  print(table(rows))
  if args.json:
    args.json.write_text(json.dumps({"jax": jax.__version__, "kernels": found}, indent=2) + "\n")
  wrong = [entry["name"] for entry in found if entry["verdict"] != "ok"]
  print(f"{len(found) - len(wrong)} of {len(found)} kernels ok on jax {jax.__version__}"
        + (f"; not: {', '.join(wrong)}" if wrong else ""))
  return int(bool(wrong))


if __name__ == "__main__":
  sys.exit(main())
