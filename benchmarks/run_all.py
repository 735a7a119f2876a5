"""All benchmarks, each in a process of its own, and one table at the end.

    python -m benchmarks.run_all                    (also `make bench`)
    python -m benchmarks.run_all --only attention train_step --save

A process apart keeps one benchmark's threads, caches and memory from the next. What a benchmark
prints goes through; its lines (see `common.Line`) are gathered for the table. The status is 1 when
a benchmark fails to run. A missed target is reported and is no failure.
"""

import argparse
import importlib.util
import os
import subprocess
import sys

from benchmarks import common

BENCHMARKS = ("grouped_matmul", "attention", "train_step", "data_pipeline", "loop_overhead",
              "checkpoint", "fp8", "dispatch", "pipeline")
BUSY = 0.5  # runnable processes a core above which timings mean little


def warn_if_busy() -> None:
  """Says when other work would disturb the timings."""
  load, cores = os.getloadavg()[0], common.cores()
  if load > BUSY * cores:
    print(f"the machine is busy (load {load:.1f} on {cores} cores): times are rough, and torch, "
          "whose threads spin at barriers, suffers more than we do", flush=True)


def run(name: str, arguments: list[str]) -> tuple[str, list[str]]:
  """Outcome of one benchmark in a word, and its lines."""
  if importlib.util.find_spec(f"benchmarks.{name}") is None:
    print(f"{name}: skipped, benchmarks/{name}.py does not exist yet")
    return "skipped", []
  header, lines, inside = common.row(*common.HEADER), [], False
  command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    for line in process.stdout:
      print(line, end="", flush=True)
      line = line.rstrip("\n")
      inside = inside or line == header
      if inside and line != header and line.count(" | ") == len(common.HEADER) - 1:
        lines.append(line)
  if process.returncode:
    print(f"{name}: FAILED with status {process.returncode}")
    return "failed", lines
  return "ran", lines


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__,
                              formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, metavar="NAME",
                 help=f"of {', '.join(BENCHMARKS)}")
  p.add_argument("--save", action="store_true", help="write benchmarks/results/<name>.json")
  p.add_argument("--rounds", type=int, help="turns of each side, in place of each one's default")
  args = p.parse_args(argv)
  passed_on = ["--save"] * args.save + (["--rounds", str(args.rounds)] if args.rounds else [])
  warn_if_busy()
  outcomes, table = {}, []
  for name in args.only:
    print(f"\n== {name}", flush=True)
    outcomes[name], lines = run(name, passed_on)
    table += lines
  print(f"\n{common.device()}; "
        + ", ".join(f"{k} {v}" for k, v in common.versions().items()))
  print(common.row(*common.HEADER))
  print("\n".join(table))
  for outcome in ("skipped", "failed"):
    names = [name for name, found in outcomes.items() if found == outcome]
    if names:
      print(f"{outcome}: {', '.join(names)}")
  missed = sum("(missed)" in line for line in table)
  print(f"{sum('(met)' in line for line in table)} targets met, {missed} missed")
  return int("failed" in outcomes.values())


if __name__ == "__main__":
  sys.exit(main())
