"""Continuous batching: many requests over one model and one paged cache.

    engine = Engine(cfg.model, weights, Settings(pages=1024))
    job = engine.submit(Request(prompt, 64), on_event=print)
    while engine.step():
      pass

A step admits what waits, runs one chunk of one prompt, and one short run of decoding for all
requests that have their prompt behind them. So a long prompt delays the others by a chunk at a
time, prompts take turns, and a request joins and leaves the batch between any two steps.

Pages are taken as a request grows. Where none is left the youngest request gives its pages back and
goes to the head of the queue; it is run again over what it had, much of which its pages may still
hold, and its draws, which depend on seed and place alone, are the same but for rounding. The oldest
request always goes on, so all come to an end.

What is compiled, and for which sizes, is in `infer/batches.py`. The engine belongs to one thread,
which calls `step`; `submit` and `Job.cancel` may be called by any.
"""

import collections
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import decode
from dsv3_jax.infer.batches import Batches, Settings
from dsv3_jax.infer.pages import Pages
from dsv3_jax.infer.parameters import Parameters
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
    settings: sizes.
    runtime: implementations.
    cache_dtype: of the cache; "": the weights'.
    stop: tokens that end any request.
    vocabulary: ids from here on only pad the model's vocabulary and are never drawn; 0: none.

  Attributes:
    pages: the cache's pages.
    totals: counts since the start: requests by how they ended ("stop", ...), "prompt" and "new"
      tokens, "shared" (of prompts, found in the cache), "steps", "preempted".
  """

  def __init__(self, cfg: config.Model, weights: Parameters, settings: Settings,
               runtime: config.Runtime = config.Runtime(), cache_dtype: str = "",
               stop: frozenset[int] = frozenset(), vocabulary: int = 0):
    self.cfg, self.settings = cfg, settings
    self.pages = Pages(settings.pages, settings.page_size, settings.share)
    self._batches = Batches(cfg, weights, settings, runtime, cache_dtype, stop, vocabulary)
    self._stop = stop
    self.totals: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()
    self._news = threading.Condition(self._lock)
    self._inbox: collections.deque[Job] = collections.deque()
    self._waiting: collections.deque[Job] = collections.deque()
    self._prompts: collections.deque[Job] = collections.deque()  # admitted, prompt not yet run
    self._writing: list[Job] = []  # oldest first
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
    return {"waiting": waiting, "prompt": len(self._prompts), "writing": len(self._writing),
            "pages": self.pages.count - self.pages.free}

  # --- the engine's thread

  def warm(self, say: Callable[[str], Any] = lambda text: None) -> None:
    """Compiles all that requests may want; `say` hears of each size."""
    self._batches.warm(say)

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

  def abandon(self, error: str) -> None:
    """Takes no more requests, and ends all there are with this error: where `step` cannot go on."""
    self.close()
    with self._lock:
      waiting = [*self._inbox, *self._waiting]
      self._inbox.clear()
      self._waiting.clear()
    live = self._live()
    self._prompts.clear()
    self._writing.clear()
    for job in (*live, *waiting):
      self._end(job, "error", error)

  def _live(self) -> list[Job]:
    """All that have pages, oldest first."""
    return sorted([*self._prompts, *self._writing], key=lambda job: job.submitted)

  def _reset(self) -> None:
    s = self.settings
    self.pages = Pages(s.pages, s.page_size, s.share)
    self._prompts.clear()
    self._writing.clear()
    self._batches.reset()

  def _step(self) -> bool:
    with self._lock:
      self._waiting.extend(self._inbox)
      self._inbox.clear()
    for job in [j for j in (*self._waiting, *self._live()) if j.cancelled]:
      self._leave(job)
      self._end(job, job.cancelled)
    self._admit()
    if not self._prompts and not self._writing:
      return False
    self.totals["steps"] += 1
    if self._prompts:
      self._read(self._prompts[0])
    if self._writing:
      self._write()
    return True

  def _admit(self) -> None:
    size = self.settings.page_size
    while self._waiting and len(self._prompts) + len(self._writing) < self.settings.running:
      job, whole = self._waiting[0], self._waiting[0].whole
      self._name(job)
      # The last token must be run for what comes after it.
      job.pages = self.pages.find(job.names[:(len(whole) - 1) // size])
      # One page more for each that writes: what is admitted should not be thrown out at once.
      need = len(whole) // size + 1 - len(job.pages)
      taken = self.pages.take(need) if self.pages.free >= need + len(self._writing) else None
      if taken is None:
        self.pages.release(job.pages)
        job.pages = []
        if self._prompts or self._writing:
          return
        raise RuntimeError(f"{self.pages.free} of {self.pages.count} pages are free with nothing "
                           "under way")
      job.written = job.published = len(job.pages)
      job.written *= size
      job.pages += taken
      self.totals["shared"] += job.written
      self._waiting.popleft()
      self._prompts.append(job)

  def _read(self, job: Job) -> None:
    """Runs a chunk of a prompt; draws a token after the last one."""
    if not self._set_bias(job):
      return
    whole = job.whole
    part = whole[job.written:job.written + self.settings.chunk]
    new = self._batches.read([job], [part])
    job.written += len(part)
    self.totals["prompt"] += len(part)
    self._publish(job)
    self._prompts.popleft()
    if job.written == len(whole):
      self._writing.append(job)
      self._writing.sort(key=lambda j: j.submitted)
      self._deliver([job], new)
    else:
      self._prompts.append(job)
      # Or the host would hand over all of a long prompt, and what comes next wait for it.
      jax.block_until_ready(new)

  def _write(self) -> None:
    """A short run of decoding for all that write."""
    run = self.settings.run
    if self._prompts or any(job.stepwise for job in self._writing):
      run = 1
    self._grow(run)
    jobs = [job for job in list(self._writing) if self._set_bias(job)]
    if not jobs:
      return
    self._deliver(jobs, self._batches.write([jobs], run)[0])

  def _grow(self, run: int) -> None:
    """Gives each that writes, oldest first, pages for what it is about to write."""
    for job in list(self._writing):
      if job not in self._writing:
        continue  # gave its pages back
      need = -(-(job.written + min(run, job.left)) // self.settings.page_size) - len(job.pages)
      while need > 0:
        taken = self.pages.take(need)
        if taken is not None:
          job.pages += taken
          break
        youngest = self._live()[-1]
        self._leave(youngest)
        youngest.preempted += 1
        self.totals["preempted"] += 1
        with self._lock:
          self._waiting.appendleft(youngest)
        if youngest is job:
          break

  def _deliver(self, jobs: list[Job], new: decode.New) -> None:
    """Gives each job its tokens."""
    count_NB, tokens_NB, logprobs_NB, tops_NBX, top_logprobs_NBX = (
        np.asarray(x) if i == 0 else np.asarray(x)[:, :, 0] for i, x in enumerate(new))
    now = time.monotonic()
    for b, job in enumerate(jobs):
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
      job.written = len(job.whole) - 1
      self.totals["new"] += len(fresh)
      if job.first is None and (fresh or finish):
        job.first = now
      if finish:
        self._leave(job)
        self._end(job, finish, error, tuple(fresh))
      elif fresh:
        self._publish(job)
        self._say(job, Event(tuple(fresh)))

  def _publish(self, job: Job) -> None:
    """Lets others find the pages that were filled."""
    full = job.written // self.settings.page_size
    if full > len(job.names):
      self._name(job)
    for i in range(job.published, full):
      self.pages.publish(job.pages[i], job.names[i])
    job.published = max(job.published, full)

  def _name(self, job: Job) -> None:
    """Makes the names of its full pages, unless it has them."""
    whole = job.whole
    if job.named < len(whole):
      job.names, job.named = self.pages.names(whole), len(whole)

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
      for place in (self._waiting, self._prompts, self._writing):
        if job in place:
          place.remove(job)
    self.pages.release(job.pages)
    job.pages, job.written, job.published = [], 0, 0

  def _end(self, job: Job, finish: str, error: str = "", tokens: tuple[Token, ...] = ()) -> None:
    job.finish, job.ended = finish, time.monotonic()
    self.totals[finish] += 1
    self._say(job, Event(tokens, finish, error))

  def _say(self, job: Job, event: Event) -> None:
    try:
      job.on_event(event)
    except Exception:  # the listener's fault is not the others'
      _log.exception("%s: on_event failed", job.request.tag or "a request")
      job.cancel()
