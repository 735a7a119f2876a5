"""The published expert balancer: printed examples, a transcription, brute force, laws."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from dsv3_jax.infer import eplb
from tests.infer import loads, published_eplb

WEIGHT = np.array([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                   [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])


def test_printed_example():
  """Oracle: the printed example, hierarchical, and numbers of its GPUs (facts 6.7)."""
  slots, _, count = eplb.rebalance_experts(WEIGHT, 16, 4, 2, 8)
  assert slots.tolist() == [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
                            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]
  assert count.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
                            [1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1]]
  assert published_eplb.gpu_loads(WEIGHT, slots, count, 8).tolist() == [
      [121.5, 86.5, 125, 113, 147.5, 131.5, 156, 152],
      [173, 179.5, 120.5, 172, 123, 152, 118.5, 117.5]]


@pytest.mark.parametrize("groups, nodes", [(3, 2), (1, 1), (12, 5)])
def test_printed_global(groups, nodes):
  """Oracle: the global policy's numbers on the same loads, however it is come to (facts 6.7)."""
  slots, where, count = eplb.rebalance_experts(WEIGHT, 16, groups, nodes, 8)
  assert slots.tolist() == [[10, 6, 10, 7, 0, 2, 11, 4, 5, 9, 5, 4, 8, 3, 1, 1],
                            [1, 10, 2, 4, 5, 11, 5, 0, 6, 7, 6, 3, 8, 8, 9, 7]]
  assert count.tolist() == [[1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1],
                            [1, 1, 1, 1, 1, 2, 2, 2, 2, 1, 1, 1]]
  assert where[0].tolist()[:6] == [[4, -1], [14, 15], [5, -1], [13, -1], [11, 7], [8, 10]]


@pytest.mark.parametrize("sizes", [(24, 32, 4, 2, 8), (24, 48, 8, 4, 8), (24, 30, 1, 1, 15),
                                   (24, 32, 6, 4, 16), (16, 16, 4, 4, 4), (24, 24, 2, 2, 24),
                                   (8, 40, 4, 1, 4), (12, 12, 12, 12, 12)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_transcription(sizes, dtype):
  """Oracle: the algorithm transcribed, on nine kinds of loads; and its laws."""
  experts, slots, groups, nodes, gpus = sizes
  rng = np.random.default_rng(0)
  for kind in loads.KINDS:
    weight = loads.draw(kind, 3, experts, rng)
    weight = (weight * 50).astype(dtype) if dtype == np.int64 else weight.astype(dtype)
    got = eplb.rebalance_experts(weight, slots, groups, nodes, gpus)
    for ours, theirs in zip(got, published_eplb.rebalance_experts(
        weight, slots, groups, nodes, gpus)):
      assert ours.dtype == np.int64 and np.array_equal(ours, theirs), kind
    laws(got, weight.shape, slots)


def laws(got, shape, slots):
  """Each expert has a slot, counts are the slots', and the two maps are inverse."""
  physical, logical, count = got
  layers, experts = shape
  assert physical.shape == (layers, slots) and count.shape == shape
  assert logical.shape == (layers, experts, count.max())
  assert (count >= 1).all() and (count.sum(-1) == slots).all()
  for l, e in np.ndindex(shape):
    mine = logical[l, e]
    assert (mine[:count[l, e]] >= 0).all() and (mine[count[l, e]:] == -1).all()
    assert sorted(mine[:count[l, e]]) == np.nonzero(physical[l] == e)[0].tolist()


def test_full_size():
  """Oracle: the transcription, at the model's sizes (facts 3.8); layers do not see each other."""
  rng = np.random.default_rng(1)
  weight = rng.gamma(0.5, size=(58, 256)) * 1000
  for slots, nodes, gpus in ((288, 4, 32), (288, 18, 144), (320, 40, 320)):
    got = eplb.rebalance_experts(weight, slots, 8, nodes, gpus)
    want = published_eplb.rebalance_experts(weight[5:6], slots, 8, nodes, gpus)
    assert np.array_equal(got[0][5:6], want[0]) and np.array_equal(got[2][5:6], want[2])


def test_counts_are_optimal():
  """Oracle: every possible choice of counts has a busiest replica as busy as this one's."""
  rng = np.random.default_rng(2)
  for kind in loads.KINDS:
    weight = loads.draw(kind, 1, 4, rng).astype(np.float32)
    best = min(max(w / c for w, c in zip(weight[0].tolist(), counts))
               for counts in itertools.product(range(1, 6), repeat=4) if sum(counts) == 8)
    count = eplb.replicate(weight, 8)[2]
    np.testing.assert_allclose((weight / count).max(), best, rtol=1e-6)


@pytest.mark.parametrize("change, named", [
    ({"num_replicas": 10}, ["num_replicas=10", "12 experts"]),
    ({"num_replicas": 18}, ["num_replicas=18", "num_gpus=8", "16 or 24"]),
    ({"num_gpus": 7, "num_replicas": 14}, ["num_gpus=7", "num_nodes=2"]),
    ({"num_groups": 8}, ["num_groups=8", "12 experts"]),
    ({"num_nodes": 0}, ["num_nodes=0", "positive"]),
    ({"num_gpus": 8.0}, ["num_gpus=8.0", "whole"]),
    ({"weight_LE": WEIGHT[0]}, ["(12,)", "[layers, experts]"]),
    ({"weight_LE": np.where(WEIGHT == 4, -1, WEIGHT)}, ["weight[0, 7]=-1", "not negative"]),
    ({"weight_LE": np.where(WEIGHT == 16, np.nan, WEIGHT)}, ["weight[1, 10]=nan"]),
    ({"weight_LE": WEIGHT.astype(str)}, ["dtype", "numbers"])])
def test_mistakes(change, named):
  """Oracle: one message that names the argument, its value and what would do."""
  good = {"weight_LE": WEIGHT, "num_replicas": 16, "num_groups": 4, "num_nodes": 2, "num_gpus": 8}
  with pytest.raises(ValueError) as error:
    eplb.rebalance_experts(**{**good, **change})
  assert all(part in str(error.value) for part in named), error.value


def test_numpy_alone():
  """Law: placements are found without jax, so that any process may."""
  code = "import sys; from dsv3_jax.infer import placement; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code]).returncode == 0
