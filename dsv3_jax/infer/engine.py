"""Continuous batching: many requests over one model and one paged cache.

    engine = Engine(cfg.model, weights, Settings(pages=1024))
    job = engine.submit(Request(prompt, 64), on_event=print)
    while engine.step():
      pass

A step admits what waits, runs one chunk of one prompt, and one short run of decoding for all
requests that have their prompt behind them. So a long prompt delays the others by a chunk at a
time, prompts take turns, and a request joins and leaves the batch between any two steps.

Where the model runs on several devices, each has requests and pages of its own (`infer/rank.py`),
and all run each step together: a chunk of one prompt each, then a run of decoding. A request stays
with the device that it was admitted to. Whoever waits longest is admitted first, to the device
where its first token will come soonest.

A request that had to give its pages back goes to the head of the queue; it is run again over what
it had, much of which its pages may still hold, and its draws, which depend on seed and place alone,
are the same but for rounding.

What is compiled, and for which sizes, is in `infer/batches.py`. The engine belongs to one thread,
which calls `step`; `submit` and `Job.cancel` may be called by any.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import decode
from dsv3_jax.infer.balance import Balancer
from dsv3_jax.infer.batches import Batches, Settings
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.rank import Rank
from dsv3_jax.infer.request import Event, Job, Request, Token

_log = logging.getLogger(__name__)


class Full(Exception):
  """The queue is full."""


class Closed(Exception):
  """The engine takes no more requests."""


class Engine:
  """See the module's docstring.

  Args:
    cfg: the model.
    weights: of `parameters.prepare`.
    settings: sizes; pages and running requests are of each device.
    runtime: implementations.
    cache_dtype: of the cache; "": the weights'.
    stop: tokens that end any request.
    vocabulary: ids from here on only pad the model's vocabulary and are never drawn; 0: none.
    mesh, expert_LI: of several devices, see `Batches`.

  Attributes:
    batches: what runs them.
    totals: counts since the start: requests by how they ended ("stop", ...), "prompt" and "new"
      tokens, "shared" (of prompts, found in the cache), "steps", "preempted".
  """

  def __init__(self, cfg: config.Model, weights: Parameters, settings: Settings,
               runtime: config.Runtime = config.Runtime(), cache_dtype: str = "",
               stop: frozenset[int] = frozenset(), vocabulary: int = 0,
               mesh: jax.sharding.Mesh | None = None, expert_LI: np.ndarray | None = None):
    self.cfg, self.settings = cfg, settings
    self.batches = Batches(cfg, weights, settings, runtime, cache_dtype, stop, vocabulary, mesh,
                           expert_LI)
    self._stop = stop
    self.totals: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()
    self._news = threading.Condition(self._lock)
    self._inbox: collections.deque[Job] = collections.deque()
    self._waiting: list[Job] = []  # oldest first
    self._ranks = self._empty()
    self._closed = False

  # --- for any thread

  def submit(self, request: Request, on_event: Callable[[Event], Any]) -> Job:
    """Takes a request; `on_event` is called by the engine's thread.

    Raises:
      ConfigError: the request cannot be answered.
      Full, Closed: it is not taken now, or any more.
    """
    request.check(self.cfg, self.settings.limit)
    job = Job(request, on_event)
    with self._lock:
      if self._closed:
        raise Closed("the server is ending and takes no more requests")
      if len(self._inbox) + len(self._waiting) >= self.settings.queue:
        raise Full(f"{self.settings.queue} requests wait already; try again later")
      self._inbox.append(job)
      self._news.notify()
    return job

  def close(self) -> None:
    """Takes no more requests; those that are there are answered."""
    with self._lock:
      self._closed = True
      self._news.notify()

  def wait(self, seconds: float) -> None:
    """Sleeps until a request comes, `close` is called, or time is over."""
    with self._lock:
      if not self._inbox and not self._closed:
        self._news.wait(seconds)

  def counts(self) -> dict[str, int]:
    """Requests now: "waiting", "prompt" (being run) and "writing"; "pages" in use."""
    with self._lock:
      waiting = len(self._inbox) + len(self._waiting)
    return {"waiting": waiting, "prompt": sum(len(rank.prompts) for rank in self._ranks),
            "writing": sum(len(rank.writing) for rank in self._ranks),
            "pages": sum(rank.pages.count - rank.pages.free for rank in self._ranks)}

  @property
  def pages(self) -> int:
    """Pages of the cache, of all devices."""
    return sum(rank.pages.count for rank in self._ranks)

  @property
  def balancer(self) -> Balancer | None:
    """Of the experts of several devices."""
    return self.batches.balancer

  # --- the engine's thread

  def warm(self, say: Callable[[str], Any] = lambda text: None) -> None:
    """Compiles all that requests may want; `say` hears of each size."""
    self.batches.warm(say)

  def step(self) -> bool:
    """Goes on with everything by a little; False if there was nothing to do.

    What goes wrong in it ends all requests that are under way with an error, and is not raised:
    the next ones find an empty cache.
    """
    try:
      return self._step()
    except Exception:
      _log.exception("a step failed; %d requests end", len(self._live()))
      for job in self._live():
        self._end(job, "error", "the engine failed; its log has more")
      self._reset()
      return True

  def finish(self) -> None:
    """Says what is left to say, where nothing is under way and `step` is called no more."""
    self.batches.watch.finish()

  def abandon(self, error: str) -> None:
    """Takes no more requests, and ends all there are with this error: where `step` cannot go on."""
    self.close()
    with self._lock:
      waiting = [*self._inbox, *self._waiting]
      self._inbox.clear()
      self._waiting.clear()
    live = self._live()
    self._ranks = self._empty()
    for job in (*live, *waiting):
      self._end(job, "error", error)

  def _live(self) -> list[Job]:
    """All that have pages."""
    return [job for rank in self._ranks for job in rank.live]

  def _empty(self) -> list[Rank]:
    return [Rank(number, self.settings) for number in range(self.batches.ranks)]

  def use(self, weights: Parameters) -> None:
    """Goes on with other weights of the same model, on one device; nothing may be under way."""
    assert not self._live()
    self.batches.use(weights)
    self._ranks = self._empty()

  def _reset(self) -> None:
    self._ranks = self._empty()
    self.batches.reset()

  def _step(self) -> bool:
    self._hear()
    for job in [j for j in (*self._waiting, *self._live()) if j.cancelled]:
      self._leave(job)
      self._end(job, job.cancelled)
    self._admit()
    did = self._read()
    did = self._write() or did
    self.totals["steps"] += did
    return self.batches.watch.step() or did

  def _hear(self) -> None:
    """Takes what has come."""
    with self._lock:
      if self._inbox:
        # Whoever had to give its pages back is older than all that wait.
        self._waiting = sorted([*self._waiting, *self._inbox], key=lambda job: job.submitted)
        self._inbox.clear()

  def _post(self, job: Job) -> None:
    with self._lock:
      self._inbox.append(job)
      self._news.notify()

  def _admit(self) -> list[Job]:
    """Gives pages to those that wait, in their order; returns who got some."""
    admitted = []
    while self._waiting:
      job = self._waiting[0]
      if not any(rank.admit(job) for rank in sorted(self._ranks, key=lambda r: r.cost(job))):
        break
      self.totals["shared"] += job.written
      with self._lock:
        admitted.append(self._waiting.pop(0))
    return admitted

  def _read(self) -> bool:
    """Runs a chunk of a prompt on each device; draws a token after the last one."""
    if not any(rank.prompts for rank in self._ranks):
      return False
    jobs = [rank.prompts[0] if rank.prompts else None for rank in self._ranks]
    jobs = [job if job and self._set_bias(job) else None for job in jobs]
    if not any(jobs):
      return True
    parts = [job.whole[job.written:job.written + self.settings.chunk] if job else ()
             for job in jobs]
    new = self.batches.read(jobs, parts)
    done = []
    for row, (rank, job, part) in enumerate(zip(self._ranks, jobs, parts, strict=True)):
      if job is None:
        continue
      job.written += len(part)
      self.totals["prompt"] += len(part)
      rank.publish(job)
      if job.written == job.length:
        rank.write(job)
        done.append((row, job))
      else:
        rank.prompts.rotate(-1)
    # Or the host would hand over all of a long prompt, and what comes next wait for it.
    jax.block_until_ready(new)
    self._deliver(done, new)
    return True

  def _write(self) -> bool:
    """A short run of decoding for all that write."""
    if not any(rank.writing for rank in self._ranks):
      return False
    busy = any(rank.prompts for rank in self._ranks)
    if busy or any(job.stepwise for rank in self._ranks for job in rank.writing):
      run = 1
    else:
      run = self.settings.run
    for rank in self._ranks:
      for job in rank.grow(run):
        job.preempted += 1
        self.totals["preempted"] += 1
        self._again(job)
    jobs = [[job for job in list(rank.writing) if self._set_bias(job)] for rank in self._ranks]
    if not any(jobs):
      return True
    new, rows = self.batches.write(jobs, run)
    self._deliver([(rank * rows + i, job) for rank, some in enumerate(jobs)
                   for i, job in enumerate(some)], new)
    return True

  def _again(self, job: Job) -> None:
    """Lets a job that lost its pages begin again."""
    self._post(job)

  def _deliver(self, jobs: Sequence[tuple[int, Job]], new: decode.New) -> None:
    """Gives each job the tokens of its row."""
    count_NB, tokens_NB, logprobs_NB, tops_NBX, top_logprobs_NBX = (
        np.asarray(x) if i == 0 else np.asarray(x)[:, :, 0] for i, x in enumerate(new))
    now = time.monotonic()
    for b, job in jobs:
      fresh, finish, error = [], "", ""
      for n in range(int(count_NB[:, b].sum())):
        token = int(tokens_NB[n, b])
        if token in self._stop or token in job.request.stop:
          finish = "stop"
          break
        if job.constraint is not None:
          try:
            job.constraint.take(token)
          except Exception as e:
            finish, error = "error", f"the constraint failed: {e}"
            break
        tops = tuple(zip(tops_NBX[n, b].tolist(), top_logprobs_NBX[n, b].tolist(),
                         strict=True))[:job.request.tops]
        fresh.append(Token(token, float(logprobs_NB[n, b]), tops))
        job.tokens.append(token)
        if not job.left:
          finish = "length"
          break
      job.written = job.length - 1
      self.totals["new"] += len(fresh)
      if job.first is None and (fresh or finish):
        job.first = now
      if finish:
        self._leave(job)
        self._end(job, finish, error, tuple(fresh))
      elif fresh:
        self._ranks[job.rank].publish(job)
        self._say(job, Event(tuple(fresh)))

  def _set_bias(self, job: Job) -> bool:
    """Makes the job's bias for its next token; ends it, and returns False, if that fails."""
    if job.plain:
      return True
    try:
      job.set_bias(self.cfg.vocab_size)
      return True
    except Exception as e:  # its own constraint's: the others go on
      self._leave(job)
      self._end(job, "error", f"the constraint failed: {e}")
      return False

  def _leave(self, job: Job) -> None:
    """Takes a job out of whatever it is in, and its pages from it."""
    with self._lock:
      if job in self._waiting:
        self._waiting.remove(job)
        return
    self._ranks[job.rank].leave(job)

  def _end(self, job: Job, finish: str, error: str = "", tokens: tuple[Token, ...] = ()) -> None:
    if job.finish:
      return
    job.finish, job.ended = finish, time.monotonic()
    self.totals[finish] += 1
    self._say(job, Event(tokens, finish, error))

  def _say(self, job: Job, event: Event) -> None:
    if job.finish and not event.finish:
      return  # it was abandoned while this came about
    try:
      job.on_event(event)
    except Exception:  # the listener's fault is not the others'
      _log.exception("%s: on_event failed", job.request.tag or "a request")
      job.cancel()
