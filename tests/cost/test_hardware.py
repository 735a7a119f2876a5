"""Devices as data, and the shares of their peaks against the published tables they come from."""

import dataclasses
import json

import pytest

from dsv3_jax.config import ConfigError, preset
from dsv3_jax.cost import hardware, operations, timing
from dsv3_jax.cost.hardware import HARDWARE, Shares

# DeepGEMM's table of 2025-02-26 on an H800: (groups, M a group, N, K) -> TFLOP/s.
DEEPGEMM = {
    (1, 4096, 7168, 16384): 1358, (1, 4096, 32768, 512): 590,  # these two gave the shares
    (1, 4096, 24576, 1536): 990, (1, 4096, 4096, 7168): 1304, (1, 4096, 7168, 2048): 1025,
    (4, 8192, 4096, 7168): 1297, (4, 8192, 7168, 2048): 1099,
    (8, 4096, 4096, 7168): 1288, (8, 4096, 7168, 2048): 1093,
    (1, 128, 7168, 16384): 645, (1, 128, 4096, 7168): 533, (1, 64, 7168, 16384): 336}
IDLE = dataclasses.replace(HARDWARE["h800"], comm_sms=0)  # as in their benchmark


def gemm_seconds(groups, m, n, k):
  flops = 2.0 * groups * m * n * k
  kernel = operations.Kernel("F", "matmul", "", flops, groups * (m * k + n * k),
                             2.0 * groups * m * n, "fp8")
  return flops, timing.seconds(kernel, IDLE)


@pytest.mark.parametrize("shape", DEEPGEMM, ids=str)
def test_gemms_against_deepgemm(shape):
  """Oracle: the published TFLOP/s, of which two rows were used: 2 % on those, 6 % on large ones,
  20 % on those that memory limits."""
  flops, seconds = gemm_seconds(*shape)
  near = {0: 0.02, 1: 0.02}.get(list(DEEPGEMM).index(shape), 0.06 if shape[1] > 1000 else 0.2)
  assert flops / seconds / 1e12 == pytest.approx(DEEPGEMM[shape], rel=near)


def test_a_layer_against_the_trace():
  """Oracle: milliseconds of the authors' profile trace, 4 MoE layers on 112 of 132 SMs."""
  from dsv3_jax.config import Runtime

  n = operations.numerics(Runtime(compute_dtype="bfloat16", remat="report", recipe="v3"))
  layer = operations.block(preset("v3_671b"), 4096, 4096, True, 4, n, 7.2)
  found = {k: 4e3 * v for k, v in timing.by_class(layer, HARDWARE["h800"]).items()}
  # Shares were taken from these three.
  assert found["attention core"] == pytest.approx(22.0, rel=0.03)
  assert found["casts, transposes"] == pytest.approx(16.7, rel=0.03)
  assert found["other streams"] == pytest.approx(4.8 + 3.4 + 1.9 + 1.5 + 0.5, rel=0.03)
  # And these follow from DeepGEMM's table.
  assert found["grouped GEMMs"] == pytest.approx(22.9, rel=0.06)
  assert found["other GEMMs"] == pytest.approx(18.8, rel=0.09)
  # The trace's Wgrad kernels add up to 32.8 ms on two streams at once; as they pass, 4 x 5.9.
  assert found["Wgrad GEMMs"] == pytest.approx(4 * 5.9, rel=0.06)
  forward = 1e3 * sum(timing.seconds(k, HARDWARE["h800"]) for k in layer
                      if k.kind == "attention_forward")
  assert forward == pytest.approx(1.2, rel=0.02)


def test_json_round_trip(tmp_path):
  """Oracle: the device itself."""
  for name, hw in HARDWARE.items():
    file = tmp_path / f"{name}.json"
    file.write_text(hardware.to_json(hw))
    assert hardware.get(str(file)) == hw


def test_json_from_a_base(tmp_path):
  """Oracle: the base with the fields changed."""
  file = tmp_path / "mine.json"
  file.write_text(json.dumps({"base": "h100", "name": "ours", "slow": 25e9,
                              "shares": {"overlap": 0.8}}))
  assert hardware.get(str(file)) == dataclasses.replace(
      HARDWARE["h100"], name="ours", slow=25e9, shares=Shares(overlap=0.8))


@pytest.mark.parametrize("text,message", [
    ("[]", "an object"), ("{", "not JSON"), ('{"name": "x"}', "missing"),
    ('{"base": "h101"}', "did you mean 'h100'"), ('{"base": "h100", "smss": 1}', "'sms'"),
    ('{"base": "h100", "fast": "quick"}', "fast='quick'"),
    ('{"base": "h100", "comm_sms": 132}', "leaves none"),
    ('{"base": "h100", "bandwidth": 0}', "must be positive"),
    ('{"base": "h100", "shares": {"overlap": 2}}', "overlap=2"),
    ('{"base": 5}', "base=5 must be a device's name"),
    ('{"base": "h100", "shares": 3}', "shares=3 must be an object"),
    ('{"base": "h100", "price": NaN}', "price is NaN"),
    ('{"base": "h100", "memory": Infinity}', "memory=inf must be a finite")])
def test_bad_files(tmp_path, text, message):
  """Oracle: what is said of each mistake, and the file's name."""
  file = tmp_path / "mine.json"
  file.write_text(text)
  with pytest.raises(ConfigError, match=message) as caught:
    hardware.get(str(file))
  assert str(file) in str(caught.value) or "h101" in text


def test_a_base_in_a_circle(tmp_path):
  """Oracle: the message names the file; a chain without a circle is read."""
  one, two, three = (tmp_path / f"{n}.json" for n in ("one", "two", "three"))
  one.write_text(json.dumps({"base": str(two)}))
  two.write_text(json.dumps({"base": str(one)}))
  three.write_text(json.dumps({"base": str(three)}))
  for file in (one, three):
    with pytest.raises(ConfigError, match="is the file itself, or starts from it"):
      hardware.get(str(file))
  two.write_text('{"base": "h200", "price": 3}')
  assert hardware.get(str(one)) == dataclasses.replace(HARDWARE["h200"], price=3)


def test_unknown_hardware():
  """Oracle: the nearest name, or a file that is not there."""
  with pytest.raises(ConfigError, match="did you mean 'h800'"):
    hardware.get("h80")
  with pytest.raises(ConfigError, match="No such file"):
    hardware.get("nowhere.json")


def test_this_machine():
  """Oracle: bounds that any computer keeps; 0.2 s and not seconds."""
  hw = hardware.measure_cpu(0.02)
  assert 1e8 < hw.fp32 < 1e14 and 1e8 < hw.bandwidth < 1e13 and hw.memory > 1e8
  assert not hw.fast and not hw.slow and not hw.fused_attention
