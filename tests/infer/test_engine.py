"""The engine: requests that come, wait, share, are interrupted and leave."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.infer import decode
from dsv3_jax.infer import engine as engine_lib
from dsv3_jax.infer.engine import Closed, Engine, Full
from dsv3_jax.infer.request import Request
from dsv3_jax.infer.sampler import Sampling
from tests.infer.requests import (
    CFG,
    SETTINGS,
    Three,
    V,
    ask,
    check,
    finish,
    make_generator,
    random_requests,
    written,
)
from tests.model import small


@pytest.fixture(scope="module")
def generator():
  return make_generator()


def engine(generator, **changes):
  return Engine(CFG, generator.weights, dataclasses.replace(SETTINGS, **changes), small.RUNTIME)


@pytest.mark.parametrize("share", [True, False])
def test_each_equals_its_solo_run(generator, share):
  """Oracle: the generator. Requests come while others run, share pages,
  take them from each other and give all back."""
  made, rng = engine(generator, share=share), np.random.default_rng(2)
  asked = []
  for request in random_requests(24, seed=int(share)):
    asked.append((request, *ask(made, request)))
    for _ in range(rng.integers(0, 4)):
      made.step()
  finish(made)
  assert made.totals["preempted"] > 0  # the pool was too small for all
  assert (made.totals["shared"] > 0) == share
  check(asked, generator)
  assert made.totals["stop"] + made.totals["length"] == 24
  assert made.counts() == {"waiting": 0, "prompt": 0, "writing": 0, "pages": 0}


@pytest.fixture
def three(generator, monkeypatch):
  """Makes engines of three devices."""
  monkeypatch.setattr(engine_lib, "Batches", Three)
  return lambda **changes: engine(generator, **changes)


def test_three_devices(generator, three):
  """Oracle: the generator, as above. All devices get requests; each has a pool of its own, which
  is too small for all that it is given."""
  made, rng = three(), np.random.default_rng(3)
  assert made.pages == 60
  asked, ranks = [], set()
  for request in random_requests(24, seed=7):
    asked.append((request, *ask(made, request)))
    if rng.random() < 0.3:
      made.step()
      ranks |= {job.rank for _, job, _ in asked if job.pages}
  finish(made)
  assert ranks == {0, 1, 2} and made.totals["preempted"] > 0 and made.totals["shared"] > 0
  check(asked, generator)


def test_which_device(three):
  """Law: requests spread; one that begins as another did goes where that lies, unless others write
  there already; a device without room holds up nobody; one without any is waited for."""
  made = three()
  head = tuple(range(16))
  for prompt in ((3,), head):
    ask(made, Request(prompt, 1))
  finish(made)
  like, other = (ask(made, Request((*start, 2), 20))[0] for start in (head, head[::-1]))
  made.step()
  assert made.totals["shared"] == 16 and like.rank == 1 != other.rank
  while made.counts()["prompt"]:
    made.step()
  alone = [ask(made, Request((i,), 20))[0] for i in range(4)]
  made.step()
  assert sorted([like.rank, other.rank, *(job.rank for job in alone)]) == [0, 0, 1, 1, 2, 2]
  finish(made)
  # Each takes 14 of the 20 pages of a device.
  large = [ask(made, Request((i,) * 55, 5))[0] for i in range(4)]
  made.step()
  assert sorted(job.rank for job in large[:3]) == [0, 1, 2] and not large[3].pages
  finish(made)
  assert all(len(job.tokens) == 5 for job in large)
  # The one that begins like it would be read sooner beside it, but has no room there.
  first = ask(made, Request((*head, *(5,) * 36), 8))[0]
  while not first.tokens:
    made.step()
  second = ask(made, Request((*head, *(6,) * 36), 8))[0]
  made.step()
  assert second.pages and second.rank != first.rank and not first.finish
  finish(made)


def test_a_failing_request_of_three(three):
  """Law: it ends alone, also where its device has nothing else to do in that step."""
  class Fails:
    def allowed(self):
      raise ValueError("out of fuel")

  made = three()
  bad, good = ask(made, Request((3, 1), 5, constraint=Fails))[0], ask(made, Request((3, 1), 5))[0]
  while made.step():
    pass
  assert bad.finish == "error" and good.finish == "length"
  assert not any(made.counts().values())


def test_a_long_prompt_does_not_hold_up_the_others(generator):
  """Law: while it is read in chunks, who writes goes on each step, and a short prompt that comes
  later has its first token after two steps."""
  made = engine(generator)
  _, first = ask(made, Request((1, 2, 3), 30))
  made.step()
  ask(made, Request(tuple(range(20)) * 2, 2))  # five chunks
  made.step()
  _, short = ask(made, Request((4, 5), 2))
  before = len(written(first))
  made.step()
  made.step()
  assert len(written(first)) == before + 2 and len(written(short)) > 0
  finish(made)


def test_biases_and_alternatives(generator):
  """Law: a bias forbids and asks for tokens, also between neighbours that have none; a penalty of
  presence ends repetition; alternatives are sorted and hold the likeliest token."""
  made = engine(generator)
  plain, = generator([[3, 1]], 8)
  free = [t for t in range(V) if t not in plain.tokens]
  _, a = ask(made, Request((3, 1), 8, bias=tuple((t, float("-inf")) for t in set(plain.tokens))))
  _, b = ask(made, Request((3, 1), 8, tops=3))
  _, c = ask(made, Request((3, 1), 8, bias=((free[0], 1e6),)))
  _, d = ask(made, Request((3, 1), 8, presence=2.0, frequency=2.0, sampling=Sampling(seed=1)))
  finish(made)
  assert not set(written(a)) & set(plain.tokens)
  assert written(b) == plain.tokens
  for token in (t for e in b for t in e.tokens):
    assert len(token.tops) == 3 and token.tops[0] == (token.id, token.logprob)
    assert [p for _, p in token.tops] == sorted((p for _, p in token.tops), reverse=True)
  assert written(c) == [free[0]] * 8
  steps, tokens = [[3, 1]], []
  for _ in range(8):  # the penalties by hand
    bias = -2.0 * np.bincount(tokens, minlength=V) - 2.0 * (np.bincount(tokens, minlength=V) > 0)
    one, = generator([steps[-1]], 1, bias_V=bias.astype(np.float32))
    tokens += one.tokens
    steps.append(steps[-1] + one.tokens)
  assert written(d) == tokens


def test_constraint(generator):
  """Law: what a constraint forbids does not come, and it sees every token."""
  class Even:
    def __init__(self):
      self.seen = []

    def allowed(self):
      return np.arange(V) % 2 == len(self.seen) % 2

    def take(self, token):
      self.seen.append(token)

  made = engine(generator)
  job, events = ask(made, Request((3, 1), 9, Sampling(1.0, seed=3), constraint=Even))
  ask(made, Request((3, 1), 9))
  finish(made)
  assert [t % 2 for t in written(events)] == [0, 1] * 4 + [0] and job.constraint.seen == job.tokens


@pytest.mark.parametrize("method", ["allowed", "take"])
def test_a_failing_constraint(generator, method):
  """Law: it ends its own request with its error, and no other."""
  class Fails:
    def allowed(self):
      if method == "allowed":
        raise ValueError("out of fuel")
      return np.ones(V, bool)

    def take(self, token):
      raise ValueError("out of fuel")

  made = engine(generator)
  _, other = ask(made, Request((3, 1), 9))
  _, events = ask(made, Request((3, 1), 9, constraint=Fails))
  finish(made)
  assert events[-1].finish == "error" and "out of fuel" in events[-1].error
  assert len(written(other)) == 9 and other[-1].finish == "length"


def test_abandoned(generator):
  """Law: an engine that cannot go on ends what waits too, and takes no more."""
  made = engine(generator, running=1)
  asked = [ask(made, Request((1, 2), 9))[1] for _ in range(3)]
  made.step()
  made.abandon("no engine")
  assert [events[-1].error for events in asked] == ["no engine"] * 3
  with pytest.raises(Closed):
    ask(made, Request((1,), 2))


def test_cancelled(generator):
  """Law: a request that is cancelled, waiting, reading or writing, ends and leaves nothing."""
  made = engine(generator, running=2)
  jobs = [ask(made, Request((1, 2, 3) * 6, 20)) for _ in range(4)]
  for _ in range(4):
    made.step()
  for job, _ in jobs[1:]:
    job.cancel()
  finish(made)
  assert jobs[0][0].finish == "length" and len(jobs[0][0].tokens) == 20
  assert [job.finish for job, _ in jobs[1:]] == ["cancelled"] * 3
  assert made.totals["cancelled"] == 3


def test_a_failing_step_and_a_failing_listener(generator, monkeypatch, caplog):
  """Law: what is under way ends with the error, what waits is answered; a listener's error ends
  its own request alone."""
  made = engine(generator, running=1)
  _, first = ask(made, Request((1, 2), 5))
  _, second = ask(made, Request((1, 2), 5))

  def fails(*args):
    raise RuntimeError("no memory")

  with monkeypatch.context() as patch:
    patch.setattr(made.batches, "write", fails)
    assert made.step()
  assert first[-1].finish == "error" and "no memory" not in first[-1].error
  assert "no memory" in caplog.text
  finish(made)
  assert len(written(second)) == 5
  def bad(event):
    raise KeyError("gone")
  job = made.submit(Request((1, 2), 9), bad)
  _, other = ask(made, Request((3, 2), 9))
  finish(made)
  assert job.finish == "cancelled" and len(written(other)) == 9


def test_refusals(generator):
  """Law: what cannot be answered, or not now, is said at once."""
  made = engine(generator, queue=2)
  for changes, words in (({"prompt": ()}, "no token"), ({"prompt": (V,)}, f"vocabulary of {V}"),
                         ({"most": 0}, "max_tokens=0"), ({"most": 60}, "60 that a request"),
                         ({"tops": 21}, "logprobs=21"), ({"bias": ((V, 1.0),)}, "logit_bias"),
                         ({"bias": ((1, float("nan")),)}, "nan"),
                         ({"presence": 3.0}, "presence_penalty=3")):
    with pytest.raises(ConfigError, match=words):
      made.submit(Request(**{"prompt": (1,), "most": 2} | changes), print)
  for _ in range(2):
    ask(made, Request((1,), 2))
  with pytest.raises(Full, match="2 requests wait"):
    ask(made, Request((1,), 2))
  made.close()
  with pytest.raises(Closed):
    ask(made, Request((1,), 2))
  finish(made)
  for changes, words in (({"pages": 0}, "pages=0"), ({"longest": 99}, "at most 80")):
    with pytest.raises(ConfigError, match=words):
      dataclasses.replace(SETTINGS, **changes)


def test_no_retrace(generator):
  """Law: a warm engine compiles nothing, whatever requests want."""
  made = engine(generator)
  made.warm()
  sizes = decode.run._cache_size(), decode.prefill._cache_size()
  for i, request in enumerate(random_requests(30, seed=4)):
    ask(made, dataclasses.replace(request, tops=i % 3, presence=float(i % 5 == 0), bias=(
        ((3, 1.0),) if i % 4 == 0 else ())))
    made.step()
  finish(made)
  assert (decode.run._cache_size(), decode.prefill._cache_size()) == sizes
