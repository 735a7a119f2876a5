"""Dispatch and combine on virtual devices: any form and mesh against the single device."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dsv3_jax import ops
from dsv3_jax.fp8 import quantize as quantize_lib
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.model import moe
from dsv3_jax.parallel import buffers, crossings, dispatch, hops, payload, rounds, rows
from dsv3_jax.parallel.dispatch import Settings
from tests.oracles.tolerance import assert_close
from tests.quick import jit

quantize = quantize_lib.quantize
D, F, E, A, TOKENS = 6, 4, 16, 3, 24  # TOKENS of all devices
MESHES = [(1, 8), (2, 4), (4, 2), (8, 1), (2, 2)]
AXES = ("node", "gpu")
CUT = PartitionSpec(AXES)
RNG = np.random.default_rng(0)
X, DY = (RNG.normal(size=(TOKENS, D)).astype(np.float32) for _ in range(2))
GATES = RNG.uniform(0.1, 1, (TOKENS, A)).astype(np.float32)
WS = [RNG.normal(size=s).astype(np.float32) for s in ((E, D, F), (E, F, D))]


def loads():
  """Choices int32 [TOKENS, A] by name; under all but the first something is extreme."""
  rng = np.random.default_rng(1)
  some = lambda n: np.argsort(rng.normal(size=(TOKENS, n)), 1)[:, :A]
  one = np.concatenate([np.full((TOKENS, 1), 5), some(5)[:, 1:]], 1)
  return {name: v.astype(np.int32) for name, v in {
      "free": some(E), "hot": one,  # all on expert 5, and those from 6 have none
      "one node": E - 1 - some(4), "few": E - 1 - some(A)}.items()}


LOADS = loads()


def mesh_of(shape):
  count = int(np.prod(shape))
  if len(jax.devices()) < count:
    pytest.skip(f"needs {count} devices")
  return jax.make_mesh(shape, AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2,
                       devices=jax.devices()[:count])


def ffn(x_PD, gate_PA, ws, plan):
  """The layer's order of things: spread, gate on the hidden values, collect."""
  h_MF = jnp.tanh(ops.grouped_gemm(moe.spread(x_PD, plan), ws[0], plan.group_m, plan.used))
  h_MF = h_MF * moe.spread_gates(gate_PA, plan)[:, None]
  return moe.collect(ops.grouped_gemm(h_MF, ws[1], plan.group_m, plan.used), plan)


def body(operands, gate_ZK, route):
  x_PD, ws = operands
  return dispatch.combine(ffn(dispatch.dispatch(x_PD, route), gate_ZK, ws, route.rows), route)


def both(forward, x, gates, ws, dy):
  """Output and gradients with respect to x, gates and both weights."""
  y, pull, extra = jax.vjp(forward, x, gates, ws, has_aux=True)
  return (y, *pull(dy)), extra


@functools.cache
def local():
  def run(expert, x, gates, ws, dy):
    plan = moe.plan(expert, E, 4)
    return both(lambda x, g, ws: (ffn(x, g, ws, plan), ()), x, gates, ws, dy)[0]

  return jit(run)


@functools.cache
def spread_out(shape, settings):
  """The same over a mesh; also the pairs each device dropped."""
  def run(expert, x, gates, ws, dy):
    def forward(x, gates, ws):
      return rounds.run(body, (x, ws), expert, gates, E, 4, settings)

    result, dropped = both(forward, x, gates, ws, dy)
    return result, dropped[None]

  return jit(jax.shard_map(run, mesh=mesh_of(shape), in_specs=CUT, out_specs=CUT, check_vma=True))


def same(found, expected):
  """1e-6 of the largest value, for output and every gradient."""
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    assert np.any(b)
    assert_close(a, b, factor=0.1)


@pytest.mark.parametrize("shape,form", [
    *((shape, "two_hop") for shape in MESHES), ((2, 4), "flat"), ((2, 2), "flat")])
def test_any_mesh_equals_one_device(shape, form):
  """Law: output and all gradients are those of one device, whatever the loads."""
  run = spread_out(shape, Settings(form=form))
  for expert in LOADS.values():
    args = expert, X, GATES, WS, DY
    found, dropped = run(*args)
    same(found, local()(*args))
    assert not np.any(dropped)


def test_gathered_equals_one_device():
  """Law: as above."""
  for expert in LOADS.values():
    args = expert, X, GATES, WS, DY
    same(spread_out((2, 4), Settings(form="gather"))(*args)[0], local()(*args))


def test_single_token_a_device():
  """Law: as above, for one token on each of 8 devices."""
  args = LOADS["free"][:8], X[:8], GATES[:8], WS, DY[:8]
  same(spread_out((2, 4), Settings())(*args)[0], local()(*args))


@pytest.mark.parametrize("shape,form", [((2, 4), "two_hop"), ((4, 2), "flat"), ((2, 2), "gather")])
def test_overflow_loses_nothing(shape, form):
  """Law: buffers far too small give the same output and gradients, in more rounds."""
  tight = Settings(form=form, factor=0.3)
  for name, expert in LOADS.items():
    args = expert, X, GATES, WS, DY
    found, dropped = spread_out(shape, tight)(*args)
    same(found, local()(*args))
    assert not np.any(dropped)
    if name == "hot" and form != "gather":  # the buffers are too small indeed
      lost = spread_out(shape, dataclasses.replace(tight, overflow="drop"))(*args)[1]
      assert np.sum(lost) > TOKENS


def served(expert, nodes, gpus, form, room):
  """Pairs served by the first turn, bool [TOKENS, A], and dropped by each device: plain loops."""
  W = nodes * gpus
  P, e = len(expert) // W, E // W
  dropped = np.zeros(W, int)
  held = [[(t, set(expert[t])) for t in range(w * P, w * P + P)] for w in range(W)]

  def hop(circles, place, slots):
    arrived = [[] for _ in range(W)]
    for circle in circles:
      for i, receiver in enumerate(circle):
        for sender in circle:
          rows = [(t, {x for x in xs if place(x) == i}) for t, xs in held[sender]]
          rows = [(t, xs) for t, xs in rows if xs]
          arrived[receiver] += rows[:slots]
          dropped[sender] += sum(len(xs) for _, xs in rows[slots:])
    return arrived

  device = np.arange(W).reshape(nodes, gpus)
  if form == "flat":
    held = hop([range(W)], lambda x: x // e, room.slots[0])
  else:
    held = hop(device.T, lambda x: x // (e * gpus), room.slots[0])
    held = hop(device, lambda x: x // e % gpus, room.slots[1])
  kept = np.zeros(expert.shape, bool)
  for w in range(W):
    pairs = [(t, x) for t, xs in held[w] for x in sorted(xs)]
    dropped[w] += len(pairs[room.pairs:])
    for t, x in pairs[:room.pairs]:
      kept[t] |= expert[t] == x
  return kept, dropped


@pytest.mark.parametrize("shape,form,factor", [
    ((2, 4), "two_hop", 0.3), ((2, 4), "two_hop", 1.0), ((4, 2), "flat", 0.3)])
def test_dropped_pairs_are_counted(shape, form, factor):
  """Oracle: plain loops over buffers; the output is that of the pairs that found room."""
  settings = Settings(form=form, factor=factor, overflow="drop")
  room = buffers.room(TOKENS // 8, A, E // 8, shape, settings)
  assert not room.complete
  for expert in LOADS.values():
    kept, lost = served(expert, *shape, form, room)
    found, dropped = spread_out(shape, settings)(expert, X, GATES, WS, DY)
    np.testing.assert_array_equal(dropped, lost)
    assert kept.sum() + lost.sum() == expert.size
    same(found[:2], local()(expert, X, GATES * kept, WS, DY)[:2])  # y and dx


def test_room():
  """Oracle: by hand."""
  args = 100, 8, 4, (8, 8)
  assert buffers.room(*args, Settings()) == buffers.Room((100, 800), 25600, True)
  assert buffers.room(*args, Settings(form="flat")) == buffers.Room((100,), 25600, True)
  # 4 nodes a token over 8; 8 devices a token over 8 of a node; 8 experts a token
  tight = buffers.room(*args, Settings(factor=1.5, limit=4))
  assert tight == buffers.Room((75, 150), 1200, False)
  assert buffers.room(*args, Settings(form="flat", factor=1.5)).slots == (19,)
  assert buffers.room(*args, Settings(factor=100.0)).complete
  assert buffers.room(*args, Settings(form="gather", factor=2.0)) == buffers.Room(
      (0,), 1600, False)


# --- what travels -------------------------------------------------------------------------------


@functools.cache
def moved(shape, settings):
  """(x sent, y brought back), crossings counted and planned, of random arrays."""
  def run(expert, gates, x, y):
    route, needed, _ = dispatch.route(expert, gates, E, 4, settings)
    Z = route.local_ZA.shape[0]
    node = jax.lax.axis_index("node")
    counted = crossings.count(expert, E, *shape, node)
    return (route.send(x), route.back(y[0, :Z]), jnp.stack(counted)[None],
            dispatch.crossing_rows(route, settings)[None], needed[None])

  return jit(jax.shard_map(run, mesh=mesh_of(shape), in_specs=CUT, out_specs=CUT, check_vma=True))


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (8, 1)])
def test_crossings(shape):
  """Oracle: sets in numpy; both forms send exactly the rows that the theory counts."""
  nodes, gpus = shape
  y = np.random.default_rng(5).normal(size=(8, TOKENS * 8, D)).astype(np.float32)
  for expert in LOADS.values():
    home = np.arange(TOKENS) // (TOKENS // nodes)
    away = [[x for x in xs if x // (E // nodes) != n] for xs, n in zip(expert, home, strict=True)]
    totals = [sum(len({x // size for x in xs}) for xs in away) for size in (E // nodes, E // 8, 1)]
    for i, form in enumerate(("two_hop", "flat")):
      sent, back, counted, crossing, _ = moved(shape, Settings(form=form))(expert, GATES, X, y)
      assert counted.sum(0).tolist() == totals
      assert int(crossing.sum()) == totals[i]
      # Law: <send x, y> = <x, back y>
      y_sent = y[:, :sent.shape[0] // 8].reshape(sent.shape)
      np.testing.assert_allclose(np.vdot(sent, y_sent), np.vdot(X, back), rtol=1e-5, atol=1e-4)


def test_expected_crossings():
  """Oracle: all choices of a small router, counted one by one."""
  experts, active, groups, kept, nodes, gpus = 8, 3, 4, 2, 2, 2
  routings = []
  for chosen in itertools.combinations(range(groups), kept):
    pool = [x for x in range(experts) if x // (experts // groups) in chosen]
    routings += itertools.combinations(pool, active)
  expert = np.array(routings, np.int32)
  totals = np.zeros(3)
  for node in range(nodes):
    totals += np.array(crossings.count(expert, experts, nodes, gpus, node))
  np.testing.assert_allclose(totals / nodes / len(expert),
                             crossings.expected(experts, active, groups, kept, nodes, gpus))


def test_ragged_needs_the_platform():
  """Oracle: the message, where all devices are CPUs."""
  with pytest.raises(NotImplementedError, match="transport='dense'"):
    spread_out((2, 4), Settings(transport="ragged"))(LOADS["free"], X, GATES, WS, DY)


def ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
  """What `lax.ragged_all_to_all` is documented to do, from gathered arrays."""
  everything = [jax.lax.all_gather(z, axis_name) for z in (operand, input_offsets, send_sizes,
                                                            output_offsets)]
  me = jax.lax.axis_index(axis_name)
  row = jnp.arange(output.shape[0])
  for sender in range(len(everything[0])):
    rows, start, count, to = everything[0][sender], *(z[sender, me] for z in everything[1:])
    inside = (row >= to) & (row < to + jnp.minimum(count, recv_sizes[sender]))
    taken = rows[jnp.clip(row - to + start, 0, rows.shape[0] - 1)]
    output = jnp.where(inside.reshape(-1, *[1] * (output.ndim - 1)), taken, output)
  return output


def test_ragged_equals_dense(monkeypatch):
  """Law: the same rows arrive; oracle of the primitive: its documentation, emulated."""
  monkeypatch.setattr(hops, "require_ragged", lambda: None)
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged)
  settings = Settings(transport="ragged")
  for expert in LOADS.values():
    args = expert, X, GATES, WS, DY
    same(spread_out.__wrapped__((2, 2), settings)(*args)[0], local()(*args))


def half(x):
  return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def test_combine_adds_in_the_node_first():
  """Oracle: numpy; devices' rows, then each node's sum, are rounded to bf16 and nothing else is."""
  nodes, gpus = 2, 4
  settings = Settings(wire=payload.Wire(combine="bfloat16"))
  y = np.random.default_rng(5).normal(size=(8, TOKENS * 8, D)).astype(np.float32)
  expert = LOADS["free"]
  back = moved((nodes, gpus), settings)(expert, GATES, X, y)[1]
  tags = np.tile(np.arange(TOKENS, dtype=np.float32)[:, None] + 1, (1, D))
  sent = np.asarray(moved((nodes, gpus), settings)(expert, GATES, tags, y)[0])[:, 0]
  sent = sent.reshape(nodes, gpus, -1)  # the token of each arrived row
  total = np.zeros((TOKENS, D), np.float32)
  for n in range(nodes):
    of_node = np.zeros((TOKENS, D), np.float32)
    for g in range(gpus):
      rows = sent[n, g]
      for z in np.nonzero(rows)[0]:
        of_node[int(rows[z]) - 1] += half(y[n * gpus + g, z])
    total += half(of_node)
  assert_close(back, total, factor=0.1)


CODEC = payload.Codec(functools.partial(quantize, scale="pow2"), QTensor.dequantize)


def test_fp8_payload():
  """Law: what one device makes of x and dy that went through FP8; near what it makes of them."""
  wire = payload.Wire(activations=CODEC, gradients=CODEC)
  through = lambda x: np.asarray(quantize(jnp.asarray(x), scale="pow2").dequantize())
  for form in ("two_hop", "flat"):
    found, _ = spread_out((2, 4), Settings(form=form, wire=wire))(LOADS["free"], X, GATES, WS, DY)
    same(found, local()(LOADS["free"], through(X), GATES, WS, through(DY)))
  exact = local()(LOADS["free"], X, GATES, WS, DY)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
    a, b = np.asarray(a, float), np.asarray(b, float)
    assert 0 < 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum()) < 2e-3


def test_packing():
  """Law: unpacking gives back every bit, whatever dtypes and shapes travel together."""
  rng = np.random.default_rng(0)
  q = quantize(jnp.asarray(rng.normal(size=(5, 130)), jnp.float32), scale="pow2")
  tree = {"q": q, "gate": jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),
          "half": jnp.ones((5, 2, 2), jnp.bfloat16), "id": jnp.arange(10).reshape(5, 2)}
  packed, unpack = payload.pack(tree)
  assert sorted(x.dtype.itemsize for x in packed) == [1, 2, 4]
  assert payload.row_bytes(q) == 132 == next(x for x in packed if x.dtype == jnp.uint8).shape[1]
  double = unpack([jnp.concatenate([x, x]) for x in packed])
  for a, b in zip(jax.tree.leaves(double), jax.tree.leaves(tree), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.concatenate([b, b]))


@pytest.mark.parametrize("e,Z,spread_over", [(2, 20, 8), (5, 20, 8), (1, 6, 4), (3, 5, 3)])
def test_rows_are_a_plan(e, Z, spread_over):
  """Law: every pair of this device once, in a used block of its expert; the last row is padding.

  Also where the load is the worst that there is room for, and where but one pair is elsewhere.
  """
  run = jit(functools.partial(rows.plan, experts=e, block=4, capacity=Z * min(3, e)))
  rng = np.random.default_rng(0)
  for elsewhere in (None, 0, 1):
    local_ZA = np.argsort(rng.normal(size=(Z, spread_over)), 1)[:, :3].astype(np.int32)
    if elsewhere is not None:  # all experts in every row, but for that many
      local_ZA = np.tile(np.arange(3, dtype=np.int32), (Z, 1))
      local_ZA[:elsewhere, 0] = e
    p, turns, waiting = run(np.minimum(local_ZA, e))
    assert (int(turns), int(waiting)) == (1, 0)
    K, M = min(3, e), len(p.pair_M)
    real = np.asarray(p.pair_M) < Z * K
    assert not real[-1] and not real[int(p.used) * 4:].any()
    expert = np.asarray(p.group_m)[np.nonzero(real)[0] // 4]
    assert sorted(zip(np.asarray(p.pair_M)[real] // K, expert, strict=True)) == sorted(
        (t, x) for t, xs in enumerate(local_ZA) for x in xs if x < e)
    place = np.asarray(p.row_PA)
    np.testing.assert_array_equal(np.sort(place[place != M - 1]), np.nonzero(real)[0])
    assert (np.diff(np.asarray(p.group_m)[:int(p.used)]) >= 0).all()


@pytest.mark.parametrize("wrong,text", [
    ({"form": "three_hop"}, "two_hop, flat, gather"), ({"transport": "fast"}, "dense, ragged"),
    ({"overflow": "wait"}, "rounds, drop"), ({"axes": ("node",)}, "form='flat'"),
    ({"factor": -1.0}, "negative"), ({"form": "gather", "transport": "ragged"}, "dense")])
def test_settings_say_what_is_wrong(wrong, text):
  """Oracle: the message names the values that would do."""
  with pytest.raises(ValueError, match=text):
    Settings(**wrong)


def test_experts_must_divide():
  """Oracle: the message."""
  expert = LOADS["free"]
  run = lambda expert, gates: dispatch.route(expert, gates, 12, 4, Settings())[1][None]
  with pytest.raises(ValueError, match="12 experts cannot be cut over 8 devices"):
    jax.eval_shape(jax.shard_map(run, mesh=mesh_of((2, 4)), in_specs=CUT, out_specs=CUT), expert,
                   GATES)
