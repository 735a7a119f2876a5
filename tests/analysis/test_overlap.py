"""Orders of compiled programs: hand-written modules, and the training step compiled for H100s."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from dsv3_jax.analysis import hlo, overlap
from dsv3_jax.fp8 import quantize
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.parallel import crossings, dispatch, payload
from tests import quick

# In the compiler's style: a switch whose first branch is F, whose second is FB.
MODULE = (pathlib.Path(__file__).parent / "scheduled_by_hand.hlo").read_text()
EXPOSED = ("exposed: async-start.1, 128 bytes", "exposed: sync, 128 bytes")


def test_order():
  """Oracle: the module above, read by eye."""
  alone, pair = overlap.orders(hlo.parse(MODULE))
  assert (alone.title, str(alone)) == ("branch 1, F", "[a1 . a1]")
  assert (pair.title, str(pair)) == ("branch 2, FB", "[a1 G . (G) a1] [a2 .2 a2] a3! . G")
  assert [(e.split, e.matmuls) for e in pair.exchanges] == [(True, 2), (True, 0), (False, 0)]
  assert {e.size for e in pair.exchanges} == {128}
  assert pair.exchanges[1].groups == ((0, 2), (1, 3), (4, 6), (5, 7))


@pytest.mark.parametrize("module, status, said", [
    (MODULE, 1, ["branch 1, F: 1 of 1", "branch 2, FB: 2 of 3", *EXPOSED, "FB: 1 of 3"]),
    (MODULE.replace("/FB/", "/B/"), 0, ["branch 2, B: 2 of 3"]),
    (MODULE.replace("is_scheduled=true, ", ""), 2, ["the HLO module is not scheduled"]),
    ("module @jit_step {}", 2, ["no HLO module"]),
    ("HloModule m, is_scheduled=true\n", 0, ["no all-to-alls"])])
def test_status(tmp_path, capsys, module, status, said):
  """Law: an exposed all-to-all of an FB branch is reported and is the status; no other one is."""
  (tmp_path / "module.txt").write_text(module)
  assert overlap.main([str(tmp_path / "module.txt")]) == status
  out = capsys.readouterr().out
  assert all(text in out for text in said), out


@pytest.mark.parametrize("groups, expected", [
    ("{{0,2},{1,3}}", ((0, 2), (1, 3))),
    ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ("[4,2]<=[2,4]T(1,0)", ((0, 4), (1, 5), (2, 6), (3, 7))),
    ("mesh['pipe'=2,'node'=2,'gpu'=2] {'node'}", ((0, 2), (1, 3), (4, 6), (5, 7))),
    ("mesh['node'=2,'gpu'=2] {'node','gpu'}", ((0, 1, 2, 3),))])
def test_groups(groups, expected):
  """Oracle: the three ways of writing groups of devices, unfolded by hand."""
  line = MODULE.replace("{{0,1},{2,3},{4,5},{6,7}}", groups)
  assert overlap.orders(hlo.parse(line))[0].exchanges[0].groups == expected


NODES, GPUS, E, A, LIMIT, P, D = 4, 2, 32, 8, 2, 64, 256  # a token's experts lie on 2 of 4 nodes


@functools.cache
def crossing_bytes(form, fp8, factor):
  """Of a compiled dispatch, bytes that a device sends to other nodes by each all-to-all, sorted."""
  codec = payload.Codec(functools.partial(quantize.quantize, tile=(1, 128)), QTensor.dequantize)
  settings = dispatch.Settings(form=form, factor=factor, limit=LIMIT, overflow="drop",
                               wire=payload.Wire(codec if fp8 else None))
  mesh = jax.make_mesh((NODES, GPUS), settings.axes, axis_types=(AxisType.Auto,) * 2)
  cut = PartitionSpec(settings.axes)

  def local(expert_PA, gate_PA, x_PD):
    route, _, _ = dispatch.route(expert_PA, gate_PA, E, 8, settings)
    return dispatch.dispatch(x_PD, route)

  shapes = [jax.ShapeDtypeStruct((NODES * GPUS * P, n), dtype)
            for n, dtype in ((A, jnp.int32), (A, jnp.float32), (D, jnp.float32))]
  compiled = quick.jit(jax.shard_map(local, mesh=mesh, in_specs=(cut,) * 3, out_specs=cut)).lower(
      *shapes).compile()
  found = [e for o in overlap.orders(hlo.parse(compiled.as_text())) for e in o.exchanges]
  return sorted(filter(None, (e.crossing(GPUS) for e in found)))


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_crossing_bytes(factor):
  """Oracle: rows by hand from the settings; law: room for what `crossings` expects of a router."""
  away = 1 - 1 / NODES
  plans, two_hop = crossing_bytes("two_hop", False, factor)
  flat = crossing_bytes("flat", False, factor)[-1]
  rows = P * NODES * away if factor == 0 else P * LIMIT * away
  assert (plans, two_hop) == (rows * 4 * 2 * A, rows * 4 * D)
  assert flat == (P * NODES * GPUS * away if factor == 0 else P * A * away) * 4 * D
  scales, _, codes = sorted(crossing_bytes("two_hop", True, factor))
  assert (scales, codes) == (rows * 4 * D // 128, rows * D)
  # Of the report's rows in bf16: half of the bytes, and the scales.
  assert (scales + codes) / (rows * 2 * D) == 0.5 + 2 / 128
  expected = crossings.expected(E, A, NODES, LIMIT, NODES, GPUS)
  if factor:  # rows that a router at random sends: these to two nodes as a rule
    assert two_hop / (P * 4 * D) == pytest.approx(expected[0], rel=0.01)
    assert flat / (P * 4 * D) == expected[2] > expected[1]
