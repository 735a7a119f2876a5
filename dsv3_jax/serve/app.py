"""The HTTP application: OpenAI's completions and chat over one engine, its metrics and a page.

A call becomes one request for the engine a choice. Where the client leaves, the call takes too long
or the server ends, the requests are cancelled and their pages free after the engine's next step.
"""

import asyncio
import contextlib
import dataclasses
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.engine import Closed, Full
from dsv3_jax.serve import answers, bodies, guard
from dsv3_jax.serve.answers import Choice, Piece
from dsv3_jax.serve.bodies import BadRequest, Call
from dsv3_jax.serve.guard import Limits, Refused
from dsv3_jax.serve.metrics import Metrics
from dsv3_jax.serve.worker import Answer, Worker

_log = logging.getLogger(__name__)
_DONE = "data: [DONE]\n\n"


@dataclasses.dataclass(frozen=True)
class _Form:
  """How completions and chats differ in what is sent back."""

  id: str
  whole: str
  part: str
  choice: Callable[[Piece, str, bool, int | None], dict[str, Any]]


def make(worker: Worker, tokenizer: Tokenizer, name: str, limits: Limits) -> Any:
  """The ASGI application; it starts the worker, and ends it when the server ends.

  Args:
    worker: not yet started.
    tokenizer: the model's.
    name: of the model, as clients see it.
    limits: what they may ask for.
  """
  server = _Server(worker, tokenizer, name, limits)

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncIterator[None]:
    worker.start()
    yield
    await asyncio.to_thread(worker.stop)

  app = Starlette(
      routes=[Route("/", server.page), Route("/health", server.health),
              Route("/metrics", server.metrics), Route("/v1/models", server.models),
              Route("/v1/models/{model:path}", server.model),
              Route("/v1/completions", server.completions, methods=["POST"]),
              Route("/v1/chat/completions", server.chat, methods=["POST"])],
      lifespan=lifespan,
      exception_handlers=guard.HANDLERS)
  return guard.Guarded(app, limits)


class _Server:
  """The application's handlers."""

  def __init__(self, worker: Worker, tokenizer: Tokenizer, name: str, limits: Limits):
    self._worker, self._tokenizer, self._name, self._limits = worker, tokenizer, name, limits
    engine = worker.engine
    self._reader = bodies.Reader(tokenizer, engine.cfg.vocab_size, engine.settings.limit)
    self._metrics = Metrics(worker)
    self._since = int(time.time())

  # --- what is there

  async def page(self, request: Request) -> Response:
    return HTMLResponse(resources.files("dsv3_jax.serve").joinpath("page.html").read_text("utf-8"))

  async def health(self, request: Request) -> Response:
    alive = self._worker.alive
    return JSONResponse({"status": "ok" if alive else "the engine has ended",
                         **self._worker.engine.counts()}, 200 if alive else 503)

  async def metrics(self, request: Request) -> Response:
    return Response(self._metrics.text(), media_type=self._metrics.content_type)

  async def models(self, request: Request) -> Response:
    self._admit(request)
    return JSONResponse({"object": "list", "data": [self._model()]})

  async def model(self, request: Request) -> Response:
    self._admit(request)
    self._named(request.path_params["model"])
    return JSONResponse(self._model())

  def _model(self) -> dict[str, Any]:
    return {"id": self._name, "object": "model", "created": self._since, "owned_by": "dsv3_jax",
            "max_model_len": self._worker.engine.settings.limit}

  # --- completions

  async def completions(self, request: Request) -> Response:
    body = await self._body(request)
    call = await asyncio.to_thread(_read, self._reader.completion, body)

    def choice(piece: Piece, head: str, whole: bool, offset: int | None) -> dict[str, Any]:
      made = {"text": head + piece.text, "finish_reason": piece.finish, "logprobs": None}
      if call.logprobs and (whole or piece.tokens):
        made["logprobs"] = answers.text_logprobs(list(piece.tokens), self._tokenizer,
                                                  len(head) if offset is None else offset)
      return made

    form = _Form("cmpl", "text_completion", "text_completion", choice)
    return await self._answer(request, call, form)

  async def chat(self, request: Request) -> Response:
    body = await self._body(request)
    call = await asyncio.to_thread(_read, self._reader.chat, body)

    def choice(piece: Piece, head: str, whole: bool, offset: int | None) -> dict[str, Any]:
      said: dict[str, Any] = {"content": piece.text}
      if offset is None:
        said["role"] = "assistant"
      made = {"message" if whole else "delta": said, "finish_reason": piece.finish,
              "logprobs": None}
      if call.logprobs and (whole or piece.tokens):
        made["logprobs"] = answers.chat_logprobs(list(piece.tokens), self._tokenizer)
      return made

    form = _Form("chatcmpl", "chat.completion", "chat.completion.chunk", choice)
    return await self._answer(request, call, form)

  async def _answer(self, request: Request, call: Call, form: _Form) -> Response:
    jobs: list[Answer] = []
    loop = asyncio.get_running_loop()

    left = False

    def submit() -> None:
      for one in call.requests:
        jobs.append(self._worker.submit(one, loop))
        if left:
          return _cancel(jobs)

    try:
      await asyncio.to_thread(submit)  # constraints take time to set up
    except BaseException as e:
      left = True
      _cancel(jobs)
      if isinstance(e, ValueError):
        raise Refused(400, str(e)) from None
      if isinstance(e, Full):
        raise Refused(429, str(e), "rate_limit_error", code="queue_full") from None
      if isinstance(e, Closed):
        raise Refused(503, str(e), "server_error") from None
      raise
    base = {"id": f"{form.id}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": self._name}
    if call.stream:
      return _Streamed(self._stream(call, form, base, jobs), jobs)
    try:
      pieces = await guard.unless_gone(request, asyncio.gather(
          *(self._whole(call, job) for job in jobs)))
    finally:
      _cancel(jobs)
    made = [{"index": i, **form.choice(piece, head, True, None)}
            for i, (piece, head) in enumerate(zip(pieces, call.heads, strict=True))]
    return JSONResponse({**base, "object": form.whole, "choices": made,
                         "usage": _usage(call, [len(p.tokens) for p in pieces])})

  async def _whole(self, call: Call, job: Answer) -> Piece:
    choice, text, tokens = Choice(self._tokenizer, call.stop), "", []
    async for event in job:
      piece = choice.take(event)
      text += piece.text
      tokens += piece.tokens
      if choice.error:
        raise Refused(500, choice.error, "server_error")
      if piece.finish:
        job.cancel(piece.finish)
        self._metrics.ended(job.job)
        return Piece(text, tuple(tokens), piece.finish)
    raise AssertionError("an answer ends with a reason")

  async def _stream(self, call: Call, form: _Form, base: dict[str, Any], jobs: list[Answer]
                    ) -> AsyncIterator[str]:
    """Lines of a streamed answer, choices as they come."""
    base = {**base, "object": form.part}
    if call.usage:
      base["usage"] = None
    news: asyncio.Queue[tuple[int, Piece | None, str]] = asyncio.Queue()
    counts = [0] * len(jobs)

    async def follow(i: int, job: Answer) -> None:
      choice = Choice(self._tokenizer, call.stop)
      try:
        async for event in job:
          piece = choice.take(event)
          counts[i] = choice.count
          if choice.error:
            return await news.put((i, None, choice.error))
          await news.put((i, piece, ""))
          if piece.finish:
            job.cancel(piece.finish)
            return self._metrics.ended(job.job)
      except Exception:
        _log.exception("a stream failed")
        await news.put((i, None, guard.FAULT))

    followers = [asyncio.ensure_future(follow(i, job)) for i, job in enumerate(jobs)]
    try:
      offsets: list[int | None] = [None] * len(jobs)  # characters of all tokens; None: none sent
      left = len(jobs)
      while left:
        i, piece, error = await news.get()
        if piece is None:
          yield _line(answers.error(error, "server_error"))
          return
        left -= piece.finish is not None
        if not (piece.text or piece.tokens or piece.finish):
          continue
        head = call.heads[i] if offsets[i] is None else ""
        made = form.choice(piece, head, False, offsets[i])
        offsets[i] = (offsets[i] or 0) + len(head) + sum(
            len(self._tokenizer.decode([t.id])) for t in piece.tokens)
        yield _line({**base, "choices": [{"index": i, **made}]})
      if call.usage:
        yield _line({**base, "choices": [], "usage": _usage(call, counts)})
      yield _DONE
    finally:
      for follower in followers:
        follower.cancel()

  # --- who asks, and what

  def _admit(self, request: Request) -> None:
    if not self._limits.key:
      return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("latin-1"), self._limits.key.encode())
    if scheme.lower() != "bearer" or not right:
      raise Refused(401, "this server wants a key: send the header Authorization: Bearer KEY",
                    "authentication_error", code="invalid_api_key")

  def _named(self, model: Any) -> None:
    if model is not None and model != self._name:
      raise Refused(404, f"model {model!r} is not here; this server has {self._name!r}",
                    param="model", code="model_not_found")

  async def _body(self, request: Request) -> dict[str, Any]:
    """The call's object, if its sender may call and it is not too long."""
    self._admit(request)
    data = b""
    async for part in request.stream():
      data += part
      if len(data) > self._limits.body:
        raise Refused(413, f"the body is longer than {self._limits.body} bytes")
    body = await asyncio.to_thread(_read, bodies.parse, data)
    self._named(body.get("model"))
    return body


class _Streamed(StreamingResponse):
  """Server-sent events; their jobs are cancelled also where the client left before the first."""

  def __init__(self, lines: AsyncIterator[str], jobs: list[Answer]):
    super().__init__(lines, media_type="text/event-stream",
                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    self._jobs = jobs

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      _cancel(self._jobs)


def _read(reader: Callable[[Any], Any], value: Any) -> Any:
  try:
    return reader(value)
  except BadRequest as e:
    raise Refused(400, str(e), param=e.param) from None


def _cancel(jobs: list[Answer]) -> None:
  for job in jobs:
    job.cancel()


def _usage(call: Call, counts: list[int]) -> dict[str, int]:
  prompts = [len(request.prompt) for request in call.requests[::call.n]]
  return answers.usage(sum(prompts), sum(counts))


def _line(value: dict[str, Any]) -> str:
  return f"data: {json.dumps(value)}\n\n"  # ASCII: some clients take U+2028 for a line's end
