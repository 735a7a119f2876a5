"""Pipeline schedules in lockstep, and the tables that an executor scans over."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.parallel.schedules import Op, Unit, make
from dsv3_jax.parallel.schedules.lockstep import Message
from tests.parallel.test_schedules import legal

# --- lockstep -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, ranks, microbatches, unit, count", [
    ("gpipe", 8, 32, False, 78), ("1f1b", 8, 32, False, 78), ("zb1p", 8, 32, True, 103),
    ("dualpipe", 8, 32, False, 50), ("dualpipe_v", 4, 32, False, 82)])
def test_number_of_ticks(name, ranks, microbatches, unit, count):
  """Oracle: the prototype's counts (pipeline.md 2)."""
  assert len(make(name, ranks, microbatches).ticks(unit).rows) == count


@pytest.mark.parametrize("name, microbatches, costs, whole, unit", [
    ("1f1b", 64, (1, 1, 1), 300, 222), ("zb1p", 64, (1, 1, 1), 207, 207),
    ("zb1p", 64, (1, 1.2, 0.8), 244.8, 244.8), ("dualpipe", 64, (1, 1, 1, 2.4), 188, 199),
    ("dualpipe", 64, (1, 1, 1), 224, 199), ("dualpipe", 120, (1, 1, 1, 2.4), 322.4, 367)])
def test_lockstep_makespan(name, microbatches, costs, whole, unit):
  """Oracle: pipeline.md's lockstep table for 16 ranks (its 322 and 245 are rounded)."""
  plan = make(name, 16, microbatches)
  assert plan.ticks().simulate(*costs).makespan == pytest.approx(whole)
  assert plan.ticks(unit=True).simulate(*costs).makespan == pytest.approx(unit)


def test_messages():
  """Oracle: the messages of two ranks' first ticks, by hand."""
  table = make("dualpipe", 2, 4).ticks()  # micro-batches 0 and 1 go down, 2 and 3 up
  assert table.messages[0] == (Message("FR", 0, 1, Unit(0, 1, 1, 0)),
                               Message("FL", 1, 0, Unit(2, 1, 1, 1)))
  turn = make("dualpipe_v", 2, 4).ticks()  # rank 1 turns the first micro-batch round by itself
  assert [turn.rows[1][1], turn.messages[1][-1].source] == [Op("F", Unit(0, 1)), 0]
  assert all(m.source != m.target for ms in turn.messages for m in ms)


def test_broken_ticks():
  """Oracle: a table without one op, without one message, with one too early, with one twice."""
  table = make("1f1b", 3, 4).ticks()
  gone = dataclasses.replace(table, rows=table.rows[:-1], messages=table.messages[:-1])
  lost = dataclasses.replace(table, messages=((),) + table.messages[1:])
  twice = dataclasses.replace(table, messages=(table.messages[0] * 2,) + table.messages[1:])
  late = dataclasses.replace(table, messages=((), table.messages[0]) + table.messages[2:])
  for broken, message in ((gone, "not the schedule's"), (lost, "has not got its input"),
                          (twice, "two messages share"), (late, "has not got its input")):
    with pytest.raises(ValueError, match=message):
      broken.validate()


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, unit, opcodes", [
    ("gpipe", False, 6), ("1f1b", False, 6), ("zb1p", False, 8), ("dualpipe", False, 17)])
def test_opcodes(name, unit, opcodes):
  """Oracle: the prototype's counts (pipeline.md 4), but for dualpipe, whose mirror images share
  theirs here (23 otherwise); they grow with neither ranks nor batch."""
  found = [make(name, r, m).ticks(unit).tables() for r, m in ((4, 16), (8, 16), (8, 40))]
  assert [len(t.opcodes) for t in found] == [opcodes] * 3
  assert found[1].slots == found[2].slots or name == "gpipe"


def run_tables(plan, table, w_S, x0_M, c_M):
  """A pipeline of scalars y = tanh(w x), loss sum of c_m y_m, driven by the columns alone.

  Buffers start as NaN, so that a value read before it is written poisons the result. Returns the
  gradient of each stage's weight and the micro-batches' gradients of their input.
  """
  columns, (ticks, ranks) = table.columns, table.columns["op"].shape
  stage_of = {(rank, chunk): s for route in plan.routes for s, (rank, chunk) in enumerate(route)}
  buffers = [{b: np.full(n, np.nan) for b, n in table.slots.items()} for _ in range(ranks)]
  dw_S, dx_M = np.zeros(plan.stages), np.full(plan.microbatches, np.nan)
  for t in range(ticks):
    sent = []
    for rank in range(ranks):
      buffer, at = buffers[rank], lambda name, t=t, r=rank: columns[name][t, r]
      x, g, i, w, c = (buffer[b][at(f"{b}_read")] if table.slots[b] else np.nan for b in "xgiwc")
      kind, forward, backward = table.opcodes[at("op")]
      out = {}
      y = dx = np.nan
      if forward is not None:
        m = at("forward_microbatch")
        weight = w_S[stage_of[rank, forward.chunk]]
        x = x0_M[m] if forward.first else x
        y = np.tanh(weight * x)
        out["i"], out["w"] = 1 - y * y, x
        if forward.last:
          out["g"] = c_M[m]
        elif forward.local:
          out["x"] = y
      if backward is not None:
        stage = stage_of[rank, backward.chunk]
        if kind != "W":
          c = g * i
          dx = c * w_S[stage]
          if backward.first:
            dx_M[at("backward_microbatch")] = dx
          elif backward.local:
            out["g"] = dx
        if kind == "I":
          out["c"] = c
        else:
          dw_S[stage] += c * w
      for b, value in out.items():
        buffer[b][at(f"{b}_write")] = value
      sent.append((y, dx))
    for channel in table.channels:
      for rank in range(ranks):
        source = rank + (-1 if channel[1] == "R" else 1)
        value = sent[source]["FB".index(channel[0])] if 0 <= source < ranks else 0.0
        buffers[rank]["x" if channel[0] == "F" else "g"][columns[channel][t, rank]] = value
  return dw_S, dx_M


@pytest.mark.parametrize("unit", [False, True])
def test_tables_train(unit):
  """Oracle: gradients of a chain of scalars, by the chain rule over all micro-batches at once."""
  draw = np.random.default_rng(0)
  for name, ranks, microbatches in legal((1, 2, 4, 5), (1, 3, 8, 10, 12)):
    plan = make(name, ranks, microbatches)
    w_S = draw.uniform(0.5, 1.5, plan.stages)
    x0_M, c_M = draw.normal(size=(2, microbatches))
    y_M, inputs_S = x0_M, []
    for w in w_S:
      inputs_S.append(y_M)
      y_M = np.tanh(w * y_M)
    g_M, expected_S = c_M, np.zeros(plan.stages)
    for s in reversed(range(plan.stages)):
      inner_M = g_M * (1 - np.tanh(w_S[s] * inputs_S[s])**2)
      expected_S[s] = (inner_M * inputs_S[s]).sum()
      g_M = inner_M * w_S[s]
    dw_S, dx_M = run_tables(plan, plan.ticks(unit).tables(), w_S, x0_M, c_M)
    np.testing.assert_allclose(dw_S, expected_S, rtol=1e-10)
    np.testing.assert_allclose(dx_M, g_M, rtol=1e-10)


def test_slots():
  """Law: a buffer of activations has as many slots as activations are alive at once, and none that
  no op fills; types of stages multiply opcodes, and one type a stage is demanded."""
  for name, ranks, microbatches in legal((2, 4), (8, 10)):
    table = make(name, ranks, microbatches).ticks()
    found, peak = table.tables(), max(table.simulate().peak_activations)
    assert found.slots["w"] in (peak - 1, peak)  # one less where each peak is within an FB
    assert (found.slots["c"] > 0) == any(o.kind == "I" for o in found.opcodes)
    assert all(c.dtype == np.int32 and c.shape == (len(table.rows), ranks) and c.min() >= 0
               for c in found.columns.values())
  table = make("1f1b", 4, 8).ticks()
  typed = table.tables(["dense", "moe", "moe", "moe"])
  assert {o.forward.type for o in typed.opcodes if o.forward} == {"dense", "moe"}
  assert len(typed.opcodes) == len(table.tables().opcodes)  # the first stage was apart already
  with pytest.raises(ValueError, match="2 types for 4 stages"):
    table.tables(["a", "b"])
