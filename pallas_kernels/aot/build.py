"""Compiles modules in worker processes and reads the results."""

import concurrent.futures
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

from pallas_kernels.aot import lower, report
from pallas_kernels.aot.report import Report
from pallas_kernels.aot.toolchain import Toolchain

_WORKER = pathlib.Path(__file__).with_name("worker.py")
TIMEOUT_S = 120.0


def run(module: bytes, tools: Toolchain, *, timeout_s: float = TIMEOUT_S,
        keep: pathlib.Path | None = None) -> Report:
  """Compiles one module to sm_90a.

  Args:
    module: from `lower.modules`.
    tools: from `toolchain.find`.
    timeout_s: the worker is killed after so many seconds.
    keep: an existing folder that gets module, PTX, assembler report, cubin and SASS.

  Returns:
    The report; one with `error` set where the compiler failed or took too long.
  """
  with tempfile.TemporaryDirectory(prefix="sass-", dir=keep and keep.parent) as temporary:
    folder = pathlib.Path(temporary)
    source = folder / "module.mlirbc"
    source.write_bytes(module)
    cubin, shared = folder / "kernel.cubin", folder / "shared"
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("MOSAIC_GPU_")},
        "LD_LIBRARY_PATH": ":".join(
            filter(None, (str(tools.driver), os.environ.get("LD_LIBRARY_PATH")))),
        "MOSAIC_GPU_CUDA_ROOT": str(tools.cuda_root),
        "MOSAIC_GPU_RUNTIME_LIB_PATH": str(tools.driver / "libcuda.so.1"),
        "MOSAIC_GPU_DUMP_PTXAS": "1",  # to the terminal, unless a folder is named
        **({"MOSAIC_GPU_DUMP_TO": temporary} if keep else {}),
        "STANDIN_CUBIN": str(cubin),
        "STANDIN_SHARED": str(shared),
    }
    try:
      done = subprocess.run([sys.executable, "-I", _WORKER, tools.plugin, source], check=False,
                            env=environment, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
      return Report(error=f"not compiled within {timeout_s:g} s")
    for log in folder.glob("*.mlir-passes.log"):  # tens of megabytes each
      log.unlink()
    said = "".join([done.stdout, done.stderr, *(p.read_text() for p in folder.glob("*.ptxas"))])
    if done.returncode or not cubin.is_file():
      return Report(error=f"the compiler failed (status {done.returncode}): {said.strip()[-800:]}")
    sass = disassemble(cubin, tools)
    if keep is not None:
      (folder / "kernel.sass").write_text(sass)
      for path in folder.iterdir():
        path.rename(keep / path.name)
      shared = keep / shared.name
    return report.parse(said, sass, int(shared.read_text()) if shared.is_file() else 0)


def disassemble(cubin: pathlib.Path, tools: Toolchain) -> str:
  """Machine code as text; empty where there is no disassembler."""
  if tools.nvdisasm is None:
    return ""
  done = subprocess.run([tools.nvdisasm, "-c", cubin], check=False, capture_output=True, text=True,
                        timeout=TIMEOUT_S)
  return done.stdout


def reports(functions: Iterable[tuple[str, Callable[[], tuple[Callable, tuple]]]],
            tools: Toolchain, *, jobs: int, timeout_s: float = TIMEOUT_S,
            keep: pathlib.Path | None = None) -> Iterator[tuple[str, Report]]:
  """Lowers functions one after the other while earlier ones compile; yields in their order.

  Args:
    functions: name and builder of (function, abstract arguments). A ValueError or
      NotImplementedError of builder or lowering becomes the `error` of that report.
    tools: from `toolchain.find`.
    jobs: workers at a time.
    timeout_s: of one module.
    keep: a folder that gets one folder a module.
  """
  with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
    pending: list[tuple[str, list]] = []
    for name, build in functions:
      try:
        function, args = build()
        found = lower.modules(function, *args)
      except (ValueError, NotImplementedError, AssertionError) as error:
        pending.append((name, [_failed(f"{type(error).__name__}: {error}")]))
      else:
        pending.append((name, [
            pool.submit(run, module, tools, timeout_s=timeout_s, keep=_folder(keep, name, i))
            for i, module in enumerate(found)]))
      while pending and (len(pending) > 2 * jobs or all(f.done() for f in pending[0][1])):
        yield _result(*pending.pop(0))
    for entry in pending:
      yield _result(*entry)


def _failed(error: str) -> concurrent.futures.Future:
  future: concurrent.futures.Future = concurrent.futures.Future()
  future.set_result(Report(error=error))
  return future


def _result(name: str, futures: list) -> tuple[str, Report]:
  return name, report.combine([f.result() for f in futures])


def _folder(keep: pathlib.Path | None, name: str, index: int) -> pathlib.Path | None:
  if keep is None:
    return None
  folder = keep / f"{name.replace('/', '_').replace(' ', '_')}-{index}"
  folder.mkdir(parents=True, exist_ok=True)
  return folder


def check(function: Callable, *args, tools: Toolchain, keep: pathlib.Path | None = None) -> Report:
  """The report of one function's kernels: `reports` for a single function."""
  builder = functools.partial(lambda f, a: (f, a), function, args)
  return next(reports([("kernel", builder)], tools, jobs=1, keep=keep))[1]
