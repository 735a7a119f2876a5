"""Rows and bytes between devices."""

import dataclasses
import itertools

import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError, Dispatch, Mesh, MoE, Runtime
from dsv3_jax.cost import communication, operations
from dsv3_jax.cost.communication import Group
from dsv3_jax.cost.hardware import HARDWARE

H800 = HARDWARE["h800"]


def enumerated(moe, nodes, gpus, domain=0):
  """Mean rows of a token over all its routings and all places it may lie on, one by one.

  So many neighbours are joined by fast links; a node's devices where that is 0.
  """
  domain = domain or gpus
  apart = lambda a, b: a // domain != b // domain
  per_group, per_device = moe.experts // moe.groups, moe.experts // (nodes * gpus)
  slow = fast = arrive = flat_slow = flat_fast = count = 0
  for kept in itertools.combinations(range(moe.groups), moe.active_groups):
    allowed = [e for e in range(moe.experts) if e // per_group in kept]
    for chosen in itertools.combinations(allowed, moe.active):
      devices = {e // per_device for e in chosen}
      for home in range(nodes * gpus):
        node, place = divmod(home, gpus)
        count += 1
        arrive += len(devices)
        first = [n * gpus + place for n in {d // gpus for d in devices} - {node}]
        # Handed on within each node by the device with the token's own place there.
        second = [(d // gpus * gpus + place, d) for d in devices if d % gpus != place]
        slow += sum(apart(home, d) for d in first) + sum(apart(*pair) for pair in second)
        fast += sum(not apart(home, d) for d in first) + sum(not apart(*p) for p in second)
        flat_slow += sum(apart(d, home) for d in devices)
        flat_fast += sum(not apart(d, home) and d != home for d in devices)
  return [x / count for x in (slow, fast, arrive, flat_slow, flat_fast)]


@pytest.mark.parametrize("experts,active,groups,limit,nodes,gpus", [
    (8, 3, 4, 2, 2, 2), (8, 2, 4, 2, 4, 2), (12, 3, 3, 2, 3, 2), (8, 2, 1, 1, 2, 4),
    (8, 4, 2, 1, 2, 1)])
def test_rows_against_enumeration(experts, active, groups, limit, nodes, gpus):
  """Oracle: every routing that group-limited top-k can give, counted one by one."""
  moe = MoE(experts=experts, active=active, groups=groups, active_groups=limit, group_top=1)
  slow, fast, arrive, flat_slow, flat_fast = enumerated(moe, nodes, gpus)
  mesh = Mesh(node=nodes, gpu=gpus)
  assert dataclasses.astuple(communication.rows(moe, mesh)) == pytest.approx((slow, fast, arrive))
  found = communication.rows(moe, mesh, "flat")
  assert dataclasses.astuple(found) == pytest.approx((flat_slow, flat_fast, arrive))


@pytest.mark.parametrize("nodes,gpus,domain,expected", [
    (2, 4, 2, (1, 2)), (4, 2, 4, (2, 2)), (2, 4, 8, (2, 4)), (4, 2, 3, (1, 2))])
def test_rows_where_domains_are_not_nodes(nodes, gpus, domain, expected):
  """Oracle: the same enumeration, hop by hop; part of a node, two nodes or all in a fast domain."""
  moe = MoE(experts=8, active=2, groups=4, active_groups=2, group_top=1)
  mesh = Mesh(node=nodes, gpu=gpus)
  together = communication.near(mesh, dataclasses.replace(H800, fast_devices=domain))
  assert (together.node, together.gpu) == expected
  found = enumerated(moe, nodes, gpus, together.node * together.gpu)
  two_hop, flat = (communication.rows(moe, mesh, form, together) for form in ("two_hop", "flat"))
  assert dataclasses.astuple(two_hop) == pytest.approx(found[:3])
  assert (flat.slow, flat.fast) == pytest.approx(found[3:])


def test_near():
  """Oracle: by hand: `gpu` fills a domain first, and part of an axis is a divisor of it."""
  of = lambda devices, *mesh: dataclasses.astuple(
      communication.near(Mesh(*mesh), dataclasses.replace(H800, fast_devices=devices)))[:4]
  assert of(8, 16, 2, 8, 8) == (1, 1, 1, 8) and of(8, 1, 4, 1, 2) == (1, 4, 1, 2)
  assert of(8, 1, 8, 1, 2) == (1, 4, 1, 2) and of(8, 1, 2, 1, 16) == (1, 1, 1, 8)
  assert of(16, 2, 1, 4, 8) == (1, 1, 2, 8) and of(2**31, 16, 2, 8, 8) == (16, 2, 8, 8)


@pytest.mark.parametrize("dispatch,slow,fast", [
    # 4096 tokens on 8 nodes of 8: ceil(1.5 * 4096 * 4 / 8) slots a node, then
    # ceil(1.5 * 4096 * 8 / 8) a GPU of the node; or ceil(1.5 * 4096 * 8 / 64) each of 64.
    (Dispatch(factor=1.5), 7 * 3072, 7 * 6144),
    (Dispatch(factor=1.5, form="flat"), 56 * 768, 7 * 768),
    # All tokens to each node, and all of 8 GPUs to each of the node.
    (Dispatch(), 7 * 4096, 7 * 8 * 4096), (Dispatch(form="flat"), 56 * 4096, 7 * 4096)])
def test_dense_transport_sends_whole_buffers(dispatch, slow, fast):
  """Oracle: slots by hand, as `parallel/room.py` describes them; 2 bytes of 7168 values a row."""
  found = exchange(dispatch=dispatch)["combine"]
  assert (found.slow, found.fast) == (2 * 7168 * slow, 2 * 7168 * fast)
  assert found.slow > exchange()["combine"].slow


def test_rows_of_the_report():
  """Oracle: the report: at most 4 nodes a token, two of three experts' rows stay in a node."""
  found = communication.rows(config.preset("v3_671b").moe, Mesh(node=8, gpu=8))
  assert 3.0 < found.slow < 4 * 7 / 8
  # As long as NVLink is 3.2 times as fast as InfiniBand, its hop hides behind the other.
  assert found.fast / found.slow < 3.2


def exchange(hw=H800, dispatch=None, mesh=None, tokens=4096, recipe="v3"):
  runtime = Runtime(compute_dtype="bfloat16", recipe=recipe, mesh=mesh or Mesh(node=8, gpu=8),
                    dispatch=dispatch or Dispatch(transport="ragged"))
  return communication.exchanges(config.preset("v3_671b"), runtime, tokens,
                                 operations.numerics(runtime), hw)


def test_time_of_the_report_s_kernels():
  """Oracle: DeepEP at 64 ranks, 4096 tokens: 46 and 45 GB/s of rows to nodes, its own included."""
  found = exchange()
  rows = communication.rows(config.preset("v3_671b").moe, Mesh(node=8, gpu=8))
  sent = 4096 * 7168 * rows.slow * 8 / 7
  assert found["dispatch"].seconds == pytest.approx(sent * 1.008 / 46e9, rel=0.02)
  assert found["combine"].seconds == pytest.approx(sent * 2 / 45e9, rel=0.03)
  assert found["combine_back"] == found["dispatch"]
  assert found["dispatch_back"] == found["combine"]


def test_links_and_tokens():
  """Law: twice the link, half the time; twice the tokens, twice the bytes; bf16 rows are twice."""
  whole, bf16 = exchange(), exchange(recipe="bf16")
  quick = exchange(dataclasses.replace(H800, slow=2 * H800.slow, fast=2 * H800.fast))
  many = exchange(tokens=8192)
  for name in whole:
    assert quick[name].seconds == pytest.approx(whole[name].seconds / 2)
    assert many[name].slow == pytest.approx(2 * whole[name].slow)
    assert many[name].fast == pytest.approx(2 * whole[name].fast)
  assert bf16["dispatch"].slow / whole["dispatch"].slow == pytest.approx(2 / (1 + 1 / 128))
  assert bf16["combine"].slow == whole["combine"].slow


def test_what_does_not_travel():
  """Law: one device sends nothing; one domain has no slow traffic."""
  assert all(e.seconds == 0 for e in exchange(mesh=Mesh()).values())
  assert all(e.slow == 0 and e.seconds > 0 for e in exchange(mesh=Mesh(gpu=8)).values())
  wide = exchange(dataclasses.replace(H800, fast_devices=72))
  assert all(e.slow == 0 and e.seconds > 0 for e in wide.values())
  torus = exchange(dataclasses.replace(H800, fast_devices=72, hops=3.0))
  assert torus["combine"].seconds == pytest.approx(3 * wide["combine"].seconds)
  # A gpu axis longer than the fast domain is no NVLink: 2 x 4 devices of 4 cross as 8 do.
  assert exchange(mesh=Mesh(gpu=16))["combine"].slow > 0


def test_no_such_link():
  """Oracle: the message names the link and what to do."""
  with pytest.raises(ConfigError, match=r"no slow link .*choose another --hardware"):
    exchange(dataclasses.replace(H800, slow=0.0))


def test_rings():
  """Oracle: the ring's own count of bytes: each sends (n - 1) / n; a node's slow links share."""
  gb = 1e9
  assert communication.ring(gb, Group(1, 1), H800) == 0
  assert communication.ring(gb, Group(4, 1), H800) == pytest.approx(0.75 * gb / 40e9)
  assert communication.ring(gb, Group(8, 8), H800) == pytest.approx(0.875 * gb / 160e9)
  slow = dataclasses.replace(H800, slow=5e9)  # 8 of them: 32 GB/s reached, less than NVLink
  assert communication.ring(gb, Group(16, 8), slow) == pytest.approx(gb * 15 / 16 / 32e9)
