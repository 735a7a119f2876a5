"""A cluster on one machine: several `dsv3` processes over loopback, each with virtual CPU devices.

    python -m dsv3_jax.rehearsal --processes=2 --devices=4 train --config=experiments/tiny.py:smoke

What follows the two options is the command that every process runs, as a cluster's launcher would
run it on every host. Lines come with the number of their process in front. SIGTERM and SIGINT are
passed on. Where one process ends badly the others get a minute to notice; what is left is killed.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

_GRACE = 60.0  # seconds for the others after one has ended badly


def free_port() -> int:
  """A port of loopback that nobody listens at."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def environment(devices: int) -> dict[str, str]:
  """This process's environment for a process with some virtual CPU devices."""
  flags = [f for f in os.environ.get("XLA_FLAGS", "").split()
           if "host_platform_device_count" not in f]
  return os.environ | {
      "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
      "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])}


def start(command: Sequence[str], processes: int, devices: int,
          say: Callable[[str], None] = lambda line: print(line, flush=True)
          ) -> tuple[list[subprocess.Popen], list[threading.Thread]]:
  """Starts `command` with --coordinator, --processes and --process added, once for each process.

  Returns:
    The processes, and the threads that hand their lines to `say`, which end with them.
  """
  coordinator = f"127.0.0.1:{free_port()}"
  children, readers = [], []
  for i in range(processes):
    join = [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={i}"]
    child = subprocess.Popen([*command, *join], env=environment(devices), text=True,
                             stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, errors="replace", start_new_session=True)

    def read(child=child, i=i) -> None:
      for line in child.stdout:
        if "[Gloo]" not in line and "peer ranks" not in line and line.strip():
          say(f"[{i}] {line.rstrip()}")

    children.append(child)
    readers.append(threading.Thread(target=read, daemon=True))
    readers[-1].start()
  return children, readers


def wait(children: Sequence[subprocess.Popen], grace: float = _GRACE) -> list[int]:
  """Exit codes of all, in their order, waiting `grace` seconds after the first that ended badly.

  A run that a signal ended in order (130, 143) has not: the others are still saving.
  """
  deadline = None
  while any(c.poll() is None for c in children):
    if deadline is None and any(c.returncode not in (None, 0, 130, 143) for c in children):
      deadline = time.monotonic() + grace
    if deadline is not None and time.monotonic() > deadline:
      for c in children:
        c.kill()
    time.sleep(0.05)
  return [c.wait() for c in children]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m dsv3_jax.rehearsal", allow_abbrev=False,
                                   description="Several dsv3 processes on this machine.")
  parser.add_argument("--processes", type=int, default=2, metavar="N")
  parser.add_argument("--devices", type=int, default=4, metavar="N", help="of each process")
  parser.add_argument("command", nargs=argparse.REMAINDER, metavar="train ...",
                      help="arguments of dsv3")
  args = parser.parse_args(argv)
  if min(args.processes, args.devices) < 1 or args.command[:1] != ["train"]:
    parser.error("give positive --processes and --devices, then train and its arguments")
  print(f"{args.processes} processes x {args.devices} virtual CPU devices on loopback: dsv3 "
        f"{' '.join(args.command)}", flush=True)
  children, readers = start([sys.executable, "-m", "dsv3_jax.cli", *args.command], args.processes,
                            args.devices)

  def pass_on(number: int, frame) -> None:
    for child in children:
      child.send_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, pass_on)
  codes = wait(children)
  for reader in readers:
    reader.join(timeout=10)
  print("; ".join(f"process {i} ended with {code}" for i, code in enumerate(codes)), flush=True)
  return next((code if code > 0 else 128 - code for code in codes if code), 0)


if __name__ == "__main__":
  sys.exit(main())
