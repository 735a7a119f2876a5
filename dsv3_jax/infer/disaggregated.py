"""Prompts and decoding on devices of their own (report 3.4).

A chunk of a prompt takes as long as many steps of decoding, and on one device one waits for the
other. The report deploys two units, prefill on 32 GPUs and decoding on 320, and places the experts
in each by its load. Here they are two engines, each with weights, cache and thread of its own:

    engine = Disaggregated(Reader(cfg, weights_there, Settings(chunk=1024)),
                           Writer(cfg, weights_here, Settings(running=64)))

A request is read and its first token drawn by the reader. Then the cache is handed over:

    reader                          writer
    offers the job, keeps pages  ->
                                    takes pages, as for any job that waits; its own cache may hold
                                    the beginning already
                                 <- asks for the rest
    copies it out, frees pages   ->
                                    copies it in, goes on from the first token

Whoever waits for the writer's pages so keeps the reader's, and where these are used up no further
prompt is read: requests wait in the reader's queue, in their order, as they would for one engine.
A request that the writer throws out for want of pages goes back to the reader.

A job is one side's at a time: the reader's until it is offered, then the writer's, which also ends
it. The two share nothing else; each tells the other what to do at the beginning of its next step.
"""

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from dsv3_jax.config import ConfigError
from dsv3_jax.infer.balance import Balancer
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.rank import Offer
from dsv3_jax.infer.request import Event, Job, Request, Token

_log = logging.getLogger(__name__)
_NAP = 0.5  # seconds between two looks for the end
_PATIENCE = 10.0  # seconds for the reader's last step


class _Side(Engine):
  """An engine that the other one tells what to do."""

  def __init__(self, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    self._told: collections.deque[Callable[[], None]] = collections.deque()

  def tell(self, what: Callable[..., None], *args: Any) -> None:
    """Has something done by this engine's thread; from any thread, kept in order."""
    with self._lock:
      self._told.append(functools.partial(what, *args))
      self._news.notify()

  def post(self, job: Job) -> None:
    """Takes a job from the other engine, which is not to touch it any more; from any thread."""
    self._post(job)

  def wait(self, seconds: float) -> None:
    """Sleeps until there is something to do or time is over, also after `close`."""
    with self._lock:
      if not self._inbox and not self._told:
        self._news.wait(seconds)

  def _hear(self) -> None:
    super()._hear()
    while self._told:
      self._told.popleft()()


class Reader(_Side):
  """The engine that runs prompts; arguments as `Engine`'s."""

  writer: "Writer"

  def _write(self) -> bool:
    """Offers those whose prompt was run."""
    did = False
    for rank in self._ranks:
      for job in list(rank.writing):
        job.offer = rank.offer(job)
        self.writer.post(job)
        did = True
    return did

  def hand(self, offer: Offer, start: int) -> None:
    """Hands over an offer's pages from `start` on, and frees them all."""
    rank = offer.rank
    if offer in rank.offers and offer.job.offer is offer:  # or it has ended
      blocks = self.batches.fetch(rank.number, offer.pages[start:])
      self.writer.tell(self.writer.receive, offer, start, blocks)
    rank.free(offer)

  def free(self, offer: Offer) -> None:
    """Frees an offer's pages: the job has ended."""
    offer.rank.free(offer)

  def _reset(self) -> None:
    lost = [offer for rank in self._ranks for offer in rank.offers]
    for offer in lost:
      offer.rank.free(offer)
      self.writer.tell(self.writer.lose, offer)
    super()._reset()


class Writer(_Side):
  """The engine that decodes; arguments as `Engine`'s. Its `totals` has "handed", bytes."""

  reader: Reader

  def receive(self, offer: Offer, start: int, blocks: Sequence[jax.Array]) -> None:
    """Takes an offer's pages from `start` on, which the job now writes after."""
    job = offer.job
    if job.offer is not offer:
      return  # it has ended, or had to give its pages back
    rank = self._ranks[job.rank]
    self.batches.store(rank.number, job.pages[start:len(offer.pages)], blocks)
    self.totals["handed"] += sum(block.nbytes for block in blocks)
    job.offer, job.written = None, job.length - 1
    rank.publish(job)
    rank.write(job)

  def lose(self, offer: Offer) -> None:
    """Ends a job whose offer is void."""
    if offer.job.offer is offer:
      self._leave(offer.job)
      self._end(offer.job, "error", "the engine failed; its log has more")

  def _admit(self) -> list[Job]:
    admitted = super()._admit()
    for job in admitted:
      self.reader.tell(self.reader.hand, job.offer, job.published)
    return admitted

  def _read(self) -> bool:
    return False  # prompts come by `receive`

  def _again(self, job: Job) -> None:
    job.offer = None
    self.reader.post(job)

  def _end(self, job: Job, finish: str, error: str = "", tokens: tuple[Token, ...] = ()) -> None:
    if job.offer is not None:
      self.reader.tell(self.reader.free, job.offer)
      job.offer = None
    super()._end(job, finish, error, tokens)


class Disaggregated:
  """A reader and a writer, to be used as an `Engine` is.

  The thread that calls `step` is the writer's; the reader gets one with the first step, which ends
  after `close` or `abandon`.

  Args:
    reader, writer: not yet used, of one model and tokenizer, with pages of one size and type.

  Raises:
    ConfigError: pages that cannot be handed over.

  Attributes:
    cfg: the model.
    settings: the writer's, but for the longest request that both have room for.
  """

  def __init__(self, reader: Reader, writer: Writer):
    size, other = reader.settings.page_size, writer.settings.page_size
    if size != other:
      raise ConfigError(f"page_size={size} of the reader and {other} of the writer must be equal: "
                        "pages are handed over whole")
    if reader.batches.dtype != writer.batches.dtype:
      raise ConfigError(f"caches of {reader.batches.dtype} (reader) and {writer.batches.dtype} "
                        "(writer) must be of one type: pages are handed over as they are")
    if reader.cfg != writer.cfg:
      raise ConfigError("reader and writer are of different models; what one hands over is nothing "
                        "to the other")
    shared = reader.batches.devices & writer.batches.devices
    if shared and len(reader.batches.devices | writer.batches.devices) > 1:
      raise ConfigError(f"{len(shared)} devices are both the reader's and the writer's; two "
                        "threads that exchange over the same devices wait for each other for ever: "
                        "give each devices of its own")
    reader.writer, writer.reader = writer, reader
    self.reader, self.writer, self.cfg = reader, writer, writer.cfg
    self.settings = dataclasses.replace(
        writer.settings, longest=min(reader.settings.limit, writer.settings.limit))
    self._thread: threading.Thread | None = None
    self._over = threading.Event()
    self._failed = self._closed = False

  # --- for any thread

  def submit(self, request: Request, on_event: Callable[[Event], Any]) -> Job:
    """As `Engine.submit`; events come from either thread, those of a request one after another."""
    request.check(self.cfg, self.settings.limit)
    return self.reader.submit(request, on_event)

  def close(self) -> None:
    """Takes no more requests; those that are there are answered."""
    self.reader.close()  # first: who sees `_closed` may rely on no request coming any more
    self.writer.close()
    self._closed = True

  def wait(self, seconds: float) -> None:
    """Sleeps until the writer has something to do, `close` is called, or time is over."""
    if not self._closed:
      self.writer.wait(seconds)

  def counts(self) -> dict[str, int]:
    """As `Engine.counts`, of both."""
    # In this order: a job that moves on meanwhile is counted, perhaps twice.
    first, second = self.reader.counts(), self.writer.counts()
    return {name: first[name] + second[name] for name in first}

  @property
  def pages(self) -> int:
    """Pages of both caches."""
    return self.reader.pages + self.writer.pages

  @property
  def totals(self) -> collections.Counter[str]:
    """As `Engine.totals`, of both, and "handed", bytes from cache to cache."""
    first, second = self.reader.totals.copy(), self.writer.totals.copy()
    del second["shared"]  # of the same prompts
    return first + second

  @property
  def balancer(self) -> Balancer | None:
    """Of the writer's experts."""
    return self.writer.balancer

  # --- the writer's thread

  def warm(self, say: Callable[[str], Any] = lambda text: None) -> None:
    """Compiles all that requests may want; `say` hears of each size."""
    self.reader.batches.warm(say, writes=False)
    self.writer.batches.warm(say, reads=False)
    say("handing over")
    most = min(self.reader.batches.table, self.writer.batches.table)
    count = 1
    while count <= most:
      pages = list(range(count))
      for rank in range(self.reader.batches.ranks):
        self.reader.batches.fetch(rank, pages)
      for rank in range(self.writer.batches.ranks):  # as it is, so that nothing changes
        self.writer.batches.store(rank, pages, self.writer.batches.fetch(rank, pages))
      count *= 2

  def step(self) -> bool:
    """The writer's step; False if neither side has anything to do.

    Raises:
      RuntimeError: the reader has ended.
    """
    if self._thread is None:
      self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
      self._thread.start()
    closed = self._closed  # before the counts, in which all that came in time then is
    if self.writer.step():
      return True
    if self._failed:
      raise RuntimeError("the engine that reads prompts has ended")
    if any(self.counts().values()):
      self.writer.wait(_NAP)
      return True
    if closed:
      self._stop()
    return False

  def finish(self) -> None:
    """As `Engine.finish`, of both."""
    self._stop()
    self.reader.finish()
    self.writer.finish()

  def abandon(self, error: str) -> None:
    """As `Engine.abandon`."""
    self.close()
    self._stop()
    self.reader.abandon(error)
    self.writer.abandon(error)

  def _stop(self) -> None:
    """Ends the reader's thread."""
    self._over.set()
    self.reader.tell(lambda: None)
    if self._thread is not None:
      self._thread.join(_PATIENCE)

  def _run(self) -> None:
    try:
      while not self._over.is_set():
        if not self.reader.step():
          self.reader.wait(_NAP)
    except BaseException:
      _log.exception("the engine that reads prompts has ended")
      self._failed = True
      self.writer.tell(lambda: None)
