"""Pipeline schedules: orders, validation, simulation."""

import dataclasses
import itertools
import math
import random

import pytest

from dsv3_jax.parallel.schedules import NAMES, Op, Unit, formulas, make

STRAIGHT = ("gpipe", "1f1b", "zb1p")


def legal(ranks, microbatches):
  """Every (name, R, M) that the issue calls legal, over the given values."""
  for name, r, m in itertools.product(NAMES, ranks, microbatches):
    if name in STRAIGHT or m >= 2 * r and (name == "dualpipe_v" or r % 2 == m % 2 == 0):
      yield name, r, m


# --- orders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, microbatches, makespan, bubble", [
    (2, 4, 12, 0), (4, 8, 26, 2), (4, 20, 62, 2), (8, 20, 66, 6), (16, 120, 374, 14)])
def test_dualpipe_vectors(ranks, microbatches, makespan, bubble):
  """Oracle: printed vectors of the authors' order (facts 3.3), F = 1, B = 2, W = 1, F&B = 3."""
  plan = make("dualpipe", ranks, microbatches)
  found = plan.simulate()
  assert found.makespan == makespan
  assert found.bubble == (bubble,) * ranks
  assert found.peak_activations == (ranks + 1,) * ranks


def test_dualpipe_strings():
  """Oracle: printed strings of figure 5's schedule (facts 3.3)."""
  plan = make("dualpipe", 8, 20)
  outer, inner = "FFFFFFFFbwFbwFbwFXXXXXXBXBXBXBbwbwbwbw", "FFFFFFFFFBXXXXXXXXXXXBBBBbbbbwwww"
  assert [plan.string(r) for r in (0, 3, 4, 7)] == [outer, inner, inner, outer]


def test_dualpipe_order_of_a_rank():
  """Oracle: the eight steps of the authors' order, written out by hand for rank 1 of 4, M = 8."""
  plan = make("dualpipe", 4, 8)  # half 2, near 1: micro-batches 0-3 go down, 4-7 up
  names = ("F0@1 F4@2 F1@1 F5@2 F2@1 B4@2 F6@2&B0@1 F3@1&B5@2 F7@2&B1@1 B6@2 B2@1 I7@2 I3@1 "
           "W7@2 W3@1")
  assert list(map(str, plan.orders[1])) == names.split()
  assert plan.orders[1][6] == Op("FB", Unit(6, 2, 1, 1), Unit(0, 1, 0, 0))


def test_straight_orders():
  """Oracle: the textbook orders of two ranks and three micro-batches, by hand."""
  strings = {name: [make(name, 2, 3).string(r) for r in range(2)] for name in STRAIGHT}
  assert strings == {"gpipe": ["FFFBBB"] * 2, "1f1b": ["FFBFBB", "FBFBFB"],
                     "zb1p": ["FFbwFbwbw", "FbFbwFbww"]}


def test_dualpipe_v_is_half_of_dualpipe():
  """Law: rank r of dualpipe_v does what rank r of dualpipe with twice the ranks does, phase 0
  being the way down and phase 1 the way back."""
  def drop(unit, count):
    return unit and unit._replace(microbatch=unit.microbatch % count, direction=0)

  for ranks, count in ((2, 4), (3, 7), (5, 13)):
    v, dual = make("dualpipe_v", ranks, count), make("dualpipe", 2 * ranks, 2 * count)
    for r in range(ranks):
      order = tuple(Op(op.kind, drop(op.forward, count), drop(op.backward, count))
                    for op in dual.orders[r])
      assert order == v.orders[r]
    assert v.routes == (tuple((r, 0) for r in range(ranks))
                        + tuple((r, 1) for r in reversed(range(ranks))),)


@pytest.mark.parametrize("name, ranks, microbatches, named", [
    ("dualpipev", 4, 8, ["'dualpipev'", "did you mean 'dualpipe_v'", "zb1p"]),
    ("gpipe", 0, 8, ["ranks=0", "at least 1"]), ("1f1b", 4, 0, ["microbatches=0"]),
    ("zb1p", 4, 8.0, ["microbatches=8.0", "whole number"]), ("zb1p", True, 8, ["ranks=True"]),
    ("dualpipe", 5, 20, ["ranks=5", "even", "take 6", "dualpipe_v"]),
    ("dualpipe", 4, 7, ["at least 2 * ranks = 8", "microbatches=7"]),
    ("dualpipe", 4, 9, ["even", "microbatches=9", "take 10", "dualpipe_v"]),
    ("dualpipe_v", 4, 7, ["dualpipe_v", "8", "microbatches=7", "zb1p"])])
def test_illegal(name, ranks, microbatches, named):
  """Oracle: the demands of the authors' code; a message that says what would be right."""
  with pytest.raises(ValueError) as error:
    make(name, ranks, microbatches)
  assert all(part in str(error.value) for part in named), error.value


# --- validation ---------------------------------------------------------------------------------


def test_every_legal_size_is_valid():
  """Law: everything that `make` makes passes `validate`, and its lockstep forms theirs."""
  sizes = list(legal((1, 2, 3, 4, 6, 7), (1, 2, 3, 5, 8, 14, 15, 16)))
  assert len(sizes) == 3 * 6 * 8 + 8 + 26
  for name, ranks, microbatches in sizes:
    plan = make(name, ranks, microbatches)
    plan.validate()
    for unit in (False, True):
      plan.ticks(unit).validate()


def _changed(plan, rank, change):
  orders = [list(order) for order in plan.orders]
  change(orders[rank])
  return dataclasses.replace(plan, orders=tuple(map(tuple, orders)))


def _swap(i, j):
  def change(order):
    order[i], order[j] = order[j], order[i]
  return change


def _replace(i, **kwargs):
  def change(order):
    order[i] = order[i]._replace(**kwargs)
  return change


@pytest.mark.parametrize("name, rank, change, message", [
    ("1f1b", 1, lambda order: order.pop(), "I of micro-batch 7 on stage 1 stands 0 times"),
    ("1f1b", 1, lambda order: order.append(order[-1]), "micro-batch 7 on stage 1 stands 2 times"),
    ("1f1b", 3, _swap(0, 1), "comes before the F of micro-batch 0 on stage 3"),
    ("zb1p", 0, _swap(-1, -2), "comes before the I of micro-batch 7 on stage 0"),
    ("gpipe", 0, _replace(0, forward=Unit(0, 1)), "visits that stage on"),
    ("dualpipe", 0, _replace(0, forward=Unit(4, 0, 0, 0)), "visits that stage on"),
    ("dualpipe_v", 0, _replace(0, forward=Unit(0, 0, 1)), "visits that stage on"),
    ("gpipe", 0, _replace(0, forward=Unit(9, 0)), "there are 8 micro-batches"),
    ("gpipe", 0, _replace(0, kind="B"), "without a backward|with a forward"),
    ("gpipe", 0, _replace(0, kind="C"), "kind 'C'")])
def test_broken_schedules(name, rank, change, message):
  """Oracle: each breach of one rule is named."""
  with pytest.raises(ValueError, match=message):
    _changed(make(name, 4, 8), rank, change).validate()


def test_deadlock():
  """Oracle: two directions whose ranks each wait for the other's first forward."""
  plan = make("dualpipe", 2, 4)
  swapped = dataclasses.replace(plan, orders=tuple(
      (order[1], order[0], *order[2:]) for order in plan.orders))
  for call in (swapped.validate, swapped.simulate, swapped.ticks):
    with pytest.raises(ValueError, match="no rank can go on"):
      call()


def test_routes_are_checked():
  """Oracle: a route that skips a rank, one that visits a place twice, an order too few."""
  plan = make("gpipe", 3, 2)
  for routes, orders, message in (
      ((((0, 0), (2, 0), (1, 0)),), plan.orders, "neighbours"),
      ((((0, 0), (1, 0), (1, 0)),), plan.orders, "differ"),
      (plan.routes, plan.orders[:2], "2 orders for 3 ranks"),
      (plan.routes * 3, plan.orders, "take a multiple")):
    with pytest.raises(ValueError, match=message):
      dataclasses.replace(plan, routes=routes, orders=orders).validate()


# --- simulation ---------------------------------------------------------------------------------


def longest_path(plan, forward, backward_input, backward_weight, overlapped, comm):
  """(start, end) of all ops by relaxing every constraint until nothing moves (Bellman-Ford)."""
  cost = {"F": forward, "I": backward_input, "W": backward_weight,
          "B": backward_input + backward_weight, "FB": overlapped}
  start = {(r, i): 0.0 for r, order in enumerate(plan.orders) for i in range(len(order))}
  where = {}  # ("f" or "i", stage, micro-batch) -> (rank, op)
  for r, order in enumerate(plan.orders):
    for i, op in enumerate(order):
      if op.forward is not None:
        where["f", op.forward.stage, op.forward.microbatch] = r, i
      if op.kind in ("B", "I", "FB"):
        where["i", op.backward.stage, op.backward.microbatch] = r, i
  edges = []  # (before, after, delay)
  for r, i in start:
    op = plan.orders[r][i]
    if i:
      edges.append(((r, i - 1), (r, i), 0.0))
    if op.forward is not None and op.forward.stage:
      edges.append((where["f", op.forward.stage - 1, op.forward.microbatch], (r, i), comm))
    if op.kind in ("B", "I", "FB") and op.backward.stage < plan.stages - 1:
      edges.append((where["i", op.backward.stage + 1, op.backward.microbatch], (r, i), comm))
  moved = True
  while moved:
    moved = False
    for before, after, delay in edges:
      end = start[before] + cost[plan.orders[before[0]][before[1]].kind]
      end += delay if before[0] != after[0] else 0.0
      if end > start[after] + 1e-12:
        start[after], moved = end, True
  return start, {k: v + cost[plan.orders[k[0]][k[1]].kind] for k, v in start.items()}


@pytest.mark.parametrize("costs", [(1, 1, 1, 3, 0), (1.0, 1.3, 0.7, 2.4, 0.25), (2, 1, 0, 2.5, 3)])
def test_simulation(costs):
  """Oracle: longest paths by relaxation; activations counted on their clock, not by order."""
  for name, ranks, microbatches in legal((1, 2, 4), (8, 9)):
    plan = make(name, ranks, microbatches)
    found = plan.simulate(*costs)
    start, end = longest_path(plan, *costs)
    makespan = max(end.values())
    assert found.makespan == pytest.approx(makespan)
    for r, order in enumerate(plan.orders):
      assert found.starts[r] == pytest.approx([start[r, i] for i in range(len(order))])
      assert found.ends[r] == pytest.approx([end[r, i] for i in range(len(order))])
      idle = makespan - sum(end[r, i] - start[r, i] for i in range(len(order)))
      assert found.bubble[r] == pytest.approx(idle)
      lives = {}
      for i, op in enumerate(order):
        if op.forward is not None:
          lives[op.forward[:2]] = [i, None]
        if op.kind in ("B", "W", "FB"):
          lives[op.backward[:2]][1] = i
      assert found.peak_activations[r] == max(
          sum(a <= i <= b for a, b in lives.values()) for i in range(len(order)))


def test_overlapped_waits_for_both():
  """Oracle: by hand, a pair whose forward comes in later than its backward's gradient."""
  f, b = (lambda m, s: Op("F", Unit(m, s))), (lambda m, s: Op("B", None, Unit(m, s)))
  plan = dataclasses.replace(make("gpipe", 2, 3), orders=(
      (f(0, 0), f(2, 0), f(1, 0), b(0, 0), b(1, 0), b(2, 0)),
      (f(0, 1), Op("FB", Unit(1, 1), Unit(0, 1)), f(2, 1), b(1, 1), b(2, 1))))
  plan.validate()
  found = plan.simulate()
  assert found.starts == ((0, 1, 2, 6, 9, 11), (1, 3, 6, 7, 9)) and found.makespan == 13
  assert found.peak_activations == (3, 2)


def test_straight_lines():
  """Law: at a fixed number of micro-batches a rank, time is a straight line in the ranks; what
  benchmarks/schedule_scaling.py draws beyond its simulations."""
  for name in NAMES:
    a, b, c = (make(name, r, 3 * r).simulate(1.0, 1.4, 0.7, 2.3, 0.05).makespan
               for r in (8, 12, 16))
    assert b - a == pytest.approx(c - b, rel=1e-9), name


@pytest.mark.parametrize("name, when, costs", [
    ("gpipe", lambda r, m: True, [(1, 1, 1), (1, 2, 0.5), (3, 1, 2)]),
    ("1f1b", lambda r, m: True, [(1, 1, 1), (1, 2, 0.5), (3, 1, 2)]),
    ("zb1p", lambda r, m: m >= r, [(1, 1, 1), (1, 1.2, 0.8), (2, 1, 1), (1, 2, 1), (1, 1, 0.5)]),
    ("dualpipe", lambda r, m: True, [(1, 1, 1), (1, 1, 1, 2.4), (1, 1, 1, 2), (2, 2, 1, 4)]),
    ("dualpipe_v", lambda r, m: True, [(1, 1, 1), (1, 1, 1, 2.4), (1, 1, 1, 2), (2, 2, 1, 4)])])
def test_table_2(name, when, costs):
  """Oracle: the report's table 2. Bubbles: of the rank that idles most, at W <= F, I; for the two
  DualPipes also F = I and B <= F&B <= F + B, other ranks having a little more time to spare."""
  for _, ranks, microbatches in filter(lambda x: x[0] == name, legal(
      (1, 2, 3, 4, 6, 8, 11), (1, 2, 3, 5, 8, 12, 16, 17, 22, 31, 40))):
    if not when(ranks, microbatches):
      continue
    plan = make(name, ranks, microbatches)
    for cost in costs:
      row, found = formulas.row(name, ranks, microbatches, *cost), plan.simulate(*cost)
      assert max(found.bubble) == pytest.approx(row.bubble), (ranks, microbatches, cost)
      assert max(found.peak_activations) == row.activations
    if name == "1f1b":
      expected = tuple(min(ranks - r, microbatches) for r in range(ranks))
      assert found.peak_activations == expected
    else:
      assert set(found.peak_activations) == {row.activations}


def test_equal_devices():
  """Oracle: pipeline.md's table for 16 ranks, 64 micro-batches and one model, F = I = W = 1,
  F&B = 2.4; dualpipe_v's stages are halves."""
  full, half = (1, 1, 1, 2.4), (0.5, 0.5, 0.5, 1.2)
  for name, cost, makespan, activations in (
      ("1f1b", full, 237, 16), ("zb1p", full, 207, 16), ("dualpipe", full, 173.6, 17),
      ("dualpipe_v", half, 174.0, 33)):
    found = make(name, 16, 64).simulate(*cost)
    assert found.makespan == pytest.approx(makespan)
    assert max(found.peak_activations) == activations
  assert make("zb1p", 16, 64).simulate(1, 1.2, 0.8).makespan == pytest.approx(213)


def test_communication():
  """Law: without bubbles to hide in, GPipe takes comm once a hop, forward and back; one rank never
  sends; more of it never ends sooner."""
  plain, slow = (make("gpipe", 4, 6).simulate(comm=c).makespan for c in (0.0, 0.5))
  assert slow == plain + 2 * 3 * 0.5
  for name in NAMES:
    spans = [make(name, 4, 8).simulate(comm=c).makespan for c in (0, 0.1, 0.5, 2)]
    assert spans == sorted(spans) and spans[0] < spans[-1]
  assert make("dualpipe_v", 1, 4).simulate(comm=9.0).makespan == 24


@pytest.mark.parametrize("costs, named", [
    ({"forward": -1.0}, "forward=-1.0"), ({"comm": math.inf}, "comm=inf"),
    ({"overlapped": math.nan}, "overlapped=nan"), ({"backward_weight": None}, "backward_weight"),
    ({"backward_input": "1"}, "backward_input='1'")])
def test_bad_costs(costs, named):
  """Oracle: a duration is finite and not negative; the message names it."""
  plan = make("zb1p", 2, 4)
  for call in (plan.simulate, plan.ticks().simulate):
    with pytest.raises(ValueError, match=named):
      call(**costs)


def test_random_costs_order_the_schedules():
  """Law: no schedule beats the work of its busiest rank, nor its first and last micro-batch's way
  through all stages; lockstep never beats a clock of its own for the same ops."""
  draw = random.Random(0)
  for name, ranks, microbatches in legal((2, 4, 5), (10, 12)):
    plan = make(name, ranks, microbatches)
    f, i, w = (draw.uniform(0.2, 2) for _ in range(3))
    cost = (f, i, w, draw.uniform(max(f, i + w), f + i + w), draw.uniform(0, 0.3))
    found = plan.simulate(*cost)
    assert min(found.bubble) >= -1e-9
    assert found.makespan >= plan.stages * (f + i) - 1e-9
    assert plan.ticks().simulate(*cost).makespan >= found.makespan - 1e-9
