"""Who may call, for how long, and what is answered where a call fails."""

import asyncio
import dataclasses
import logging
import urllib.parse
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from dsv3_jax.serve import answers

FAULT = "a fault of the server's; its log has more"
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What a client may ask for.

  Attributes:
    key: that calls must bear; "": none.
    body: bytes of a call.
    seconds: a call may take, from its first byte to the last one that the client read.
    hosts: names under which the server may be called; (): any. A page of another site, which a
      browser lets send calls to a local server, is refused by its Origin in any case.
  """

  key: str = ""
  body: int = 2**20
  seconds: float = 600.0
  hosts: tuple[str, ...] = ()


class Refused(Exception):
  """A call that is answered with a status and a message."""

  def __init__(self, status: int, message: str, kind: str = "invalid_request_error",
               param: str | None = None, code: str | None = None):
    super().__init__(message)
    self.status, self.body = status, answers.error(message, kind, param, code)


class Guarded:
  """Refuses strangers; ends what takes too long, also where the client does not read."""

  def __init__(self, app: Any, limits: Limits):
    self._app, self._limits, self._seconds = app, limits, limits.seconds

  def _stranger(self, request: Request) -> str:
    """Why the call is not from where it should be, or nothing."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if self._limits.hosts and request.url.hostname not in self._limits.hosts:
      return f"this server is not called {host!r}; it is {' or '.join(self._limits.hosts)}"
    if origin is not None and urllib.parse.urlsplit(origin).netloc != host:
      return f"pages of {origin} may not call this server"
    return ""

  async def __call__(self, scope, receive, send) -> None:
    if scope["type"] != "http":
      return await self._app(scope, receive, send)
    why = self._stranger(Request(scope))
    if why:
      refusal = JSONResponse(answers.error(why, "permission_error"), 403)
      return await refusal(scope, receive, send)
    began = False

    async def noticing(message) -> None:
      nonlocal began
      began = True
      await send(message)

    try:
      async with asyncio.timeout(self._seconds):
        await self._app(scope, receive, noticing)
    except TimeoutError:
      if began:
        raise  # the connection ends in the middle: the client sees that something is missing
      message = f"the call took more than {self._seconds:g} seconds"
      await JSONResponse(answers.error(message, "timeout_error"), 504)(scope, receive, send)


async def unless_gone(request: Request, work: asyncio.Future) -> Any:
  """What comes of `work`; it is cancelled when the client leaves."""
  async def gone() -> None:
    while (await request.receive())["type"] != "http.disconnect":
      pass

  leaving = asyncio.ensure_future(gone())
  try:
    await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise ClientDisconnect
    return work.result()
  finally:
    work.cancel()
    leaving.cancel()


async def _refused(request: Request, error: Exception) -> Response:
  assert isinstance(error, Refused)
  headers = {"Retry-After": "1"} if error.status in (429, 503) else None
  return JSONResponse(error.body, error.status, headers)


async def _http_error(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  message = f"{request.method} {request.url.path}: {error.detail}"
  return JSONResponse(answers.error(message, "invalid_request_error"), error.status_code,
                      error.headers)


async def _gone(request: Request, error: Exception) -> Response:
  return Response(status_code=499)  # nobody reads it; what servers log for a client that left


async def _failed(request: Request, error: Exception) -> Response:
  _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
  return JSONResponse(answers.error(FAULT, "server_error"), 500)


HANDLERS = {Refused: _refused, HTTPException: _http_error, ClientDisconnect: _gone,
            Exception: _failed}
