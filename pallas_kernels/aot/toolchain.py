"""Where the parts of the compiler are. All of them may be absent; then there is a reason in words.

  plugin      the CUDA PJRT plugin of jax 0.11.2 (jax-cuda13-pjrt); it also compiles what jax 0.10.2
              lowered, while the 0.10.2 plugin cannot be called without a device
  driver      a folder with the stand-in `libcuda.so.1`, built with the C compiler on first use
  cuda_root   a folder with nvvm/libdevice/libdevice.10.bc: CUDA, or NVIDIA's wheels
  nvdisasm    prints machine code (nvidia-cuda-nvdisasm, or CUDA); without it nothing is counted
"""

import dataclasses
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

_SOURCE = pathlib.Path(__file__).with_name("libcuda.c")
_LIBDEVICE = pathlib.Path("nvvm/libdevice/libdevice.10.bc")
_INSTALL = "pip install 'dsv3-jax[sass]', or make sass"


class MissingError(RuntimeError):
  """A part of the tool chain is not on this machine; the message says which and how to get it."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
  """Paths of the parts; `nvdisasm` may be None."""

  plugin: pathlib.Path
  driver: pathlib.Path
  cuda_root: pathlib.Path
  nvdisasm: pathlib.Path | None


def _site_folders(tools: pathlib.Path | None) -> list[pathlib.Path]:
  """Folders that may hold wheels' contents, the given one or that of `make sass` first."""
  return [tools or pathlib.Path(sys.prefix) / "sass", *(pathlib.Path(p) for p in sys.path if p)]


def _plugin(folders: list[pathlib.Path]) -> pathlib.Path:
  for folder in folders:
    found = folder / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"
    if found.is_file():
      if any(folder.glob("jax_cuda13_pjrt-0.10.*")):
        raise MissingError("the installed jax-cuda13-pjrt 0.10 compiles only on a GPU machine; "
                           f"0.11.2 is needed: {_INSTALL}")
      return found
  raise MissingError(f"jax's CUDA plugin (jax-cuda13-pjrt 0.11.2) is not installed; {_INSTALL}")


def _cuda_roots(folders: list[pathlib.Path]) -> list[pathlib.Path]:
  named = [os.environ.get(v) for v in ("MOSAIC_GPU_CUDA_ROOT", "CUDA_HOME", "CUDA_PATH")]
  wheels = [p for f in folders for p in sorted((f / "nvidia").glob("*"))]
  return [pathlib.Path(p) for p in named if p] + wheels + [pathlib.Path("/usr/local/cuda")]


def _cuda_root(folders: list[pathlib.Path]) -> pathlib.Path:
  for root in _cuda_roots(folders):
    if (root / _LIBDEVICE).is_file():
      return root
  raise MissingError(f"no {_LIBDEVICE} in CUDA_HOME, /usr/local/cuda or NVIDIA's wheels; "
                     f"{_INSTALL}")


def _nvdisasm(folders: list[pathlib.Path]) -> pathlib.Path | None:
  for root in _cuda_roots(folders):
    if os.access(root / "bin" / "nvdisasm", os.X_OK):
      return root / "bin" / "nvdisasm"
  found = shutil.which("nvdisasm")
  return pathlib.Path(found) if found else None


def _driver() -> pathlib.Path:
  """The folder with the stand-in driver, built once a version of its source."""
  compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
  digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
  cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
  folder = cache / "pallas_kernels" / f"driver-{digest}"
  library = folder / "libcuda.so.1"
  if library.is_file():
    return folder
  if compiler is None:
    raise MissingError("no C compiler (cc, gcc or clang) to build the stand-in driver with")
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:  # a home that cannot be written to
    folder = pathlib.Path(tempfile.mkdtemp(prefix="pallas_kernels-"))
    library = folder / "libcuda.so.1"
  with tempfile.TemporaryDirectory(dir=folder) as temporary:
    built = pathlib.Path(temporary) / library.name
    done = subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", built, _SOURCE],
                          capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
      raise MissingError(f"{compiler} does not build the stand-in driver:\n{done.stderr}")
    os.replace(built, library)  # another process may be building the same
  return folder


def plugin(tools: pathlib.Path | None = None) -> pathlib.Path:
  """The plugin alone: all that compiling programs of XLA needs. As `find` otherwise."""
  return _plugin(_site_folders(tools))


def find(tools: pathlib.Path | None = None) -> Toolchain:
  """The tool chain of this machine.

  Args:
    tools: a folder into which the wheels were installed (`pip install --target`), looked into
      before the environment's own; None: where `make sass` installs them.

  Raises:
    MissingError: a part is absent.
  """
  if not sys.platform.startswith("linux"):
    raise MissingError(f"the CUDA plugin exists for Linux alone, this is {sys.platform}")
  folders = _site_folders(tools)
  return Toolchain(_plugin(folders), _driver(), _cuda_root(folders), _nvdisasm(folders))
