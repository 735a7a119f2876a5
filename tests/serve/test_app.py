"""The HTTP interface, by real clients over loopback."""

import asyncio
import concurrent.futures
import contextlib
import json
import re
import socket
import threading
import time

import httpx
import numpy as np
import pytest
from flax import nnx
from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax import config
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.infer.engine import Engine, Settings
from dsv3_jax.infer.generate import Generator
from dsv3_jax.model.routing import RouterBias
from dsv3_jax.serve import app, guard
from dsv3_jax.serve.worker import Worker
from tests.model import small

CFG = config.replace(small.BASE, vocab_size=330, layers=2)  # ids from 320 on are padding
LIMITS = guard.Limits(body=4096)
SETTINGS = Settings(pages=64, page_size=16, longest=512, running=4, chunk=32, run=2, queue=6)


@pytest.fixture(scope="module")
def tokenizer():
  made = tokenizer_lib.train(["def main(argv):\n  print(argv)\n" * 40], 320)
  return tokenizer_lib.Tokenizer(made.to_json(), vocab_size=CFG.vocab_size)


@pytest.fixture(scope="module")
def generator():
  _, params, buffers = nnx.split(small.build(CFG, seed=5), nnx.Param, RouterBias)
  return Generator(CFG, params, buffers, small.RUNTIME)


class Running:
  """A server's address and its engine."""

  def __init__(self, url, engine):
    self.url, self.engine = url, engine

  def post(self, path, body=None, **kwargs):
    kwargs = {"json": body} | kwargs if body is not None else kwargs
    return httpx.post(self.url + path, timeout=60, **kwargs)

  def idle(self, seconds=20.0):
    """Waits until nothing is under way; returns whether that came about."""
    end = time.monotonic() + seconds
    while any(self.engine.counts().values()) and time.monotonic() < end:
      time.sleep(0.02)
    return not any(self.engine.counts().values())


@contextlib.contextmanager
def running(generator, tokenizer, limits=LIMITS, pause=0.0):
  """A server in a thread; its engine sleeps `pause` seconds a step."""
  import uvicorn

  engine = Engine(CFG, generator.weights, SETTINGS, small.RUNTIME, "", frozenset({tokenizer.eos}),
                  tokenizer.vocab_size)
  if pause:
    step = engine.step
    engine.step = lambda: (time.sleep(pause), step())[1]
  made = app.make(Worker(engine), tokenizer, "small", limits)
  server = uvicorn.Server(uvicorn.Config(made, log_level="error", timeout_graceful_shutdown=5))
  with socket.create_server(("127.0.0.1", 0)) as listening:
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    while not server.started:
      time.sleep(0.01)
    try:
      yield Running(url, engine)
    finally:
      server.should_exit = True
      thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(generator, tokenizer):
  with running(generator, tokenizer) as found:
    yield found


@pytest.fixture(scope="module")
def client(server):
  openai = pytest.importorskip("openai")
  with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as found:
    yield found


@pytest.fixture(scope="module")
def written(generator, tokenizer):
  """What the generator writes after a text or tokens: (tokens, text)."""
  bias_V = np.where(np.arange(CFG.vocab_size) < tokenizer.vocab_size, 0, -np.inf)

  def run(prompt, most):
    if isinstance(prompt, str):
      prompt = [tokenizer.bos, *tokenizer.encode(prompt)]
    tokens = generator([prompt], most, stop=(tokenizer.eos,),
                       bias_V=bias_V.astype(np.float32))[0].tokens
    return tokens, tokenizer.decode(tokens)
  return run


def test_completion_by_the_openai_package(client, written, tokenizer):
  """Oracle: the generator's greedy text, whole and streamed; a stop string; prompts of text and
  of token ids; counts of tokens."""
  tokens, text = written("def ", 12)
  ask = dict(model="small", prompt="def ", max_tokens=12, temperature=0)
  done = client.completions.create(**ask)
  assert done.choices[0].text == text and done.choices[0].finish_reason == "length"
  prompt = [tokenizer.bos, *tokenizer.encode("def ")]
  assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(prompt), 12)
  parts = list(client.completions.create(**ask, stream=True,
                                         stream_options={"include_usage": True}))
  assert "".join(p.choices[0].text for p in parts[:-1]) == text
  assert [p.choices[0].finish_reason for p in parts[:-1]] == [None] * (len(parts) - 2) + ["length"]
  assert parts[-1].usage.completion_tokens == 12 and not parts[-1].choices
  stop = tokenizer.decode(tokens[5:7])
  stopped = client.completions.create(**ask, stop=[stop, "never there"])
  assert stopped.choices[0].text == text[:text.find(stop)]
  assert stopped.choices[0].finish_reason == "stop"
  streamed = {}
  for part in client.completions.create(**ask, n=2, echo=True, stream=True):
    choice = part.choices[0]
    streamed[choice.index] = streamed.get(choice.index, "") + choice.text
  assert streamed == {0: "def " + text, 1: "def " + text}
  many = client.completions.create(**{**ask, "prompt": [prompt, "import "]}, n=2, echo=True)
  assert [c.text for c in many.choices] == [
      tokenizer.decode(prompt) + text] * 2 + ["import " + written("import ", 12)[1]] * 2
  assert [c.index for c in many.choices] == [0, 1, 2, 3]


def test_streamed_logprobs_are_those_of_the_whole(server):
  """Law: the parts of a stream, one after another, are the answer that comes at once."""
  for path, ask in (("completions", {"prompt": "def ", "logprobs": 2}),
                    ("chat/completions", {"messages": [{"role": "user", "content": "a"}],
                                          "logprobs": True, "top_logprobs": 2})):
    ask |= {"max_tokens": 9, "n": 2, "temperature": 1.1, "seed": 4}
    whole = server.post(f"/v1/{path}", ask).json()["choices"]
    parts = {0: [], 1: []}
    for line in server.post(f"/v1/{path}", ask | {"stream": True}).text.splitlines():
      if line.startswith("data: {"):
        for choice in json.loads(line[6:])["choices"]:
          if choice.get("logprobs"):
            parts[choice["index"]].append(choice["logprobs"])
    for choice in whole:
      for key, values in choice["logprobs"].items():
        if values is not None:
          joined = [v for part in parts[choice["index"]] for v in part[key]]
          assert joined == values and (len(values) == 9 or key == "refusal")


def test_drawn_completions(client):
  """Law: a seed repeats, choices differ, no padding id is drawn, log-probabilities fit."""
  ask = dict(model="small", prompt="def ", max_tokens=16, temperature=1.5, seed=3, n=3, logprobs=4)
  done, again = client.completions.create(**ask), client.completions.create(**ask)
  texts = [c.text for c in done.choices]
  assert texts == [c.text for c in again.choices] and len(set(texts)) == 3
  told = done.choices[1].logprobs
  assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == 16
  for token, logprob, tops in zip(told.tokens, told.token_logprobs, told.top_logprobs):
    assert 1 <= len(tops) <= 5 and logprob <= max(tops.values()) + 1e-6  # spellings may coincide
    assert tops[token] >= logprob - 1e-5  # the likeliest of a spelling


def test_chat_by_the_openai_package(client, written, tokenizer):
  """Oracle: the generator after the chat template's tokens; streamed and whole."""
  talk = [{"role": "system", "content": "Be brief."},
          {"role": "user", "content": [{"type": "text", "text": "def "}]}]
  prompt = [tokenizer.bos, *tokenizer.encode("Be brief."), tokenizer.user,
            *tokenizer.encode("def "), tokenizer.assistant]
  tokens, text = written(prompt, 10)
  ask = dict(model="small", messages=talk, max_completion_tokens=10, temperature=0)
  done = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
  assert done.choices[0].message.content == text
  assert done.choices[0].message.role == "assistant"
  said = done.choices[0].logprobs.content
  assert b"".join(bytes(t.bytes) for t in said) == tokenizer.decode_bytes(tokens)
  assert all(t.top_logprobs[0].logprob == t.logprob for t in said)  # greedy
  parts = list(client.chat.completions.create(**ask, stream=True))
  assert "".join(p.choices[0].delta.content or "" for p in parts) == text
  assert parts[0].choices[0].delta.role == "assistant"
  assert client.models.list().data[0].id == client.models.retrieve("small").id == "small"


def test_constraints(client):
  """Oracle: re and json on drawn text."""
  ask = dict(model="small", prompt="x", temperature=1.0, max_tokens=60)
  for seed in range(3):
    done = client.completions.create(**ask, seed=seed, extra_body={"regex": "[ab]{2,4}-[0-9]{3}"})
    assert re.fullmatch("[ab]{2,4}-[0-9]{3}", done.choices[0].text)
    assert done.choices[0].finish_reason == "stop"
  schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}, "b": {"type": "boolean"}},
            "required": ["a", "b"], "additionalProperties": False}
  done = client.chat.completions.create(
      model="small", messages=[{"role": "user", "content": "x"}], max_tokens=200, seed=1,
      logit_bias={"0": -100}, response_format={
          "type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
  assert set(json.loads(done.choices[0].message.content)) == {"a", "b"}


@pytest.mark.parametrize("body, status, words", [
    (b"{", 400, "not JSON"), (b"\xff\xfe", 400, "not UTF-8"), (b"[1]", 400, "JSON list"),
    (b"[" * 3000, 400, "not JSON"), (b" " * 5000, 413, "longer than 4096 bytes"),
    ({"prompt": 3}, 400, "prompt must be"), ({"prompt": []}, 400, "prompt must be"),
    ({"prompt": [321]}, 400, "token 321"), ({"max_tokens": 0}, 400, "max_tokens=0"),
    ({"max_tokens": 600}, 400, "more than the 512"), ({"max_tokens": "9"}, 400, "max_tokens='9'"),
    ({"max_tokens": True}, 400, "max_tokens=True"), ({"n": 65}, 400, "n=65"),
    ({"prompt": ["a"] * 9, "n": 9}, 400, "81 completions"),
    ({"temperature": -1}, 400, "temperature=-1"), ({"temperature": 1e39}, 400, "temperature="),
    ({"top_p": -1}, 400, "top_p=-1"), ({"top_k": 3_000_000_000}, 400, "top_k="),
    ({"repetition_penalty": 1e-46}, 400, "repetition_penalty="),
    ({"max_tokens": 10**400}, 400, "max_tokens="), (b'{"prompt": "\\ud800"}', 400, "surrogate"),
    (b'{"max_tokens": 1' + b"0" * 4000 + b"}", 400, "max_tokens="),
    (b'{"\\ud800": 1}', 400, "half"),
    ({"logit_bias": {"9": 10**400}}, 400, "logit_bias"), ({"logit_bias": {"09": 1}}, 400, "ids"),
    ({"stop": ""}, 400, "stop=''"), ({"stop": [3]}, 400, "stop="),
    ({"seed": 0.5}, 400, "seed=0.5"), ({"logprobs": 21}, 400, "logprobs=21"),
    ({"stream": "yes"}, 400, "stream='yes'"), ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"325": 1}}, 400, "token 325"), ({"presence_penalty": 9}, 400, "penalty=9"),
    ({"best_of": 3}, 400, "best_of=3"), ({"echo": True, "logprobs": 1}, 400, "echoed"),
    ({"typo": 1}, 400, "'typo' is not understood"), ({"model": "gpt"}, 404, "'gpt' is not here"),
    ({"regex": "("}, 400, "regex"), ({"response_format": {"type": "xml"}}, 400, "type must be"),
    ({"response_format": {"type": "json_schema"}}, 400, "schema must be an object")])
def test_refusals(server, body, status, words):
  """Law: each has its status, and a message that names what is wrong."""
  sent = {"content": body} if isinstance(body, bytes) else {"body": {"prompt": "a"} | body}
  answer = server.post("/v1/completions", **sent)
  assert answer.status_code == status
  assert words in answer.json()["error"]["message"]


def test_other_refusals(server):
  """Law: of the chat's body, of methods and of paths."""
  for body, words in (({}, "messages must be"), ({"messages": [{"role": "x"}]}, "role='x'"),
                      ({"messages": [{"role": "user", "content": [{"type": "image"}]}]},
                       "not text"),
                      ({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 2},
                       "logprobs=true"),
                      ({"messages": [{"role": "user", "content": "a"}], "max_tokens": 3,
                        "max_completion_tokens": 4}, "differ"),
                      ({"messages": [{"role": "user", "content": "a"}], "tools": []}, "'tools'")):
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == 400 and words in answer.json()["error"]["message"]
  assert httpx.get(server.url + "/v1/completions").status_code == 405
  assert "nothing" in httpx.get(server.url + "/nothing").json()["error"]["message"]
  assert "up" in httpx.get(server.url + "/").text


def test_many_at_once(server, written):
  """Law: clients at once get what each would alone; more than the queue holds are told to wait."""
  prompts = [f"def {'x' * i}" for i in range(8)]

  async def ask_all():
    async with httpx.AsyncClient(timeout=60) as http:
      ask = lambda p: http.post(server.url + "/v1/completions", json={
          "prompt": p, "max_tokens": 9, "temperature": 0})
      return await asyncio.gather(*map(ask, prompts))

  answered = 0
  for prompt, answer in zip(prompts, asyncio.run(ask_all())):
    assert answer.status_code in (200, 429)
    if answer.status_code == 200:
      answered += 1
      assert answer.json()["choices"][0]["text"] == written(prompt, 9)[1]
  assert answered >= 6  # what the queue holds
  full = server.post("/v1/completions", {"prompt": "a", "n": 64, "max_tokens": 300})
  assert full.status_code == 429 and "6 requests wait" in full.json()["error"]["message"]
  assert full.headers["retry-after"] == "1"
  assert server.idle()


def test_a_grammar_that_is_too_much(server):
  """Law: a constraint that gives up is an error of its own call, not an answer that breaks it."""
  body = {"prompt": "x", "max_tokens": 60, "temperature": 1.0}
  with concurrent.futures.ThreadPoolExecutor() as pool:
    other = pool.submit(server.post, "/v1/completions", body | {"seed": 1})
    schema = {"type": "integer", "multipleOf": 999983, "minimum": 1, "maximum": 10**15}
    answer = server.post("/v1/completions", body | {"response_format": {
        "type": "json_schema", "json_schema": {"schema": schema}}})
  assert answer.status_code == 500 and "fuel" in answer.json()["error"]["message"]
  assert other.result().status_code == 200


def test_strangers(generator, tokenizer):
  """Law: a page of another site, or a name that is not the server's own, is refused."""
  limits = guard.Limits(hosts=("127.0.0.1", "localhost"))
  with running(generator, tokenizer, limits) as server:
    for headers, status in (({}, 200), ({"Origin": server.url}, 200),
                            ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
                            ({"Host": "evil.example"}, 403)):
      answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
      assert answer.status_code == status


def test_metrics_and_health(server):
  """Oracle: prometheus_client's parser, and the engine's own totals."""
  server.post("/v1/completions", {"prompt": "def ", "max_tokens": 5, "temperature": 0})
  assert server.idle()
  found = {s.name: s.value for family in text_string_to_metric_families(
      httpx.get(server.url + "/metrics").text) for s in family.samples}
  assert found["dsv3_generated_tokens_total"] == server.engine.totals["new"] > 0
  assert found["dsv3_cache_pages_used"] == 0 and found["dsv3_up"] == 1
  assert found["dsv3_time_to_first_token_seconds_count"] > 0
  health = httpx.get(server.url + "/health")
  assert health.status_code == 200 and health.json()["status"] == "ok"


def test_who_leaves_and_what_takes_too_long(generator, tokenizer):
  """Law: a client that goes away, streaming or not, ends its request; so does the time limit, with
  a status or, once the answer has begun, by breaking it off. The pages are free after it."""
  ask = {"prompt": "def ", "max_tokens": 400, "logit_bias": {str(tokenizer.eos): -100}}
  with running(generator, tokenizer, guard.Limits(seconds=1.0), pause=0.02) as server:
    with httpx.stream("POST", server.url + "/v1/completions", timeout=30,
                      json=ask | {"stream": True}) as answer:
      next(answer.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
      httpx.post(server.url + "/v1/completions", timeout=0.2, json=ask)
    assert server.idle() and server.engine.totals["cancelled"] == 2
    answer = server.post("/v1/completions", ask)
    assert answer.status_code == 504 and "more than 1 seconds" in answer.json()["error"]["message"]
    with pytest.raises(httpx.RemoteProtocolError):
      server.post("/v1/completions", ask | {"stream": True})
    assert server.idle() and server.engine.totals["cancelled"] == 4


def test_a_reader_so_slow_that_sockets_fill(generator, tokenizer):
  """Law: who asks for a stream and never reads holds nobody up, gets its answer whole when it does
  read, and leaves nothing."""
  ask = {"prompt": "def ", "max_tokens": 400, "logit_bias": {str(tokenizer.eos): -100},
         "stream": True, "logprobs": 20}
  with running(generator, tokenizer) as server:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps(ask).encode()
    with socket.socket() as slow:
      slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)  # before it connects
      slow.connect((host, int(port)))
      slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n"
                   b"content-length: %d\r\n\r\n%b" % (host.encode(), len(body), body))
      while not server.engine.totals["new"] > 20:
        time.sleep(0.01)
      for _ in range(3):
        assert server.post("/v1/completions", {"prompt": "a", "max_tokens": 3}).status_code == 200
      assert server.idle()
      slow.settimeout(30)
      answer = b""
      while part := slow.recv(65536):
        answer += part
    assert answer.count(b'"token_logprobs"') > 100 and b"data: [DONE]" in answer
    assert len(answer) > 200_000  # more than buffers on the way hold


def test_key(generator, tokenizer):
  """Law: without the key nothing is told but health and metrics."""
  with running(generator, tokenizer, guard.Limits(key="secret")) as server:
    ask = {"prompt": "a", "max_tokens": 2}
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
      answer = server.post("/v1/completions", ask, headers=headers)
      assert answer.status_code == 401 and "Bearer KEY" in answer.json()["error"]["message"]
    assert httpx.get(server.url + "/v1/models").status_code == 401
    assert httpx.get(server.url + "/health").status_code == 200
    answer = server.post("/v1/completions", ask, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200
