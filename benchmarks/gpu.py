"""Everything that wants a Hopper GPU, unattended and in under 25 minutes: `make gpu`.

    correctness   every kernel on the hardware against its reference: fresh random data, memory
                  poisoned beforehand
    tune          configurations timed; writes pallas_kernels/tables/<device>.json
    bench         kernels against cuBLASLt, XLA and the device's limits
    train_v3      100 steps of experiments/h100_moe.py through the FP8 kernels
    train_bf16    the same in bf16, experts by lax.ragged_dot (XLA's loop over blocks is for CPUs)

Each step is a process with a time budget of its own, cut to what is left of --minutes; one that
fails or runs out of time is noted and the rest goes on. Results are written after every step, so
that nothing is lost if the machine goes: gpu-<device>.json in --out holds all of them, and
kernels-<device>.json the benchmark's. The status is 1 where a step failed.

    python -m benchmarks.gpu --steps correctness tune --minutes 9     in parts
    python -m benchmarks.gpu --dry                                    rehearsal on a CPU, small

A rehearsal goes through the same commands with a few small cases in the interpreter and measures
nothing; unless --out says otherwise it writes under runs/gpu-dry alone.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from benchmarks import common
from dsv3_jax import files

GRACE_S = 10.0  # between asking a step to end and ending it


@dataclasses.dataclass(frozen=True)
class Step:
  """One command.

  Attributes:
    name: of the step and of its files.
    module: run with `python -m`.
    arguments: besides; {work} and {minutes} are filled in.
    minutes: its budget.
    file: of its result; {device} and {name} are filled in.
  """

  name: str
  module: str
  arguments: tuple[str, ...]
  minutes: float
  file: str = "gpu-{device}-{name}.json"

  def command(self, path: pathlib.Path, work: pathlib.Path, budget_s: float, dry: bool
              ) -> list[str]:
    """Its command line; `path` gets the result."""
    values = dict(work=work, minutes=f"{0.9 * budget_s / 60:.2f}")
    return [sys.executable, "-u", "-m", self.module,
            *(a.format(**values) for a in self.arguments), "--json", str(path), *["--dry"] * dry]


STEPS = (
    Step("correctness", "pallas_kernels.correctness", (), 4.0),
    Step("tune", "pallas_kernels.tune", ("--minutes", "{minutes}"), 9.0),
    Step("bench", "pallas_kernels.bench", (), 5.0, "kernels-{device}.json"),
    Step("train_v3", "benchmarks.gpu_train", ("v3", "--workdir", "{work}"), 4.0),
    Step("train_bf16", "benchmarks.gpu_train",
         ("bf16", "--workdir", "{work}", "--set", "runtime.gemm=ragged_dot"), 3.0),
)


def run(step: Step, path: pathlib.Path, work: pathlib.Path, budget_s: float, dry: bool) -> dict:
  """Runs a step, its output going to the terminal and to <work>/<name>.log.

  Returns:
    name, command, status ("ok", "failed", "out of time"), code, seconds, and `result`: what the
    step wrote, or None.
  """
  path.unlink(missing_ok=True)  # an earlier run's would pass for this one's
  command = step.command(path, work, budget_s, dry)
  print(f"\n== {step.name}: {' '.join(command[2:])} (at most {budget_s:.0f} s)", flush=True)
  start = time.monotonic()
  # A session of its own: a step's compilers and workers must not outlive it.
  tee = subprocess.Popen(["tee", work / f"{step.name}.log"], stdin=subprocess.PIPE)
  process = subprocess.Popen(command, stdout=tee.stdin, stderr=subprocess.STDOUT,
                             start_new_session=True)
  tee.stdin.close()
  status = "ok"
  try:
    code = process.wait(budget_s)
  except subprocess.TimeoutExpired:
    status, code = "out of time", None
    end(process)
  except BaseException:
    end(process)
    raise
  if code:
    status = "failed"
  try:
    tee.wait(GRACE_S)
  except subprocess.TimeoutExpired:  # something that left the session holds the output open
    tee.kill()
  try:
    result = json.loads(path.read_text())
  except (OSError, ValueError):
    result = None
  seconds = time.monotonic() - start
  print(f"== {step.name}: {status} after {seconds:.0f} s", flush=True)
  return {"name": step.name, "command": command[1:], "status": status, "code": code,
          "seconds": round(seconds, 1), "result": result}


def end(process: subprocess.Popen) -> None:
  """Ends a step and what it started."""
  for number in (signal.SIGTERM, signal.SIGKILL):
    try:
      os.killpg(process.pid, number)
      process.wait(GRACE_S)
    except ProcessLookupError:
      return
    except subprocess.TimeoutExpired:
      continue
  process.wait()


def comparison(done: list[dict]) -> dict | None:
  """The two training runs side by side; None unless both ended."""
  found = {d["name"]: d["result"] for d in done if d["name"].startswith("train_")}
  v3, bf16 = found.get("train_v3"), found.get("train_bf16")
  if not (v3 and bf16):
    return None
  last = min(len(v3["losses"]), len(bf16["losses"]))
  tail = slice(max(0, last - 10), last)
  mean = {arm["arm"]: sum(arm["losses"][tail]) / len(arm["losses"][tail]) for arm in (v3, bf16)}
  return {"tokens_per_s": {"v3": v3["tokens_per_s"], "bf16": bf16["tokens_per_s"]},
          "speedup": v3["tokens_per_s"] / bf16["tokens_per_s"],
          "mfu_of_bf16_peak": {"v3": v3["mfu_of_bf16_peak"], "bf16": bf16["mfu_of_bf16_peak"]},
          "loss_of_last_10_steps": mean, "loss_difference": mean["v3"] / mean["bf16"] - 1}


def device() -> str:
  """The GPU's name, asked in another process so that this one holds none of its memory."""
  try:
    done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], check=True,
                          capture_output=True, text=True, timeout=30)
    return done.stdout.splitlines()[0].strip()
  except (OSError, subprocess.SubprocessError, IndexError):
    return ""


def main(argv: list[str] | None = None) -> int:
  names = [s.name for s in STEPS]
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--steps", nargs="+", choices=names, default=names, metavar="NAME",
                 help=f"of {', '.join(names)}")
  p.add_argument("--minutes", type=float, default=24.5, help="for all (default %(default)g)")
  p.add_argument("--dry", action="store_true", help="rehearse on a CPU")
  p.add_argument("--out", type=pathlib.Path, help="for the results (default benchmarks/results)")
  p.add_argument("--work", type=pathlib.Path, help="for logs and runs (default runs/gpu)")
  args = p.parse_args(argv)
  work = args.work or pathlib.Path("runs/gpu-dry" if args.dry else "runs/gpu")
  out = args.out or (work if args.dry else common.RESULTS)
  name = "a rehearsal on a CPU" if args.dry else device()
  if not name:
    print("make gpu needs an NVIDIA GPU, and nvidia-smi sees none; --dry rehearses on a CPU")
    return 2
  for folder in (out, work):
    folder.mkdir(parents=True, exist_ok=True)
  if args.dry:
    os.environ["JAX_PLATFORMS"] = "cpu"
  slug = "dry" if args.dry else re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
  path = out / f"gpu-{slug}.json"
  start, done = time.monotonic(), []
  for step in (s for s in STEPS if s.name in args.steps):
    left = 60 * args.minutes - (time.monotonic() - start)
    if left < 20:
      done.append({"name": step.name, "status": "not started: no time was left"})
    else:
      result = out / step.file.format(device=slug, name=step.name)
      done.append(run(step, result, work, min(left, 60 * step.minutes), args.dry))
    summary = {"device": name, "dry": args.dry,
               "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
               "versions": common.versions("jax", "jaxlib", "torch", "flax"),
               "minutes": round((time.monotonic() - start) / 60, 2), "steps": done,
               "training": comparison(done)}
    files.write_atomic(path, json.dumps(summary, indent=2) + "\n")
  print(f"\n{name}: " + "; ".join(f"{d['name']} {d['status']}" for d in done))
  if summary["training"]:
    print(json.dumps(summary["training"], indent=2))
  print(f"written to {path}")
  return int(any(d["status"] != "ok" for d in done))


if __name__ == "__main__":
  # A step runs in a session of its own and would survive this process.
  signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
  sys.exit(main())
