"""The engine in a thread of its own, and its events in asyncio."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator

from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.request import Event, Request

_log = logging.getLogger(__name__)
LEFT = "the engine has ended, and these are left:"
_NAP = 0.5  # seconds between two looks for the end


class Worker:
  """Runs an engine until it is closed and everything is answered.

  Args:
    engine: not yet stepped.
    patience: seconds that `stop` waits for answers that are under way.

  Attributes:
    engine: the engine, which this thread alone steps.
  """

  def __init__(self, engine: Engine, patience: float = 10.0):
    self.engine, self._patience = engine, patience
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  @property
  def alive(self) -> bool:
    """Whether requests are being answered."""
    return self._thread.is_alive()

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Takes no more requests, and returns when those that are there are answered, or when patience
    is at its end."""
    self.engine.close()
    self._end.set()
    self._thread.join(self._patience)

  def _run(self) -> None:
    try:
      while True:
        ends = self._end.is_set()  # before the step, which so sees all that came in time
        if not self.engine.step():
          if ends:
            left = {name: n for name, n in self.engine.counts().items() if n}
            if left:  # nothing is under way, so nobody would ever give this back
              _log.error("%s %s", LEFT, left)
            self.engine.finish()
            return
          self.engine.wait(_NAP)
    except BaseException:
      _log.exception("the engine has ended")
      self.engine.abandon("the engine has ended; its log has more")

  def submit(self, request: Request, loop: asyncio.AbstractEventLoop) -> "Answer":
    """Hands a request to the engine, from any thread; errors as `Engine.submit`'s."""
    return Answer(self.engine, request, loop)


class Answer:
  """Events of one request, as an asynchronous iterator; the last one has `finish`."""

  def __init__(self, engine: Engine, request: Request, loop: asyncio.AbstractEventLoop):
    self._events = asyncio.Queue[Event]()

    def tell(event: Event) -> None:
      try:
        loop.call_soon_threadsafe(self._events.put_nowait, event)
      except RuntimeError:  # the loop is closed: nobody listens any more
        job.cancel()

    self.job = job = engine.submit(request, tell)

  def cancel(self, finish: str = "cancelled") -> None:
    """Ends the request; what has ended already stays as it is."""
    self.job.cancel(finish)

  async def __aiter__(self) -> AsyncIterator[Event]:
    while True:
      event = await self._events.get()
      yield event
      if event.finish:
        return


