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

Batches are padded to a few sizes, each compiled once. The engine belongs to one thread, which calls
`step`; `submit` and `Job.cancel` may be called by any.
"""

import collections
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import decode, sampler
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.pages import Pages
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.request import TOPS, Event, Job, Request, Token

_log = logging.getLogger(__name__)
_CHUNKS, _LEAST = 2, 16  # ratio of the sizes that chunks are padded to, and a bound of the smallest


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes of an engine.

  Attributes:
    pages: of the cache.
    page_size: tokens a page; the GPU's kernel takes 64.
    longest: tokens that one request may have; 0: as many as the pages hold.
    running: requests that decode at once.
    chunk: tokens of a prompt that are run at once.
    run: tokens that each request writes in a step, where no prompt waits.
    queue: requests that may wait; more are refused.
    share: whether requests share the pages of a common beginning.
  """

  pages: int = 512
  page_size: int = 64
  longest: int = 0
  running: int = 16
  chunk: int = 256
  run: int = 4
  queue: int = 1024
  share: bool = True

  def __post_init__(self):
    for name in ("pages", "page_size", "running", "chunk", "run", "queue"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
    most = self.pages * self.page_size
    if not 0 <= self.longest <= most:
      raise ConfigError(f"longest={self.longest} tokens are more than pages={self.pages} of "
                        f"{self.page_size} hold; at most {most}")

  @property
  def limit(self) -> int:
    """Tokens that one request may have."""
    return self.longest or self.pages * self.page_size


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

  def __init__(self, cfg: config.Model, weights: Parameters, settings: Settings = Settings(),
               runtime: config.Runtime = config.Runtime(), cache_dtype: str = "",
               stop: frozenset[int] = frozenset(), vocabulary: int = 0):
    self.cfg, self.settings, self.runtime = cfg, settings, runtime
    self._weights, self._stop = weights, stop
    self._ends = np.array(sorted(stop), np.int32)
    self._tops = min(TOPS, cfg.vocab_size)
    self._forbidden_V = None
    if 0 < vocabulary < cfg.vocab_size:
      self._forbidden_V = np.zeros(cfg.vocab_size, np.float32)
      self._forbidden_V[vocabulary:] = -np.inf
    self._dtype = cache_dtype or runtime.compute_dtype
    self._table = -(-settings.limit // settings.page_size)  # N, pages that a request may have
    self.totals: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()
    self._news = threading.Condition(self._lock)
    self._inbox: collections.deque[Job] = collections.deque()
    self._waiting: collections.deque[Job] = collections.deque()
    self._prompts: collections.deque[Job] = collections.deque()  # admitted, prompt not yet run
    self._writing: list[Job] = []  # oldest first
    self._closed = False
    self._reset()

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
    call: dict[str, Any] = dict(drafts=0, cfg=self.cfg, runtime=self.runtime)
    for fresh in (True, False):
      for tokens in self._chunks():
        say(f"{'first' if fresh else 'later'} chunks of prompts, {tokens} tokens")
        state, _ = decode.prefill(
            self._weights, self._cache([], 1), np.zeros((1, tokens), np.int32),
            np.zeros(1, np.int32), np.int32(1), self._seen([], 1),
            sampler.rows([sampler.GREEDY]), self._bias([], 1), self._ends, **call, fresh=fresh,
            tops=self._tops)
        self._layers = state.cache.layers
    B = 1
    while B < 2 * self.settings.running:
      say(f"decoding of {B} requests")
      none_B = np.zeros(B, np.int32)
      for plain in (True, False):
        state = decode.State(self._cache([], B), none_B, none_B,
                             None if plain else self._seen([], B), None)
        state, _ = decode.run(
            self._weights, state, none_B > 0, sampler.rows([sampler.GREEDY] * B),
            self._forbidden_V if plain else self._bias([], B), self._ends, np.int32(1),
            most=self.settings.run, **call, tops=0 if plain else self._tops)
        self._layers = state.cache.layers
      B *= 2

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
    self._layers = ()  # two caches at once may be more than there is room for
    plain = config.replace(self.cfg, mtp_depth=0)  # no drafts, so no layers for their modules
    made = cache_lib.make_paged(plain, 1, s.pages, s.page_size, 1, self._dtype)
    # On a device for good, as what comes out of a step is: otherwise the first step compiles anew.
    self._layers = jax.device_put(made.layers, min(
        self._weights.final_norm_D.devices(), key=lambda d: d.id))

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
    whole, chunk = job.whole, self.settings.chunk
    part = whole[job.written:job.written + chunk]
    done = job.written + len(part) == len(whole)
    size = min(size for size in self._chunks() if size >= len(part))
    tokens_1T = np.zeros((1, size), np.int32)
    tokens_1T[0, :len(part)] = part
    cache = self._cache([job], 1)
    state, new = decode.prefill(
        self._weights, cache, tokens_1T, np.array([len(part)], np.int32), np.int32(job.left),
        self._seen([job], 1), sampler.rows([job.request.sampling]), self._bias([job], 1),
        self._ends, drafts=0, cfg=self.cfg, runtime=self.runtime,
        tops=self._tops, fresh=job.written == 0)
    self._layers = state.cache.layers
    job.written += len(part)
    self.totals["prompt"] += len(part)
    self._publish(job)
    self._prompts.popleft()
    if done:
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
    plain = all(job.plain for job in jobs)
    B = 1
    while B < len(jobs):
      B *= 2
    column = lambda values, dtype: np.array([*values, *[0] * (B - len(jobs))], dtype)
    left_B = column([job.left for job in jobs], np.int32)
    state = decode.State(self._cache(jobs, B), column([j.tokens[-1] for j in jobs], np.int32),
                         left_B, None if plain else self._seen(jobs, B), None)
    settings = [job.request.sampling for job in jobs] + [sampler.GREEDY] * (B - len(jobs))
    state, new = decode.run(
        self._weights, state, left_B > 0, sampler.rows(settings),
        self._forbidden_V if plain else self._bias(jobs, B), self._ends, np.int32(run),
        most=self.settings.run, drafts=0, cfg=self.cfg, runtime=self.runtime,
        tops=0 if plain else self._tops)
    self._layers = state.cache.layers
    self._deliver(jobs, new)

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

  # --- what the compiled functions take

  def _chunks(self) -> list[int]:
    """Sizes that chunks of prompts are padded to."""
    sizes = [self.settings.chunk]
    while sizes[-1] // _CHUNKS >= _LEAST:
      sizes.append(sizes[-1] // _CHUNKS)
    return sizes

  def _cache(self, jobs: list[Job], B: int) -> Cache:
    pages_BN, lengths_B = np.zeros((B, self._table), np.int32), np.zeros(B, np.int32)
    for b, job in enumerate(jobs):
      pages_BN[b, :len(job.pages)] = job.pages
      lengths_B[b] = job.written
    return Cache(self._layers, lengths_B, pages_BN)

  def _seen(self, jobs: list[Job], B: int) -> np.ndarray:
    seen_BV = np.zeros((B, self.cfg.vocab_size), bool)
    for b, job in enumerate(jobs):
      if job.request.sampling.repetition_penalty != 1:
        seen_BV[b, job.whole] = True
    return seen_BV

  def _bias(self, jobs: list[Job], B: int) -> np.ndarray:
    bias_BV = np.zeros((B, self.cfg.vocab_size), np.float32)
    if self._forbidden_V is not None:
      bias_BV += self._forbidden_V
    for b, job in enumerate(jobs):
      if job.bias_V is not None:
        bias_BV[b] += job.bias_V
    return bias_BV
