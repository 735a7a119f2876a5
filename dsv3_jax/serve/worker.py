"""The engine in a thread of its own, and its events in asyncio."""

import asyncio
import threading
from collections.abc import AsyncIterator

from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.request import Event, Request

_NAP = 0.5  # seconds between two looks for the end


class Worker:
  """Runs an engine until it is closed and everything is answered.

  Attributes:
    engine: the engine, which this thread alone steps.
  """

  def __init__(self, engine: Engine):
    self.engine = engine
    self._end = threading.Event()
    self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

  @property
  def alive(self) -> bool:
    """Whether requests are being answered."""
    return self._thread.is_alive()

  def start(self) -> None:
    self._thread.start()

  def stop(self, patience: float = 10.0) -> None:
    """Takes no more requests, and returns when those that are there are answered, or after
    `patience` seconds."""
    self.engine.close()
    self._end.set()
    self._thread.join(patience)

  def _run(self) -> None:
    while True:
      if not self.engine.step():
        if self._end.is_set():
          return
        self.engine.wait(_NAP)

  def submit(self, request: Request) -> "Answer":
    """Hands a request to the engine, from the event loop's thread; errors as `Engine.submit`'s."""
    return Answer(self.engine, request)


class Answer:
  """Events of one request, as an asynchronous iterator; the last one has `finish`."""

  def __init__(self, engine: Engine, request: Request):
    loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

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


