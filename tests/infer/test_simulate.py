"""Placement policies over time."""

import numpy as np
import pytest

from dsv3_jax.infer import eplb, placement, simulate


@pytest.mark.parametrize("gpus, slots, nodes, hierarchical", [
    (32, 288, 4, True), (64, 320, 8, True), (144, 288, 18, False), (320, 320, 40, False),
    (8, 288, 1, False), (4, 288, 1, False)])
def test_cluster(gpus, slots, nodes, hierarchical):
  """Oracle: the deployments of facts 3.8: 8 + 1 on 32, 2 on 144, 1 on 320 GPUs."""
  on = simulate.cluster(gpus, 256)
  assert (on.slots, on.nodes, on.hierarchical) == (slots, nodes, hierarchical)


def test_by_hand():
  """Oracle: two experts in turn busy, two GPUs: every number by hand."""
  load = np.zeros((6, 1, 4))
  load[:3, 0] = [6, 2, 2, 2]
  load[3:, 0] = [2, 2, 2, 6]
  on = simulate.Cluster(slots=6, groups=1, nodes=1, gpus=2)
  none, static, anew = simulate.run(load, on, ("none", "static", "eplb"), window=1, every=2)
  # In order: 0 1 and 2 3; the published: 0 twice and the rest, 3 3 | 2 2 + one more replica.
  assert none.ratio_S.tolist() == [8 / 6, 8 / 6, 8 / 6, 8 / 6, 8 / 6]
  slots = eplb.rebalance_experts(load[0], 6, 1, 1, 2)[0]
  assert static.ratio_S.tolist() == [
      placement.imbalance(load[s], slots, 2)[0] for s in range(1, 6)]
  later = eplb.rebalance_experts(load[4], 6, 1, 1, 2)[0]
  assert anew.ratio_S.tolist() == [placement.imbalance(load[s], p, 2)[0] for s, p in (
      (1, slots), (2, slots), (3, slots), (4, slots), (5, later))]
  assert len(anew.moved) == 2 and anew.moved[0] == 0 < anew.moved[1]
  assert static.moved == none.moved == () and len(static.seconds) == 1


def test_policies():
  """Laws: a steady load, known beforehand, orders the policies; only the limit is fetched."""
  rng = np.random.default_rng(0)
  load = np.tile(rng.gamma(1.0, size=(3, 32)), (12, 1, 1))
  on = simulate.cluster(16, 32, groups=1, redundant=16)
  found = {o.policy: o for o in simulate.run(load, on, simulate.POLICIES, 4, 2)}
  mean = {name: o.ratio_S.mean() for name, o in found.items()}
  assert mean["none"] > mean["static"] == mean["eplb"] > mean["ours"] == mean["limited"]
  assert mean["steady"] == pytest.approx(mean["ours"])
  assert all(sum(o.moved) == 0 for o in found.values())
  load[6:] = load[6:, :, ::-1]
  found = {o.policy: o for o in simulate.run(load, on, simulate.POLICIES, 4, 2, max_moves=3)}
  assert 0 < max(found["limited"].moved) <= 9
  assert found["limited"].ratio_S[-1] < found["static"].ratio_S[-1]
  assert sum(found["ours"].moved) < sum(found["eplb"].moved)
  worst = np.max([placement.imbalance(now, eplb.rebalance_experts(load[0], 48, 1, 2, 16)[0], 16)
                  for now in load[4:]])
  assert found["static"].worst == pytest.approx(worst)


def test_ours_is_better_on_steady_loads():
  """Oracle: the published policy on drifting traffic without shifts, 96 GPUs, 3 slots each."""
  load = simulate.synthetic(60, 4, 256, drift=0.01, domains=1, seed=1)
  theirs, ours, steady = simulate.run(load, simulate.cluster(96, 256), ("eplb", "ours", "steady"),
                                      15, 15)
  assert ours.ratio_S.mean() - 1 < 0.9 * (theirs.ratio_S.mean() - 1)
  assert steady.ratio_S.mean() < ours.ratio_S.mean() + 0.01
  assert sum(steady.moved) < 0.6 * sum(ours.moved) < sum(theirs.moved)


def test_synthetic():
  """Laws: repeatable; tokens are conserved on average; Zipf; drift and shifts change it, alone."""
  still = simulate.synthetic(6, 2, 64, tokens=10**6, active=4, drift=0, domains=1, skew=1)
  assert np.array_equal(still, simulate.synthetic(6, 2, 64, tokens=10**6, active=4, drift=0,
                                                  domains=1, skew=1))
  np.testing.assert_allclose(still.sum(-1), 4e6, rtol=5e-3)
  zipf = np.sort(1 / np.arange(1.0, 65))
  np.testing.assert_allclose(np.sort(still[0, 0]) / 4e6, zipf / zipf.sum(), rtol=0.05)
  change = lambda **kinds: [np.abs(b - a).sum() / 8e6 for a, b in zip(
      *(lambda x: (x, x[1:]))(simulate.synthetic(6, 2, 64, tokens=10**6, active=4, skew=1, shift=3,
                                                 **{"drift": 0, "domains": 1, **kinds})))]
  assert max(change()) < 0.01
  drifts = change(drift=0.1)
  assert min(drifts) > 0.05 and max(drifts) < 0.15
  shifts = change(domains=3)
  assert shifts[2] > 0.1 and max(np.delete(shifts, 2)) < 0.01
  assert not np.array_equal(still, simulate.synthetic(6, 2, 64, tokens=10**6, active=4, drift=0,
                                                      domains=1, skew=1, seed=1))


@pytest.mark.parametrize("call, named", [
    (lambda: simulate.synthetic(0, 1, 4), ["steps=0", "1"]),
    (lambda: simulate.synthetic(1, 1, 4, skew=-1), ["skew=-1"]),
    (lambda: simulate.synthetic(1, 1, 4, drift=float("nan")), ["drift=nan"]),
    (lambda: simulate.cluster(12, 32), ["ranks=12", "8 GPUs"]),
    (lambda: simulate.cluster(8, 32, redundant=-1), ["redundant=-1"]),
    (lambda: simulate.run(np.ones((4, 1, 8)), simulate.cluster(8, 8), ("eplb",), 4, 1),
     ["window=4", "4 steps"]),
    (lambda: simulate.run(np.ones((4, 1, 8)), simulate.cluster(8, 8), ("eplb",), 1, 0),
     ["every=0"]),
    (lambda: simulate.run(np.ones((4, 1, 8)), simulate.cluster(8, 8), ("best",), 1, 1),
     ["'best'", "steady"])])
def test_mistakes(call, named):
  """Oracle: one message that names the argument, its value and what would do."""
  with pytest.raises(ValueError) as error:
    call()
  assert all(part in str(error.value) for part in named), error.value
