"""Orders of compiled programs: hand-written modules, and the training step compiled for H100s."""

import pathlib

import pytest

from dsv3_jax.analysis import hlo, overlap

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
