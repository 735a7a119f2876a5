"""Serving: clients at once against one after another, and first tokens while a long prompt is read.

A server (`dsv3 serve`) runs as a process; clients are asynchronous HTTP over loopback. Every answer
is checked to be the one that the request gets alone.

    make train
    python -m benchmarks.serving --workdir=runs/tiny
"""

import asyncio
import contextlib
import os
import random
import re
import subprocess
import sys
import time
from typing import IO

from benchmarks import common

CLIENTS, WORDS, NEW, LONG = 16, 60, 64, 12000


@contextlib.contextmanager
def server(workdir: str, *options: str, log: int | IO[str] = subprocess.DEVNULL):
  """The address of a server that ends with the block, and its process; `log` is its stderr."""
  command = [sys.executable, "-c", "from dsv3_jax import cli; cli.main()", "serve", workdir,
             "--port=0", *options]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                        env=environment) as process:
    try:
      yield re.search(r"http://\S+", process.stdout.readline())[0], process
    finally:
      process.terminate()
      process.wait(60)


def prompt(seed: int, words: int = WORDS) -> str:
  """Text of no common beginning."""
  rng = random.Random(seed)
  made = ("def", "self", "return", "import", "value", "name", "index", "=", "(", ")", ":", "0")
  return " ".join(rng.choice(made) for _ in range(words))


async def ask(http, text: str, new: int) -> str:
  """A greedy completion."""
  answer = await http.post("/v1/completions", json={
      "prompt": text, "max_tokens": new, "temperature": 0}, timeout=600)
  answer.raise_for_status()
  return answer.json()["choices"][0]["text"]


async def first_token(http, text: str) -> float:
  """Seconds to the first token of a streamed completion."""
  start = time.perf_counter()
  async with http.stream("POST", "/v1/completions", timeout=600, json={
      "prompt": text, "max_tokens": 2, "temperature": 0, "stream": True}) as answer:
    async for line in answer.aiter_lines():
      if line:
        return time.perf_counter() - start
  raise RuntimeError("no token came")


async def measure(url: str, rounds: int) -> dict[str, list[float]]:
  import httpx

  found: dict[str, list[float]] = {
      k: [] for k in ("one by one", "at once", "alone", "beside", "long")}
  async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=64)) as http:
    for turn in range(rounds + 1):
      texts = [prompt(1000 * turn + i) for i in range(CLIENTS)]
      again = [prompt(500 + 1000 * turn + i) for i in range(CLIENTS)]
      start = time.perf_counter()
      alone = [await ask(http, text, NEW) for text in texts]
      middle = time.perf_counter()
      await asyncio.gather(*(ask(http, text, NEW) for text in again))
      end = time.perf_counter()
      assert alone == list(await asyncio.gather(*(ask(http, text, NEW) for text in texts)))
      single = await first_token(http, prompt(10**6 + turn))
      start_long = time.perf_counter()
      reading = asyncio.ensure_future(first_token(http, prompt(2 * 10**6 + turn, LONG)))
      await asyncio.sleep(0.05)
      beside = await first_token(http, prompt(3 * 10**6 + turn))
      assert not reading.done(), "the long prompt is not long enough"
      await reading
      if turn:  # the first round warms up
        for name, value in (("one by one", middle - start), ("at once", end - middle),
                            ("alone", single), ("beside", beside),
                            ("long", time.perf_counter() - start_long)):
          found[name].append(value)
  return found


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=5)
  p.add_argument("--workdir", default="runs/tiny", help="of a trained model")
  args = p.parse_args(argv)
  with server(args.workdir, "--tokens=65536", "--longest=32768") as (url, _):
    times = asyncio.run(measure(url, args.rounds))
  gain = common.paired(times["one by one"], times["at once"])
  rate = lambda name: f"{CLIENTS * NEW / sorted(times[name])[len(times[name]) // 2]:.0f} tokens/s"
  wait = common.paired(times["beside"], times["alone"])
  lines = [
      common.Line(f"{CLIENTS} clients at once, {NEW} new tokens each", rate("one by one"),
                  rate("at once"), gain, "at least 3x one after another", gain >= 3,
                  {name: common.summary(times[name]) for name in ("one by one", "at once")}),
      common.Line("first token while a long prompt is read", common.times_text(times["alone"]),
                  common.times_text(times["beside"]), wait,
                  "bounded: a few chunks, not the prompt's "
                  f"{common.seconds(min(times['long']))}", max(times["beside"]) < 0.5 * min(
                      times["long"]),
                  {name: common.summary(times[name]) for name in ("alone", "beside", "long")})]
  common.report("serving", lines, args.save)


if __name__ == "__main__":
  main()
