"""Serving on several devices: experts in slots, moved while requests run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import balance, migrate, placement, slots, watch
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.request import Request
from dsv3_jax.parallel import mesh as mesh_lib
from tests.infer.requests import CFG, SETTINGS, V, ask, finish, make_generator, written

E, A = CFG.moe.experts, CFG.moe.active


@pytest.fixture(scope="module")
def generator():
  return make_generator()


def devices(**sizes):
  sizes = config.Mesh(**sizes)
  if sizes.devices > len(jax.devices()):
    pytest.skip(f"needs {sizes.devices} devices")
  return sizes, mesh_lib.make_mesh(sizes)


def random_placement(rng, experts, count):
  return rng.permutation([*range(experts), *rng.integers(0, experts, count - experts)])


def test_choose():
  """Law: the slot holds the expert; an expert's replicas get equally many of a batch's tokens, up
  to one; tokens that do not count go nowhere."""
  rng = np.random.default_rng(0)
  expert_I = random_placement(rng, E, 20)
  expert_PA = np.stack([rng.permutation(E)[:A] for _ in range(60)])
  valid_P = rng.random(60) < 0.8
  tables = slots.tables(expert_I, E)
  slot_PA = np.asarray(slots.choose(jnp.asarray(expert_PA), tables, jnp.asarray(valid_P), 7))
  assert (slot_PA[~valid_P] == 20).all()
  assert (expert_I[slot_PA[valid_P]] == expert_PA[valid_P]).all()
  whole_PA = np.full((60, A), 3)  # one expert for all
  slot_PA = np.asarray(slots.choose(jnp.asarray(whole_PA), tables, jnp.ones(60, bool), 0))
  shares = np.bincount(slot_PA[:, 0], minlength=20)[expert_I == 3]
  assert shares.sum() == 60 and shares.max() - shares.min() <= 1


def test_tables_refuse():
  """Oracle: the messages."""
  with pytest.raises(ValueError, match="expert 2 has no slot"):
    slots.tables(np.array([0, 1, 1, 3]), 4)
  with pytest.raises(ValueError, match="a slot holds expert -1 or 3"):
    slots.tables(np.array([0, 1, -1, 3]), 4)


def test_experts_move():
  """Oracle: indexing the experts by the new placement; nothing is compiled after the first change,
  and what a device has already is not fetched."""
  _, mesh = devices(node=2, gpu=4)
  rng = np.random.default_rng(1)
  w_EDF = {"a": rng.standard_normal((E, 3, 2), np.float32), "b": rng.integers(0, 9, (E, 5))}
  compiled = None
  for _ in range(6):
    old_I, new_I = random_placement(rng, E, 24), random_placement(rng, E, 24)
    old = jax.tree.map(lambda w, i=old_I: migrate.put(w[i], mesh, cut=True), w_EDF)
    own_Wi, rounds = migrate.plan(old_I, new_I, 8)
    new = migrate.begin(old, migrate.put(own_Wi, mesh, cut=True), mesh=mesh)
    for r in rounds:
      new = migrate.exchange(new, old, migrate.put(r.from_W, mesh, cut=True),
                              migrate.put(r.to_W, mesh, cut=True),
                              migrate.put(np.int32(r.distance), mesh), mesh=mesh)
    jax.tree.map(lambda x, w, i=new_I: np.testing.assert_array_equal(x, w[i]), new, w_EDF)
    fetched = sum((r.to_W < 3).sum() for r in rounds)
    had = [set(old_I[3 * w:3 * w + 3]) for w in range(8)]
    assert fetched == sum(e not in had[w] for w in range(8) for e in new_I[3 * w:3 * w + 3])
    compiled = compiled or migrate.exchange._cache_size()
  assert migrate.exchange._cache_size() == compiled


def serve(generator, sizes, mesh, requests, **changes):
  """(engine after all have ended, each request's tokens, load of all windows)."""
  expert_LI = balance.first(CFG, mesh, 4)
  runtime = config.replace(generator.runtime, mesh=sizes)
  made = Engine(CFG, slots.place(generator.weights, expert_LI, mesh),
                dataclasses.replace(SETTINGS, running=2, window=1e-9, **changes), runtime,
                mesh=mesh, expert_LI=expert_LI)
  loads = []
  made.batches.watch.on_load = loads.append
  events = [ask(made, r)[1] for r in requests]
  finish(made)
  loads.append(np.asarray(made.batches._load_LE))
  return made, [written(e) for e in events], sum(loads)


@pytest.mark.parametrize("sizes, halves", [
    (dict(node=2, gpu=2), False), (dict(data=2, gpu=2), True)])
def test_engine(generator, sizes, halves):
  """Oracle: the generator, on one device: tokens are the same while experts move between steps, for
  one micro-batch or two; the load is A for every token run, in every layer; weights end up as the
  placement says."""
  sizes, mesh = devices(**sizes)
  rng = np.random.default_rng(3)
  requests = [Request(tuple(rng.integers(0, V, rng.integers(1, 20)).tolist()), int(n))
              for n in rng.integers(1, 20, 12)]
  made, found, load_LE = serve(generator, sizes, mesh, requests, halves=halves)
  alone = generator([r.prompt for r in requests], 20)
  assert found == [a.tokens[:r.most] for a, r in zip(alone, requests)]
  assert made.totals["length"] == len(requests) and not made.totals["preempted"]
  run = made.totals["prompt"] + made.totals["new"] - len(requests)
  np.testing.assert_array_equal(load_LE.sum(1), np.full(CFG.moe_layers, A * run))
  balancer = made.batches.balancer
  assert balancer.totals["rebalanced"] > 1 and balancer.totals["moved"] > 0
  originals = [w.ffn for w in generator.weights.layers if hasattr(w.ffn, "w_router_DE")]
  placed = [w.ffn for w in balancer.weights.layers if hasattr(w.ffn, "w_router_DE")]
  for expert_I, ffn, before in zip(balancer.expert_LI, placed, originals):
    np.testing.assert_array_equal(ffn.w_in_EDF, np.asarray(before.w_in_EDF)[expert_I])
    np.testing.assert_array_equal(ffn.w_out_EFD, np.asarray(before.w_out_EFD)[expert_I])


def test_balancer(generator):
  """Oracle: `placement.imbalance` of what is then in the slots: after a window whose load is
  uneven, the busiest device has less of it; one step is one round, and requests may run between."""
  sizes, mesh = devices(gpu=4)
  load_LE = np.tile(np.arange(1, E + 1)[::-1] ** 2.0, (CFG.moe_layers, 1))
  expert_LI = balance.first(CFG, mesh, 0)
  made = balance.Balancer(CFG, slots.place(generator.weights, expert_LI, mesh), expert_LI, mesh)
  made.rebalance(load_LE)
  before = made.imbalance
  made._wanted.result()
  steps = 0
  while made.busy:
    made.step()
    steps += 1
  made.close()
  assert steps > 2 and made.totals["moved"] > 0
  assert made.imbalance == placement.imbalance(load_LE, made.expert_LI, 4).mean() < before


@pytest.mark.parametrize("broken", ["begin", "exchange"])
def test_a_move_that_fails(generator, monkeypatch, broken):
  """Law: it costs no request and no expert: all goes on where it was; the next rebalancing moves.
  Nothing is compiled while serving, whatever moves."""
  sizes, mesh = devices(gpu=4)
  expert_LI = balance.first(CFG, mesh, 4)
  made = Engine(CFG, slots.place(generator.weights, expert_LI, mesh),
                dataclasses.replace(SETTINGS, running=1, window=1e-9),
                config.replace(generator.runtime, mesh=sizes), mesh=mesh, expert_LI=expert_LI)
  made.warm()
  compiled = [f._cache_size() for f in made.batches._functions] + [migrate.exchange._cache_size()]
  rng = np.random.default_rng(4)
  requests = [Request(tuple(rng.integers(0, V, 6).tolist()), 12) for _ in range(9)]

  def fail(*args, **kwargs):
    raise RuntimeError("no memory")

  whole = getattr(migrate, broken)
  monkeypatch.setattr(migrate, broken, fail)
  events = [ask(made, r)[1] for r in requests[:6]]
  finish(made)
  assert (made.balancer.expert_LI == expert_LI).all() and not made.balancer.totals["moved"]
  monkeypatch.setattr(migrate, broken, whole)
  events += [ask(made, r)[1] for r in requests[6:]]
  finish(made)
  made.finish()
  assert made.balancer.totals["moved"]
  alone = generator([r.prompt for r in requests], 12)
  assert [written(e) for e in events] == [a.tokens for a in alone]
  assert compiled == [f._cache_size() for f in made.batches._functions] + [
      migrate.exchange._cache_size()]


def test_watch(caplog):
  """Law: whoever listens hears of each window, also of the last; a placement follows enough tokens;
  a listener that fails is only logged."""
  class Balancer:
    busy, seen, closed = False, [], False
    rebalance = seen.append

    def close(self):
      self.closed = True

  loads = iter(np.full((2, 4), n) for n in (1.0, 1.0, 5.0, 9.0, 2.0))
  balancer, heard = Balancer(), []
  made = watch.Watch(1e-9, lambda: next(loads), balancer)
  made.on_load = lambda load_LE: heard.append(load_LE.mean())
  for _ in range(4):
    made.step()
  made.on_load = lambda load_LE: 1 / 0
  made.finish()
  assert heard == [1, 1, 5, 9] and [x.mean() for x in balancer.seen] == [7, 9] and balancer.closed
  assert "the load of a window is lost" in caplog.text


def test_first_placement_follows_a_recorded_load():
  """Oracle: the busiest expert is on every device; what does not fit is refused by name."""
  _, mesh = devices(gpu=4)
  load_LE = np.ones((CFG.moe_layers + 1, E))  # an MTP module's layer is last in a training log
  load_LE[:, 5] = 50
  expert_LI = balance.first(CFG, mesh, 4, load_LE)
  assert (expert_LI.reshape(CFG.moe_layers, 4, 3) == 5).any(2).all()
  with pytest.raises(ConfigError, match="9 slots cannot be cut over 4 devices.* such as 12"):
    balance.first(CFG, mesh, 1)
  with pytest.raises(ConfigError, match="a mesh cuts experts, and this model has none"):
    balance.first(config.replace(CFG, dense_layers=2), mesh, 0)
  with pytest.raises(ConfigError, match="the load is of 1 layers with 3 experts; the model has"):
    balance.first(CFG, mesh, 0, np.ones((1, 3)))


def test_settings_refuse(generator):
  """Oracle: the messages: nothing travels on one device, and nothing may be dropped."""
  with pytest.raises(ConfigError, match="on a single device nothing travels"):
    Engine(CFG, generator.weights, dataclasses.replace(SETTINGS, halves=True), generator.runtime)
  sizes, mesh = devices(gpu=2)
  expert_LI = balance.first(CFG, mesh, 0)
  runtime = config.replace(generator.runtime, **{"mesh": sizes, "dispatch.overflow": "drop"})
  with pytest.raises(ConfigError, match="loses tokens; serve with 'rounds'"):
    Engine(CFG, slots.place(generator.weights, expert_LI, mesh), SETTINGS, runtime, mesh=mesh,
           expert_LI=expert_LI)
