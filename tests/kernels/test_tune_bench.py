"""Oracles: figures printed in the reports; numpy; what `tables.lookup` reads back; made-up clocks.

Nothing here times anything: the tuner's clock is made up, the benchmark's kernels are interpreted.
"""

import dataclasses
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu
from pallas_kernels import bench, cases, checks, correctness, peers, shapes, timing, tune
from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic import tables
from pallas_kernels.mosaic.config import GemmConfig

pytestmark = pytest.mark.timeout(60)

SMALL = shapes.Gemm("dense", 128, 128, 256)


# --- shapes and cases ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape, gflop, mb", [
    (shapes.DENSE[0], 124, 63), (shapes.DENSE[3], 962, 245), (shapes.DECODE[4], 8, 31),
    (shapes.GROUPED[0], 1924, 628), (shapes.GROUPED[3], 962, 656), (shapes.MASKED[4], 60, 133)])
def test_work_of_a_shape(shape, gflop, mb):
  """Oracle: GFLOP and MB of DeepGEMM's table, rounded as printed."""
  assert round(shape.flops / 1e9) == gflop
  assert shape.bytes / 1e6 == pytest.approx(mb, rel=0.03)  # the table leaves out A's scales


@pytest.mark.parametrize("kind", config_lib.KINDS)
def test_operands_fit_the_kernels(kind):
  """Oracle: the kernel's own checks of shapes and types, and the result's shape."""
  shape = next(s for s in shapes.GEMMS if s.kind == kind)
  case = cases.gemm_case(shape)
  result = jax.eval_shape(case.kernel(), *case.abstract())
  expected = {"dense": (shape.m, shape.n), "wgrad": (shape.m, shape.n)}.get(
      kind, (shape.groups * shape.m, shape.n) if kind == "grouped" else
      (shape.groups, shape.m, shape.n))
  assert result.shape == expected and result.dtype == cases.out_dtype(kind)


@pytest.mark.parametrize("kind", config_lib.KINDS)
def test_rows_to_compare_with(kind):
  """Oracle: numpy float64 on dequantized operands."""
  shape = shapes.Gemm(kind, 128, 144, 256, 1 if kind in ("dense", "wgrad") else 3)
  operands = cases.gemm_operands(shape, jax.random.key(time.time_ns() % 2**31))
  a, sa, b, sb = (np.asarray(x).astype(np.float64) for x in operands[:4])
  if kind == "masked":
    a, sa = a[0], sa[0]
  if kind in ("masked", "grouped"):
    b, sb = b[0], sb[0]
  a = a * np.repeat(sa.T, 128, axis=1)
  b = b * (np.repeat(sb.T, 128, axis=1) if config_lib.one_d(kind) else
           np.repeat(np.repeat(sb, 128, axis=0)[:144], 128, axis=1))
  tokens = slice(0, 256)  # of the first group, where tokens are summed over
  expected = a[:100, tokens] @ b[:, tokens].T
  np.testing.assert_allclose(cases.gemm_rows(shape, operands, 100), expected,
                             atol=1e-4 * np.abs(expected).max())


def test_plain_quantizers_obey_the_law_of_codes():
  """Oracle: `checks.code_error`, itself tested below."""
  rng = np.random.default_rng(time.time_ns() % 2**31)
  x = jnp.asarray(rng.normal(size=(256, 384)), jnp.bfloat16)
  exact = np.asarray(x).astype(np.float64)
  assert checks.code_error(*peers.quantize_rows(x), exact, 1e-4, False) <= 1
  assert checks.code_error(*peers.quantize_columns(x), exact.T, 1e-4, False) <= 1
  codes_t, codes, scales = peers.quantize_blocks(x)
  np.testing.assert_array_equal(np.asarray(codes_t), np.asarray(codes).T)
  spread = np.repeat(np.repeat(np.asarray(scales), 128, 0), 128, 1)
  np.testing.assert_allclose(np.asarray(codes_t).astype(np.float64) * spread, exact.T,
                             atol=exact.max() / 14)


def test_law_of_codes_sees_wrong_ones():
  """Law: a code two steps off, a scale too small, a transposed scale and NaN are each an error."""
  rng = np.random.default_rng(time.time_ns() % 2**31)
  x = jnp.asarray(rng.normal(size=(128, 128)), jnp.float32)
  exact = np.asarray(x).astype(np.float64)
  codes, scales = peers.quantize_rows(x)
  assert checks.code_error(codes, scales, exact, 1e-4, False) <= 1
  bits = np.array(codes.view(jnp.uint8))
  bits[3, 5] ^= 2  # one step may be as near as the other
  step = jnp.asarray(bits).view(jnp.float8_e4m3fn)
  assert checks.code_error(step, scales, exact, 1e-4, False) > 1
  assert checks.code_error(codes, scales * 0.99, exact, 1e-4, False) > 1
  assert checks.code_error(codes, scales, exact, 1e-4, True) > 1  # no powers of two
  large = (x / (1.5 * scales.T)).astype(jnp.float8_e4m3fn)  # right for a scale that is not
  assert checks.code_error(large, 1.5 * scales, exact, 1e-4, False) > 1
  bits[3, 5] = 0x7F
  assert checks.code_error(jnp.asarray(bits).view(jnp.float8_e4m3fn), scales, exact, 1e-4,
                           False) > 1


def test_error_is_of_the_worst_element():
  """Oracle: by hand; rounding to bfloat16 counts for nothing, NaN for everything."""
  expected = np.full((4, 4), 2.0)
  got = np.array(expected)
  got[1, 2] = 2.5
  assert checks.error(jnp.asarray(got, jnp.float32), expected) == pytest.approx(0.25)
  assert checks.error(jnp.asarray(expected * 1.001, jnp.bfloat16), expected * 1.001) == 0
  got[0, 0] = np.nan
  assert not checks.error(jnp.asarray(got, jnp.float32), expected) <= 1


def test_cublas_layout_of_scales():
  """Oracle: cuBLASLt's rules (pytorch 166752): M contiguous; K/128 contiguous, padded to 4."""
  torch = pytest.importorskip("torch")
  shape = shapes.Gemm("dense", 256, 384, 640)  # five blocks of K
  operands = cases.gemm_operands(shape, jax.random.key(0))
  a, b, a_scales, b_scales = peers.cublas_operands(torch, shape, operands)
  assert (a.dtype, a.shape, b.shape) == (torch.float8_e4m3fn, (256, 640), (640, 384))
  assert a_scales.shape == (256, 5) and a_scales.stride() == (1, 256)
  assert b_scales.shape == (8, 3) and b_scales.stride() == (1, 8)
  np.testing.assert_array_equal(b_scales[:5].numpy(), np.asarray(operands[3]).T)
  np.testing.assert_array_equal(a.float().numpy(), np.asarray(operands[0]).astype(np.float32))
  shape = shapes.Gemm("wgrad", 256, 384, 640)
  *_, b_scales = peers.cublas_operands(torch, shape, cases.gemm_operands(shape, jax.random.key(0)))
  assert b_scales.shape == (384, 5) and b_scales.stride() == (1, 384)


# --- timing -------------------------------------------------------------------------------------


def test_operand_sets_exceed_the_cache():
  """Law: at least four sets; small operands get more, up to a limit."""
  assert timing.sets_for(10**9) == 4 and timing.sets_for(1) == timing.MOST_SETS
  assert timing.sets_for(17e6) * 17e6 > timing.CACHE_BYTES


def test_calls_of_a_program_follow_each_other():
  """Oracle: the results of single calls; and a barrier between each two in the program."""
  sets = [(jnp.full((4,), float(i)),) for i in range(4)]
  run = timing.program(lambda x: 2 * x, sets)
  np.testing.assert_array_equal(np.stack(run(sets)), 2 * np.stack([s[0] for s in sets]))
  assert run.lower(sets).as_text().count("optimization_barrier") == 3


def test_measuring_without_a_profiler_uses_the_clock():
  """Law: on a machine without CUPTI the time is positive and says how it was taken."""
  found = timing.measure(lambda x: jnp.sin(x), [(jnp.ones((64, 64)),)] * 4, repetitions=2)
  assert found.method == "wall" and found.median >= found.least >= 0


# --- tuner --------------------------------------------------------------------------------------


def _fake_tune(us: dict[GemmConfig, float], calls: list):
  def run(shape, configs, **_):
    calls.append(shape)
    return [tune.Tried(c, us.get(c, 50.0), method="made up") for c in configs]

  return run


@pytest.fixture
def device(monkeypatch):
  """A GPU that has a name and nothing else."""
  class Device:
    device_kind, core_count = "NVIDIA Test 80GB", 132

  monkeypatch.setattr(jax, "devices", lambda: [Device()])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(shapes, "GEMMS", shapes.DENSE[:2])
  monkeypatch.setattr(tune.toolchain, "find", lambda _: None)
  return Device


def test_tuner_writes_what_lookup_reads(device, monkeypatch, tmp_path):
  """Oracle: `tables.lookup` gives the configuration that the made-up clock favoured."""
  monkeypatch.setattr(tables, "FOLDER", tmp_path)
  configs = {s: tune.candidates(s, 6) for s in shapes.DENSE[:2]}
  best = {s: found[3] for s, found in configs.items()}
  calls: list = []
  monkeypatch.setattr(tune, "tune", _fake_tune({c: 7.0 for c in best.values()}, calls))
  command = ["--tables", str(tmp_path), "--most", "6", "--json", str(tmp_path / "summary")]
  assert tune.main(command) == 0
  for shape, config in best.items():
    assert tables.lookup(device.device_kind, *cases.arguments(shape)) == config
  table = json.loads((tmp_path / "nvidia_test_80gb.json").read_text())
  assert table["device"] == "NVIDIA Test 80GB" and "T" in table["date"]
  measured = table["measured"][tables.key(*cases.arguments(shapes.DENSE[0]))]
  assert measured["us"] == 7.0 and len(measured["times"]) == 6 and measured["jax"]
  assert measured["tflops"] == pytest.approx(shapes.DENSE[0].flops / 7e-6 / 1e12, rel=1e-3)
  assert tune.main(command) == 0 and len(calls) == 2  # what is there is kept
  assert tune.main([*command, "--again", "--only", shapes.DENSE[1].name]) == 0 and len(calls) == 3
  assert {p.name for p in tmp_path.iterdir()} == {"nvidia_test_80gb.json", "summary"}


def test_tuner_leaves_what_it_had_no_time_for(device, monkeypatch, tmp_path, capsys):
  """Law: a shape of which a configuration was not timed has no entry, and is named."""
  def late(shape, configs, **_):
    return [tune.Tried(configs[0], 5.0), tune.Tried(configs[1], why=tune.LATE)]

  monkeypatch.setattr(tune, "tune", late)
  assert tune.main(["--tables", str(tmp_path), "--most", "2"]) == 0
  assert list(tmp_path.iterdir()) == []
  assert "unfinished: " + shapes.DENSE[0].name in capsys.readouterr().out


def test_spilling_configurations_are_dropped(monkeypatch):
  """Law: those that spill or fail are not timed, and why stands in the record."""
  configs = tune.candidates(SMALL, 3)
  reports = [tune.Report(registers=168), tune.Report(spill_stores=8), tune.Report(error="no")]
  monkeypatch.setattr(tune, "spill_reports", lambda *_: iter(reports))
  kept, dropped = tune.without_spills(SMALL, configs, object(), 1)
  assert kept == configs[:1] and [t.why for t in dropped] == ["spills 8 bytes", "no"]
  assert tune.record(SMALL, [tune.Tried(kept[0], 4.0), *dropped])["dropped"][0][0] == dropped[0].why


def test_wrong_configurations_are_dropped(monkeypatch):
  """Oracle: the definition. A result that differs from it is not timed, be it the first; nor is a
  configuration that raises."""
  a, b, c = tune.candidates(SMALL, 3)

  def call(shape, config, **_):
    if config == c:
      raise ValueError("refused")
    wrong = float(config == b)
    return lambda *args: cases.gemm_rows(shape, args, shape.m) * (1 + 0.1 * wrong) + wrong

  monkeypatch.setattr(cases, "gemm_call", call)
  found = tune.tune(SMALL, [b, a, c], deadline=time.monotonic() + 50, interpret=True,
                    measure=lambda *_: timing.Time(3.0, 3.0, "made up"))
  assert [t.us for t in found] == [None, 3.0, None]
  assert "differs" in found[0].why and "refused" in found[2].why
  found = tune.tune(SMALL, [a], deadline=0.0, interpret=True)
  assert found[0].why == tune.LATE


def test_rehearsal_of_the_tuner_writes_no_table(monkeypatch, capsys):
  """Law: real kernels run in the interpreter; no time is taken and nothing is written."""
  monkeypatch.setattr(tune.toolchain, "find", _no_tools)
  monkeypatch.setattr(tune, "write", lambda *_: pytest.fail("a rehearsal wrote a table"))
  assert tune.main(["--dry"]) == 0
  said = capsys.readouterr().out
  assert "2 configurations ran" in said and "nothing is written" in said


def _no_tools(_):
  raise tune.toolchain.MissingError("not here")


@pytest.mark.parametrize("command", [tune.main, bench.main, correctness.main])
def test_without_a_gpu_it_is_said(command, capsys):
  """Law: status 2 and the word, and nothing is done."""
  assert command([]) == 2
  assert "no GPU" in capsys.readouterr().out


# --- benchmark ----------------------------------------------------------------------------------


def test_line_of_the_benchmark():
  """Oracle: ratios by hand."""
  line = bench.Line("dense", us=100.0, tflops=1200.0, gbs=900.0, peer_us=110.0, bf16_us=250.0,
                    limit_us=80.0, published=1000.0)
  assert [c.strip() for c in str(line).split("|")] == [
      "dense", "100.0", "1200", "900", "1.10x", "2.50x", "80 %", "120 %"]
  assert str(bench.Line("x", note="WRONG")).count(" - ") >= 6


def test_rehearsal_of_the_benchmark(tmp_path):
  """Law: the interpreted kernels agree with their definitions, and the JSON says so untimed."""
  path = tmp_path / "kernels.json"
  assert bench.main(["--dry", "--json", str(path)]) == 0
  content = json.loads(path.read_text())
  assert content["dry"] and all(line["us"] is None for line in content["lines"])
  assert all(line["error"] < bench.TOLERANCE for line in content["lines"])


def test_a_wrong_kernel_is_not_timed(monkeypatch):
  """Law: a result that differs from the definition has no time."""
  monkeypatch.setattr(timing, "measure", lambda *_, **__: pytest.fail("timed"))
  case = cases.quantize_case("rows", 128, 256)
  wrong = dataclasses.replace(case, kernel=lambda **_: lambda x: (
      peers.quantize_rows(x)[0], 1.1 * peers.quantize_rows(x)[1]))
  line = bench.measure(wrong, num_sms=2, bandwidth=1e12, limits=None, torch=None, seed=0)
  assert line.us is None and line.note.startswith("WRONG")


# --- make gpu -----------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
  """Writes a module that stands for a step."""
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))

  def write(name: str, code: str) -> gpu.Step:
    (tmp_path / f"{name}.py").write_text(code)
    return gpu.Step(name, name, ("--minutes", "{minutes}"), 1.0)

  return write


def test_steps_fail_alone_and_in_time(module, tmp_path, monkeypatch):
  """Law: a failing step and one that hangs are noted, their workers end, the last one runs."""
  alive = tmp_path / "alive"
  later = f"import time; time.sleep(6); open({str(alive)!r}, 'w')"
  steps = (
      module("good", "import sys, json\n"
                     "json.dump({'n': 1}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))"),
      module("bad", "raise SystemExit(3)"),
      module("hangs", "import subprocess, sys, time\n"
                      f"subprocess.Popen([sys.executable, '-c', {later!r}])\ntime.sleep(60)"),
      module("last", "print('here')"))
  steps = tuple(dataclasses.replace(s, minutes=1.5 / 60) if s.name == "hangs" else s
                for s in steps)
  monkeypatch.setattr(gpu, "STEPS", steps)
  assert gpu.main(["--dry", "--work", str(tmp_path / "work")]) == 1
  content = json.loads((tmp_path / "work" / "gpu-dry.json").read_text())
  assert [d["status"] for d in content["steps"]] == ["ok", "failed", "out of time", "ok"]
  assert content["steps"][0]["result"] == {"n": 1} and content["steps"][1]["code"] == 3
  assert "here" in (tmp_path / "work" / "last.log").read_text()
  time.sleep(5)
  assert not alive.exists()  # what a step started does not outlive it


def test_no_time_left(module, tmp_path, monkeypatch):
  """Law: steps for which no time is left are not started, and it is said."""
  monkeypatch.setattr(gpu, "STEPS", (module("never", "raise SystemExit(3)"),))
  gpu.main(["--dry", "--minutes", "0.1", "--work", str(tmp_path)])
  assert "not started" in (tmp_path / "gpu-dry.json").read_text()


def test_training_runs_are_compared():
  """Oracle: by hand."""
  def arm(name, rate, losses):
    return {"name": f"train_{name}", "result": {
        "arm": name, "tokens_per_s": rate, "mfu_of_bf16_peak": 0.1, "losses": losses}}

  found = gpu.comparison([arm("v3", 300.0, [9.0, 2.2]), arm("bf16", 200.0, [9.0, 2.0])])
  assert found["speedup"] == 1.5
  assert found["loss_difference"] == pytest.approx(5.6 / 5.5 - 1)
  assert gpu.comparison([arm("v3", 1.0, [1.0])]) is None


def test_make_gpu_needs_a_gpu(tmp_path):
  """Law: without nvidia-smi the status is 2 and the way to rehearse is said."""
  done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--work", str(tmp_path / "w")],
                        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
  assert done.returncode == 2 and "--dry" in done.stdout
