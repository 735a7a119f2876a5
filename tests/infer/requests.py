"""Random requests for an engine, and what each of them must get."""

import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import decode
from dsv3_jax.infer.batches import Batches
from dsv3_jax.infer.engine import Settings
from dsv3_jax.infer.generate import Generator
from dsv3_jax.infer.request import Request
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.infer.watch import Watch
from tests.model import small

CFG = config.replace(small.BASE, layers=2)
SETTINGS = Settings(pages=20, page_size=4, longest=60, running=4, chunk=8, run=3)
V = CFG.vocab_size


def make_generator():
  _, params, buffers = small.split(small.build(CFG, seed=5))
  return Generator(CFG, params, buffers, small.RUNTIME)


def ask(engine, request):
  """(job, its events)."""
  events = []
  return engine.submit(request, events.append), events


def finish(engine, steps=3000):
  for _ in range(steps):
    if not engine.step():
      assert not any(engine.counts().values())
      return
  raise AssertionError("no end")


def written(events):
  return [t.id for e in events for t in e.tokens]


def random_requests(count, seed):
  """Prompts of a few beginnings; greedy and drawn, with and without penalty and stop tokens."""
  rng = np.random.default_rng(seed)
  heads = [rng.integers(0, V, 14).tolist() for _ in range(2)]
  for i in range(count):
    head = heads[rng.integers(2)][:rng.integers(0, 15)]
    prompt = tuple(head + rng.integers(0, V, rng.integers(1, 14)).tolist())
    sampling = Sampling(float(rng.choice([0, 1.2])), top_k=int(rng.choice([0, 5])), seed=i,
                        repetition_penalty=float(rng.choice([1, 1.3])))
    stop = frozenset({int(rng.integers(V))}) if rng.random() < 0.5 else frozenset()
    yield Request(prompt, int(rng.integers(1, 26)), sampling, stop)


def solo(generator, requests):
  """(tokens, log-probabilities) of each, from one call, whose rows do not know of each other
  (tests/infer/test_generate.py), cut where each should have ended."""
  found = generator([r.prompt for r in requests], 26, [r.sampling for r in requests])
  for r, f in zip(requests, found):
    end = next((i for i, t in enumerate(f.tokens) if t in r.stop), len(f.tokens))
    yield f.tokens[:min(end, r.most)], f.logprobs[:min(end, r.most)]


def check(asked, generator):
  """Each (request, job, its events) equals its solo run, and ended as it should."""
  alone = solo(generator, [request for request, _, _ in asked])
  for (request, job, events), (tokens, logprobs) in zip(asked, alone, strict=True):
    assert written(events) == tokens == job.tokens
    assert events[-1].finish == job.finish == ("length" if len(tokens) == request.most else "stop")
    assert [e.finish for e in events[:-1]] == [""] * (len(events) - 1)
    np.testing.assert_allclose([t.logprob for e in events for t in e.tokens], logprobs, atol=1e-5)


class Three:
  """Batches of three devices: three of one, as `Batches` puts their rows together."""

  ranks = 3

  def __init__(self, *args):
    self._each = [Batches(*args) for _ in range(3)]
    self.dtype, self.table = self._each[0].dtype, self._each[0].table
    self.devices, self.balancer = self._each[0].devices, None
    self.watch = Watch(0.0, lambda: None, None)

  def reset(self):
    for one in self._each:
      one.reset()

  def read(self, jobs, parts):
    new = [one.read([job], [part]) if job else None
           for one, job, part in zip(self._each, jobs, parts, strict=True)]
    return self._joined(new, 1)

  def write(self, jobs, run):
    new = [one.write([some], run)[0] if some else None
           for one, some in zip(self._each, jobs, strict=True)]
    rows = max(map(len, jobs))
    return self._joined(new, rows), rows


  def fetch(self, rank, pages):
    return self._each[rank].fetch(0, pages)

  def store(self, rank, pages, blocks):
    self._each[rank].store(0, pages, blocks)

  def _joined(self, new, rows):
    """All rows of all devices, padded; rows and their alternatives are as many as needed."""
    given = [x for x in new if x is not None]
    shapes = [np.max([x[i].shape for x in given], axis=0) for i in range(5)]
    joined = []
    for i, (N, _, *rest) in enumerate(shapes):
      found = np.zeros((N, 3 * rows, *rest), np.asarray(given[0][i]).dtype)
      for r, x in enumerate(new):
        if x is not None:
          one = np.asarray(x[i])[:, :rows]
          found[:, r * rows:r * rows + one.shape[1]][tuple(map(slice, one.shape))] = one
      joined.append(found)
    return decode.New(*joined)
