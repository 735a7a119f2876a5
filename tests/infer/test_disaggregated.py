"""Prefill and decoding on two devices: the cache handed over, and whose a request is."""

import dataclasses
import time

import jax
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import decode, handover
from dsv3_jax.infer import engine as engine_lib
from dsv3_jax.infer.batches import Batches
from dsv3_jax.infer.disaggregated import Disaggregated, Reader, Writer
from dsv3_jax.infer.engine import Closed
from dsv3_jax.infer.request import Request
from dsv3_jax.serve.worker import Worker
from tests.infer.requests import (
    CFG,
    SETTINGS,
    Three,
    V,
    ask,
    check,
    make_generator,
    random_requests,
    written,
)
from tests.model import small


@pytest.fixture(scope="module")
def generator():
  return make_generator()


@pytest.fixture(scope="module")
def elsewhere(generator):
  """The weights on another device."""
  return jax.device_put(generator.weights, jax.devices()[1])


def sides(generator, elsewhere, reader=None, writer=None):
  """A reader on the second device and a writer on the first; these have other settings."""
  make = lambda kind, weights, changes: kind(
      CFG, weights, dataclasses.replace(SETTINGS, running=2, **changes), small.RUNTIME)
  return Disaggregated(make(Reader, elsewhere, reader or {}),
                       make(Writer, generator.weights, {"pages": 16, **(writer or {})}))


@pytest.fixture
def made(generator, elsewhere):
  return sides(generator, elsewhere)


def finish(made, rng=None):
  """Steps of both, in turns or at random."""
  still = 0
  for _ in range(3000):
    side = made.reader if rng is not None and rng.random() < 0.5 else made.writer
    did = side.step() if rng is not None else made.reader.step() | made.writer.step()
    still = 0 if did else still + 1
    if still > 20:
      assert not any(made.counts().values())
      return
  raise AssertionError("no end")


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_each_equals_its_solo_run(generator, elsewhere, monkeypatch, share, ranks):
  """Oracle: the generator. Requests come while others run and wait for pages on both sides, share
  pages on both, are thrown out and read again; all pages are given back. The writer has one device
  or three."""
  kinds = iter([Batches, Three if ranks == 3 else Batches])
  monkeypatch.setattr(engine_lib, "Batches", lambda *args: next(kinds)(*args))
  made = sides(generator, elsewhere, {"share": share}, {"share": share})
  asked, rng = [], np.random.default_rng(2)
  long = [Request((i,) * 24, 26) for i in range(2)]  # the writer has room for one of them
  for request in (*long, *random_requests(22, seed=int(share))):
    asked.append((request, *ask(made, request)))
    for _ in range(rng.integers(0, 6)):
      (made.reader if rng.random() < 0.5 else made.writer).step()
  finish(made, rng)
  check(asked, generator)
  assert made.totals["preempted"] > 0 or ranks == 3
  assert made.writer.batches.ranks == ranks
  assert (made.reader.totals["shared"] > 0) == (made.writer.totals["shared"] > 0) == share
  assert made.totals["shared"] == made.reader.totals["shared"]
  assert made.totals["stop"] + made.totals["length"] == 24
  assert made.totals["new"] == sum(len(job.tokens) for _, job, _ in asked)


def test_what_is_handed_over(made):
  """Oracle: bytes from the formula of the cache. Pages that the writer has are not handed over, and
  what arrives is what was read."""
  prompt = tuple(int(t) for t in np.random.default_rng(0).integers(0, V, 17))
  page = handover.bytes_handed(CFG, 1, 4, "float32")
  assert page == 4 * cache_lib.bytes_per_token(CFG, "float32") == 4 * 2 * 4 * CFG.attention.cached
  job, _ = ask(made, Request(prompt, 2))
  while job.offer is None:
    made.reader.step()
  offer = job.offer
  there = made.reader.batches.fetch(0, offer.pages)
  made.writer.step()
  made.reader.step()
  made.writer._hear()
  here = made.writer.batches.fetch(0, job.pages[:len(offer.pages)])
  entries = lambda blocks: np.concatenate(blocks, 1).reshape(CFG.layers, -1, CFG.attention.cached)
  np.testing.assert_array_equal(entries(there)[:, :17], entries(here)[:, :17])
  assert here[0].devices() == {jax.devices()[0]} and there[0].devices() == {jax.devices()[1]}
  finish(made)
  assert made.totals["handed"] == 5 * page
  ask(made, Request((*prompt[:16], 3, 4, 5, 6), 2))
  finish(made)
  assert made.totals["handed"] == 6 * page
  ask(made, Request((*prompt[:16], 3), 1))  # ends with its first token
  finish(made)
  assert made.totals["handed"] == 6 * page


def test_pages_of_several_devices():
  """Oracle: numpy. Pages go from one device's part of a pool that is cut over four into another
  pool, and back into another device's part, and nothing else changes."""
  mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  cut = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
  rng = np.random.default_rng(0)
  large, small_ = ([rng.normal(size=(pages, 4, 3)).astype(np.float32) for _ in range(2)]
                   for pages in (40, 9))
  pools = tuple(jax.device_put(x, cut) for x in large)
  single = tuple(jax.device_put(x, jax.devices()[5]) for x in small_)
  there, here = [3, 9, 0, 1, 5], [6, 5, 4, 3, 8]
  single = handover.store(single, 0, 1, here, handover.fetch(pools, 2, 4, there))
  for x, was, found in zip(large, small_, single):
    was[here] = x[20 + np.array(there)]
    np.testing.assert_array_equal(found, was)
  pools = handover.store(pools, 1, 4, there, handover.fetch(single, 0, 1, here))
  for x, new, found in zip(large, small_, pools):
    x[10 + np.array(there)] = new[here]
    np.testing.assert_array_equal(found, x)
    assert found.sharding == cut


def test_the_writer_is_full(made):
  """Law: whoever waits for the writer keeps the reader's pages, and with these used up nothing is
  read; nothing is lost by it."""
  asked = [ask(made, Request((i,) * 16, 4))[0] for i in range(8)]
  for _ in range(50):
    made.reader.step()
  counts = made.reader.counts()
  assert counts["waiting"] == 4 and counts["pages"] == 16 == 4 * 4 and not counts["prompt"]
  assert made.writer.counts()["waiting"] == 4
  finish(made)
  assert all(job.finish == "length" for job in asked)


def test_released_model_bytes():
  """Printed example: a page of 64 tokens of the released model in bf16."""
  from dsv3_jax import config
  assert handover.bytes_handed(config.preset("v3_671b"), 1, 64) == 4_497_408


PHASES = {"waits": 0, "is read": 1, "is offered": 2, "is asked for": 3, "writes": 4}


def until(made, phase):
  """Steps until a request of two chunks is in a phase."""
  for side in [made.reader, made.reader, made.writer, made.reader][:PHASES[phase]]:
    side.step()
  if phase == "writes":
    made.writer.step()


@pytest.mark.parametrize("phase", PHASES)
def test_cancelled(made, phase):
  """Law: in each phase a request ends once and leaves nothing, and no other is touched."""
  job, events = ask(made, Request((1, 2, 3) * 4, 20))
  until(made, phase)
  where = [made.reader.counts()[name] for name in ("waiting", "prompt", "pages")]
  there = [made.writer.counts()[name] for name in ("waiting", "prompt", "writing", "pages")]
  assert [bool(n) for n in (*where, *there)] == {
      "waits": [1, 0, 0, 0, 0, 0, 0], "is read": [0, 1, 1, 0, 0, 0, 0],
      "is offered": [0, 0, 1, 1, 0, 0, 0], "is asked for": [0, 0, 1, 0, 1, 0, 1],
      "writes": [0, 0, 0, 0, 0, 1, 1]}[phase]
  job.cancel()
  other, told = ask(made, Request((1, 2, 3) * 4, 20))
  finish(made)
  assert [e.finish for e in events if e.finish] == ["cancelled"] == [job.finish]
  assert other.finish == "length" and len(written(told)) == 20
  assert made.totals["cancelled"] == 1


LOST = {("reader", "_hear"): ("is read", "is offered", "is asked for"),
        ("reader", "_read"): ("waits", "is read", "is offered"),
        ("writer", "_hear"): ("is asked for", "writes"),
        ("writer", "_read"): ("is offered", "is asked for", "writes")}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("side, at", LOST)
def test_a_failing_side(made, monkeypatch, phase, side, at):
  """Law: what has pages on the side whose step fails ends with an error, once; what had none yet
  or none any more is answered, and so is what comes then."""
  job, events = ask(made, Request((1, 2, 3) * 4, 20))
  until(made, phase)
  with monkeypatch.context() as patch:
    patch.setattr(getattr(made, side), at, lambda: 1 / 0)
    getattr(made, side).step()
  other, told = ask(made, Request((1, 2, 3) * 4, 20))
  finish(made)
  end = "error" if phase in LOST[side, at] else "length"
  assert [e.finish for e in events if e.finish] == [end] == [job.finish]
  assert other.finish == "length" and len(written(told)) == 20


@pytest.mark.parametrize("slow", ["asking", "blocks"])
def test_thrown_out_on_the_way(made, monkeypatch, slow):
  """Law: a request goes back to the reader when an older one that writes wants its place, whether
  its pages are still the reader's or under way; what arrives then is nobody's, and it is answered
  all the same."""
  old, _ = ask(made, Request((1,) * 24, 36))  # 7 pages of 16, in the end 15
  for _ in range(2):
    for _ in range(4):
      made.reader.step()
    made.writer.step()
  assert made.writer.counts()["writing"] == 1
  young, events = ask(made, Request((2,) * 24, 4))
  for _ in range(5):
    made.reader.step()
  made.writer.step()
  assert made.writer.counts()["prompt"] == 1

  def meanwhile():
    """Lets the reader send pages in the writer's step that takes their place away."""
    if not made.writer._ranks[0].pages.free and old.written == 4 * len(old.pages):
      made.reader.step()
    return False

  if slow == "blocks":
    monkeypatch.setattr(made.writer, "_read", meanwhile)
  while not young.preempted:
    made.writer.step()
  assert made.writer.counts()["prompt"] == 0 and young.offer is None
  assert len(made.writer._told) == (slow == "blocks")
  finish(made)
  again, _ = ask(made, young.request)
  finish(made)
  assert old.finish == young.finish == "length" and written(events) == again.tokens


def test_a_server_over_it(made, generator):
  """Law: driven by the server's worker in two threads, all are answered as alone, also those that
  are under way when it ends; then both threads have ended."""
  worker = Worker(made)
  asked = [(request, *ask(made, request)) for request in random_requests(12, seed=3)]
  worker.start()
  time.sleep(0.1)
  asked += [(request, *ask(made, request)) for request in random_requests(12, seed=4)]
  worker.stop()
  assert not worker.alive and not made._thread.is_alive()
  check(asked, generator)
  assert not any(made.counts().values())
  with pytest.raises(Closed):
    ask(made, Request((1,), 2))


def test_a_request_just_before_the_end(made, monkeypatch):
  """Law: what comes between the writer's look at what there is and the close is answered, and then
  both threads end."""
  late, look = [], made.counts

  def counts():
    found = look()
    if not late:
      late.extend(ask(made, Request((1, 2, 3), 4)))
      made.close()
    return found

  monkeypatch.setattr(made, "counts", counts)
  worker = Worker(made, patience=30.0)
  worker.start()
  while not late:
    time.sleep(0.01)
  worker.stop()
  assert not worker.alive and late[0].finish == "length" and len(written(late[1])) == 4
  assert not any(look().values())


def test_a_dead_reader(made, monkeypatch):
  """Law: where the reader cannot go on nothing does: all end with an error."""
  def dies():
    raise SystemExit

  asked = [ask(made, Request((1, 2, 3), 20))[1] for _ in range(6)]
  made.reader.step()
  monkeypatch.setattr(made.reader, "step", dies)
  worker = Worker(made)
  worker.start()
  worker.stop()
  assert not worker.alive
  assert all(events[-1].finish in ("error", "length") for events in asked)
  assert any(events[-1].finish == "error" for events in asked)


def test_refusals(generator, elsewhere):
  """Law: caches of different pages are refused; a request that only one side has room for, too."""
  with pytest.raises(ConfigError, match="page_size=4 of the reader and 2"):
    sides(generator, elsewhere, writer={"page_size": 2, "pages": 40})
  made = sides(generator, elsewhere, reader={"longest": 30})
  assert made.settings.limit == 30
  with pytest.raises(ConfigError, match="30 that a request"):
    ask(made, Request((1,) * 20, 11))


def test_no_retrace(made):
  """Law: once warm nothing is compiled, whatever requests want."""
  made.warm()
  compiled = (decode.run, decode.prefill, handover._take, handover._put)
  sizes = [f._cache_size() for f in compiled]
  for i, request in enumerate(random_requests(12, seed=6)):
    ask(made, dataclasses.replace(request, tops=i % 3))
  finish(made)
  assert [f._cache_size() for f in compiled] == sizes
