"""A server under clients that misbehave: 1,000 calls from 32 clients, and a restart in the middle.

Calls are drawn at random: plain and streamed completions, slow readers, clients that leave, prompts
and bodies that are too long, broken JSON, bytes that are no UTF-8, half a call, unknown keys.
Every completed answer must be the one that its prompt gets alone; every refusal must have its
status and a message; at the end nothing may be under way and no page in use. After half of the
calls the server gets SIGTERM and is started again; clients that find nobody try again.

    make train
    python -m benchmarks.reliability --workdir=runs/tiny
"""

import argparse
import asyncio
import collections
import json
import random
import signal
import socket
import sys
import tempfile

from benchmarks import serving
from dsv3_jax.serve import worker

CALLS, CLIENTS, PROMPTS = 1000, 32, 40
LONGEST = 1024  # tokens of a request
KINDS = {"whole": 30, "stream": 25, "slow": 8, "leaves": 12, "impatient": 6, "long prompt": 4,
         "long body": 3, "not JSON": 4, "not UTF-8": 3, "half a call": 3, "unknown key": 2}
REFUSED = {"long prompt": 400, "long body": 413, "not JSON": 400, "not UTF-8": 400,
           "unknown key": 400}


class Wrong(AssertionError):
  """Something that must not be."""


class Storm:
  """The clients.

  Args:
    url: of the server.
    expected: prompt and number of tokens to the text that it gets alone.
  """

  def __init__(self, url: str, expected: dict[tuple[str, int], str], seed: int):
    self.url, self.expected = url, expected
    self.done: collections.Counter[str] = collections.Counter()
    self.again = 0
    self._rng = random.Random(seed)

  def draw(self) -> tuple[str, tuple[str, int]]:
    """A kind of call and what it asks for."""
    kind, = self._rng.choices(list(KINDS), KINDS.values())
    return kind, self._rng.choice(list(self.expected))

  async def call(self, http, kind: str, asked: tuple[str, int]) -> None:
    """One call, repeated while nobody answers."""
    import httpx

    for _ in range(600):
      try:
        await getattr(self, "_" + kind.replace(" ", "_").replace("-", "_").lower())(http, asked)
        self.done[kind] += 1
        return
      except (httpx.TransportError, ConnectionError):
        self.again += 1  # the server is being restarted
        await asyncio.sleep(0.2)
    raise Wrong(f"{kind}: nobody answered")

  def _body(self, asked, **more) -> dict:
    text, new = asked
    return {"prompt": text, "max_tokens": new, "temperature": 0, **more}

  def _streamed(self, http, asked):
    return http.stream("POST", "/v1/completions", json=self._body(asked, stream=True))

  async def _whole(self, http, asked) -> None:
    answer = await http.post("/v1/completions", json=self._body(asked))
    if answer.status_code == 503:
      raise ConnectionError
    if answer.status_code != 200:
      raise Wrong(f"{answer.status_code}: {answer.text}")
    self._check(asked, answer.json()["choices"][0]["text"])

  async def _stream(self, http, asked, pause: float = 0.0) -> None:
    text, ended = "", False
    async with self._streamed(http, asked) as answer:
      if answer.status_code == 503:
        raise ConnectionError
      if answer.status_code != 200:
        raise Wrong(str(answer.status_code))
      async for line in answer.aiter_lines():
        ended = ended or line == "data: [DONE]"
        if line.startswith("data: {"):
          text += json.loads(line[6:])["choices"][0]["text"]
          await asyncio.sleep(pause)
    if not ended:
      raise ConnectionError
    self._check(asked, text)

  async def _slow(self, http, asked) -> None:
    await self._stream(http, asked, self._rng.uniform(0.02, 0.1))

  async def _leaves(self, http, asked) -> None:
    count = self._rng.randrange(8)
    async with self._streamed(http, asked) as answer:
      async for _ in answer.aiter_lines():
        count -= 1
        if count < 0:
          break

  async def _impatient(self, http, asked) -> None:
    import httpx

    try:
      answer = await http.post("/v1/completions", json=self._body(asked),
                               timeout=httpx.Timeout(60, read=self._rng.uniform(0.01, 0.3)))
    except httpx.ReadTimeout:
      return
    if answer.status_code == 200:
      self._check(asked, answer.json()["choices"][0]["text"])
    elif answer.status_code != 503:
      raise Wrong(f"{answer.status_code}: {answer.text}")

  async def _long_prompt(self, http, asked) -> None:
    await self._refused(http, "long prompt", json=self._body((asked[0] + " x" * 3000, asked[1])))

  async def _long_body(self, http, asked) -> None:
    await self._refused(http, "long body", json=self._body(("x " * 600_000, asked[1])))

  async def _not_json(self, http, asked) -> None:
    data = json.dumps(self._body(asked))
    await self._refused(http, "not JSON", content=data[:self._rng.randrange(1, len(data))])

  async def _not_utf_8(self, http, asked) -> None:
    await self._refused(http, "not UTF-8", content=b'{"prompt": "\xff\xfe"}')

  async def _unknown_key(self, http, asked) -> None:
    await self._refused(http, "unknown key", json=self._body(asked, max_token=3))

  async def _half_a_call(self, http, asked) -> None:
    host, port = self.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{\"pro")
    await writer.drain()
    writer.close()

  async def _refused(self, http, kind: str, **sent) -> None:
    answer = await http.post("/v1/completions", **sent)
    if answer.status_code == 503:
      raise ConnectionError
    if answer.status_code != REFUSED[kind] or not answer.json()["error"]["message"]:
      raise Wrong(f"{kind}: {answer.status_code} {answer.text[:200]}")

  def _check(self, asked, text: str) -> None:
    if text != self.expected[asked]:
      raise Wrong(f"{asked} gave {text!r}, alone {self.expected[asked]!r}")


async def alone(url: str, prompts) -> dict[tuple[str, int], str]:
  """What each prompt gets with nobody else there."""
  import httpx

  async with httpx.AsyncClient(base_url=url) as http:
    return {(text, new): await serving.ask(http, text, new) for text, new in prompts}


async def storm(made: Storm, calls: int) -> None:
  """Calls from all clients; the first thing that is wrong ends it."""
  import httpx

  left = iter(range(calls))

  async def client() -> None:
    async with httpx.AsyncClient(base_url=made.url, timeout=120) as http:
      for _ in left:
        await made.call(http, *made.draw())

  async with asyncio.TaskGroup() as group:
    for _ in range(CLIENTS):
      group.create_task(client())


async def idle(url: str) -> dict:
  """The server's health once nothing is under way, or after 30 s."""
  import httpx

  async with httpx.AsyncClient(base_url=url) as http:
    for _ in range(300):
      health = (await http.get("/health")).json()
      if not any(health[k] for k in ("waiting", "prompt", "writing", "pages")):
        return health
      await asyncio.sleep(0.1)
  raise Wrong(f"something is left: {health}")


async def run(args, options, prompts) -> Storm:
  """The whole of it, over two lives of the server."""
  with (tempfile.TemporaryFile("w+") as log,
        serving.server(args.workdir, *options, log=log) as (url, first)):
    made = Storm(url, await alone(url, prompts), args.seed)
    calls = asyncio.ensure_future(storm(made, args.calls))
    while sum(made.done.values()) < args.calls // 2 and not calls.done():
      await asyncio.sleep(0.05)
    first.terminate()
    ended = await asyncio.to_thread(first.wait, 60)
    if ended not in (0, -signal.SIGTERM):
      raise Wrong(f"SIGTERM ended the server with {ended}")
    log.seek(0)
    if worker.LEFT in (said := log.read()):
      raise Wrong(f"the first server kept something:\n{said}")
  with serving.server(args.workdir, *options) as (url, second):
    await calls
    print(f"at the end: {await idle(url)}")
    if second.poll() is not None:
      raise Wrong(f"the server ended with {second.returncode}")
  return made


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--workdir", default="runs/tiny", help="of a trained model")
  p.add_argument("--calls", type=int, default=CALLS)
  p.add_argument("--seed", type=int, default=0)
  args = p.parse_args(argv)
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  # Few pages, so that requests are interrupted too.
  options = (f"--port={port}", f"--longest={LONGEST}", "--tokens=2048", "--running=12")
  rng = random.Random(args.seed)
  prompts = [(serving.prompt(i, rng.randrange(1, 120)), rng.randrange(1, 80))
             for i in range(PROMPTS)]
  made = asyncio.run(run(args, options, prompts))
  for kind in KINDS:
    print(f"{kind:12} {made.done[kind]}")
  print(f"{sum(made.done.values())} calls, {made.again} tried again because of the restart: every "
        "answer right, every refusal with its status, no page left")
  return 0


if __name__ == "__main__":
  sys.exit(main())
