"""Oracles: recorded output of ptxas and nvdisasm; a kernel made to spill; absent parts by name.

What compiles needs the plugin (`make sass`), libdevice and a C compiler, and is skipped without.
"""

import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import registry, sass_check
from pallas_kernels.aot import build, lower, report, toolchain
from pallas_kernels.mosaic import compat

pytestmark = pytest.mark.timeout(60)

PTXAS = """ptxas warning : Registers are spilled to local memory in function 'k', 64 bytes spill \
stores, 68 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    48 bytes stack frame, 64 bytes spill stores, 68 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 48 bytes cumulative stack size, 1 bytes smem
"""
SASS = """
        /*0080*/                   LDC R1, c[0x0][0x28] ;
        /*0b10*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR4], RZ, !UPT, gsb0 ;
        /*0b20*/                   QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR8], R24, gsb0 ;
        /*0c00*/              @!P0 FFMA R88, R24, R3, R88 ;
        /*0c10*/         @!UPT UTMALDG.2D [UR8], [UR4], desc[UR6] ;
        /*10c20*/                  STL [R1+0x8], R20 ;
"""


def test_report_of_recorded_output():
  """Oracle: the numbers as they stand in the text; the warning's copy of them does not count."""
  found = report.parse(PTXAS, SASS, 217136)
  assert (found.registers, found.spill_stores, found.spill_loads, found.stack) == (168, 64, 68, 48)
  assert found.shared == 217136 and found.spills == 132 and not found.error
  assert found.instructions == {"LDC": 1, "QGMMA": 2, "FFMA": 1, "UTMALDG": 1, "STL": 1}


def test_report_without_assembly():
  """Law: no "Used ... registers" line, no numbers."""
  assert "syntax error" in report.parse("ptxas fatal: syntax error").error


def test_kernels_of_a_function_are_one():
  """Oracle: sums and maxima by hand; a failed one makes the whole fail."""
  a = report.Report(registers=90, spill_stores=4, shared=10, instructions={"FFMA": 2})
  b = report.Report(registers=168, spill_loads=8, shared=5, instructions={"FFMA": 1, "LDL": 2})
  both = report.combine([a, b])
  assert (both.registers, both.spills, both.shared) == (168, 12, 10)
  assert both.instructions == {"FFMA": 3, "LDL": 2}
  assert report.combine([a, report.Report(error="no")]).error == "no"
  assert "no Mosaic GPU kernel" in report.combine([]).error


@pytest.mark.parametrize("found, needs, expected", [
    (report.Report(registers=8, instructions={"QGMMA": 4}), ("QGMMA",), "ok"),
    (report.Report(registers=8, instructions={"FFMA": 4}), ("QGMMA",), "NO QGMMA"),
    (report.Report(registers=8), ("QGMMA",), "ok"),  # without a disassembler nothing is known
    (report.Report(registers=8, spill_loads=4), (), "SPILLS"),
    (report.Report(error="x"), (), "FAILED: x")])
def test_verdict(found, needs, expected):
  """Law: spills, missing instructions and failures are each said."""
  assert sass_check.verdict(found, needs) == expected


def test_absent_toolchain_is_said_and_no_failure(monkeypatch, capsys):
  """Law: status 0 and the word "skipped" with what is missing."""
  def missing(_):
    raise toolchain.MissingError("no C compiler")

  monkeypatch.setattr(toolchain, "find", missing)
  assert sass_check.main([]) == 0
  assert capsys.readouterr().out.strip() == "sass_check: skipped: no C compiler"


def test_parts_of_the_toolchain_are_named(monkeypatch, tmp_path):
  """Law: each part's absence is said by name, an old plugin's as such."""
  monkeypatch.setattr(sys, "path", [str(tmp_path)])
  monkeypatch.setattr(sys, "platform", "linux")
  with pytest.raises(toolchain.MissingError, match="jax-cuda13-pjrt 0.11.2"):
    toolchain.find(tmp_path)
  plugin = tmp_path / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"
  plugin.parent.mkdir(parents=True)
  plugin.touch()
  old = tmp_path / "jax_cuda13_pjrt-0.10.2.dist-info"
  old.mkdir()
  with pytest.raises(toolchain.MissingError, match="0.10 compiles only on a GPU"):
    toolchain.find(tmp_path)
  old.rmdir()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
  with pytest.raises(toolchain.MissingError, match="no C compiler"):
    toolchain.find(tmp_path)
  monkeypatch.setattr(sys, "platform", "darwin")
  with pytest.raises(toolchain.MissingError, match="darwin"):
    toolchain.find(tmp_path)


def _kernel(carried: int):
  """A kernel that keeps `carried` arrays of 64x256 fp32 in a warpgroup's registers, 128 each."""
  def body(x_g, y_g, x_s, y_s, barrier):
    plgpu.copy_gmem_to_smem(x_g, x_s, barrier)
    plgpu.barrier_wait(barrier)
    start = plgpu.load(x_s, (), layout=plgpu.Layout.WGMMA)

    def step(_, xs):
      return tuple(a * b for a, b in zip(xs, (*xs[1:], xs[0]), strict=True))

    xs = lax.fori_loop(0, 100, step, tuple(start * (i + 2.0) for i in range(carried)))
    y_s[...] = sum(xs)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(y_s, y_g)
    plgpu.wait_smem_to_gmem(0)

  shape = jax.ShapeDtypeStruct((64, 256), jnp.float32)
  smem = plgpu.SMEM((64, 256), jnp.float32, transforms=compat.transforms(jnp.float32, 32))
  function = compat.kernel(body, out_type=shape, scratch_types=[smem, smem, plgpu.Barrier()])
  return function, (shape,)


def test_modules_are_taken_out_of_a_lowering():
  """Law: one module a kernel call, in order; none in a function without kernels."""
  function, args = _kernel(1)
  assert len(lower.modules(lambda x: function(function(x)), *args)) == 2
  assert lower.modules(lambda x: x + 1, *args) == []


def test_a_builder_that_raises_is_reported():
  """Law: the error stands in that kernel's report, and the others go on."""
  def broken():
    raise ValueError("tile_n must be a multiple of 16")

  tools = toolchain.Toolchain(*[pathlib.Path("absent")] * 3, None)
  (name, found), = build.reports([("a", broken)], tools, jobs=1)
  assert name == "a" and found.error == "ValueError: tile_n must be a multiple of 16"


def test_a_compiler_that_dies_is_reported(tmp_path):
  """Law: a plugin that cannot be loaded is an error in the report, not an exception."""
  tools = toolchain.Toolchain(tmp_path / "none.so", tmp_path, tmp_path, None)
  assert "none.so" in build.run(b"", tools).error


@pytest.fixture(scope="module")
def tools():
  try:
    return toolchain.find()
  except toolchain.MissingError as error:
    pytest.skip(str(error))


def test_spills_are_seen(tools, tmp_path):
  """Oracle: 128 live registers of 255 fit, 384 cannot."""
  function, args = _kernel(1)
  fits = build.check(function, *args, tools=tools)
  assert not fits.error and fits.spills == 0 and 128 < fits.registers <= 255
  assert fits.shared >= 2 * 64 * 256 * 4
  function, args = _kernel(3)
  spills = build.check(function, *args, tools=tools, keep=tmp_path)
  assert not spills.error and spills.spills > 0
  assert sass_check.verdict(spills) == "SPILLS"
  kept = {path.name for path in (tmp_path / "kernel-0").iterdir()}
  assert {"kernel.cubin", "module.mlirbc"} <= kept
  assert not any(name.endswith(".log") for name in kept)  # tens of megabytes each
  if tools.nvdisasm:
    assert spills.instructions["STL"] > 0 and "UTMALDG" in spills.instructions


def test_time_limit_ends_a_compiler(tools):
  """Law: a worker that runs on is killed, and the report says so."""
  function, args = _kernel(1)
  module, = lower.modules(function, *args)
  assert "not compiled within" in build.run(module, tools, timeout_s=0.01).error


def test_command_on_a_function_of_ones_own(tools, tmp_path):
  """Law: --function compiles it, prints its row and writes the JSON; a typo is said."""
  study = tmp_path / "study.py"
  study.write_text(
      "import jax, jax.numpy as jnp\n"
      "from pallas_kernels.mosaic import quantize\n"
      "def make():\n"
      "  return quantize.rows, (jax.ShapeDtypeStruct((256, 512), jnp.bfloat16),)\n")
  done = subprocess.run(
      [sys.executable, "-m", "pallas_kernels.sass_check", "--function", f"{study}:make", "--json",
       tmp_path / "r.json"], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr
  assert "| make" in done.stdout and '"spill_stores": 0' in (tmp_path / "r.json").read_text()


def test_registry_names_every_kernel_once():
  """Law: names differ, and each family of kernels is there."""
  names = [k.name for k in registry.kernels()]
  assert len(set(names)) == len(names)
  for family in ("dense", "grouped", "masked", "wgrad", "grouped_wgrad", "quantize rows",
                 "quantize columns", "quantize both", "quantize blocks", "quantize turn",
                 "swiglu forward", "swiglu backward", "mla_decode"):
    assert any(name.startswith(family) for name in names), family
