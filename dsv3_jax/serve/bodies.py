"""What a client sends, checked and turned into requests for the engine.

Every key that is understood has a line in `_KEYS`; one that is not is refused by name, so that
nobody believes in an option that does nothing. The few that say who asks are let pass.
"""

import dataclasses
import json
import secrets
from collections.abc import Callable
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat, fim
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.request import TOPS, Request
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.serve import grammar

CHOICES = 64  # most completions of one call, prompts times n
STOPS = 16
BIASES = 1024  # entries of logit_bias
_IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier",
                      "prompt_cache_key", "prompt_cache_retention"})
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
_COMMON = frozenset({"model", "n", "stop", "stream", "stream_options", "seed", "logit_bias",
                     "presence_penalty", "frequency_penalty", "max_tokens", "logprobs",
                     "response_format", "regex", *_SAMPLING})
_KEYS = {"completion": _COMMON | {"prompt", "suffix", "echo", "best_of"},
         "chat": _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}}


class BadRequest(ConfigError):
  """A body that cannot be answered.

  Attributes:
    param: the key at fault, or None.
  """

  def __init__(self, message: str, param: str | None = None):
    super().__init__(message)
    self.param = param


@dataclasses.dataclass(frozen=True)
class Call:
  """One call's work.

  Attributes:
    requests: for the engine, in the order of the choices: n for each prompt.
    n: choices of a prompt.
    stop: strings that end a text.
    stream, usage: whether it is streamed, and then with a last line of counts.
    logprobs: whether they are given, with `Request.tops` alternatives.
    heads: of each request, text that its completion begins with (`echo`).
  """

  requests: tuple[Request, ...]
  n: int
  stop: tuple[str, ...]
  stream: bool
  usage: bool
  logprobs: bool
  heads: tuple[str, ...]


def parse(data: bytes) -> dict[str, Any]:
  """The object that a body holds.

  Raises:
    BadRequest: not UTF-8, not JSON, not an object.
  """
  try:
    body = json.loads(data.decode("utf-8"))
  except UnicodeDecodeError as e:
    raise BadRequest(f"the body is not UTF-8: {e.reason} at byte {e.start}") from None
  except (ValueError, RecursionError) as e:  # also of numbers with thousands of digits
    raise BadRequest(f"the body is not JSON: {e}") from None
  if not isinstance(body, dict):
    raise BadRequest(f"the body is a JSON {type(body).__name__}; send an object")
  try:
    json.dumps(body, ensure_ascii=False).encode()
  except UnicodeEncodeError as e:
    raise BadRequest(f"the body holds half a character (a lone surrogate): {e.reason}") from None
  return body


class Reader:
  """Turns bodies into calls.

  Args:
    tokenizer: the model's.
    vocab_size: rows of the model's embedding.
    limit: tokens that a request may have.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int, limit: int):
    self._tokenizer, self._limit = tokenizer, limit
    self._longest = int(tokenizer.token_bytes_V.max())  # bytes of a token
    self._grammars = grammar.Grammars(tokenizer, vocab_size)

  def completion(self, body: dict[str, Any]) -> Call:
    """A body of /v1/completions."""
    _known(body, "completion")
    prompts, texts = self._prompts(body)
    tops = _number(body, "logprobs", None, 0, TOPS, int)
    echo = _flag(body, "echo")
    if echo and tops is not None:
      raise BadRequest("logprobs of an echoed prompt are not computed; leave out echo or logprobs",
                       "echo")
    best = body.get("best_of")
    if best is not None and best != (1 if body.get("n") is None else body["n"]):
      raise BadRequest(f"best_of={best!r} must equal n: completions are not ranked", "best_of")
    return self._call(body, prompts, 16, tops, texts if echo else None)

  def chat(self, body: dict[str, Any]) -> Call:
    """A body of /v1/chat/completions."""
    _known(body, "chat")
    try:
      messages = _plain(body.get("messages"))
      chat.check(messages)
      self._short(*(m["content"] for m in messages))
      prompt = chat.prompt(messages, self._tokenizer)
    except BadRequest:
      raise
    except ConfigError as e:
      raise BadRequest(str(e), "messages") from None
    wants = _flag(body, "logprobs")
    tops = _number(body, "top_logprobs", None, 0, TOPS, int)
    if tops is not None and not wants:
      raise BadRequest("top_logprobs wants logprobs=true", "top_logprobs")
    body = dict(body)
    longer = body.pop("max_completion_tokens", None)
    if longer is not None:
      if body.get("max_tokens") not in (None, longer):
        raise BadRequest("max_tokens and max_completion_tokens differ; give one",
                         "max_completion_tokens")
      body["max_tokens"] = longer
    room = max(1, self._limit - len(prompt))
    return self._call(body, [prompt], room, (tops or 0) if wants else None, None)

  def _call(self, body, prompts: list[list[int]], default: int, tops: int | None,
            texts: list[str] | None) -> Call:
    n = _number(body, "n", 1, 1, CHOICES, int)
    if n * len(prompts) > CHOICES:
      raise BadRequest(f"{len(prompts)} prompts with n={n} are {n * len(prompts)} completions; at "
                       f"most {CHOICES} in one call", "n")
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (not isinstance(stop, list) or len(stop) > STOPS
        or not all(isinstance(s, str) and s for s in stop)):
      raise BadRequest(f"stop={body['stop']!r} must be a string or a list of at most {STOPS}, none "
                       "of them empty", "stop")
    options = body.get("stream_options")
    if options is not None and not (isinstance(options, dict)
                                    and set(options) <= {"include_usage", "include_obfuscation"}):
      raise BadRequest(f"stream_options={options!r}: an object with include_usage is understood",
                       "stream_options")
    most = _number(body, "max_tokens", default, 1, 2**31, int)
    drawn = {name: _number(body, name, value, -2**31, 2**31, type(value))
             for name, value in _SAMPLING.items()}
    drawn["top_p"] = drawn["top_p"] or 1e-6  # 0 stands for the likeliest token elsewhere
    seed = _number(body, "seed", None, -2**63, 2**63, int)
    seed = secrets.randbits(32) if seed is None else seed
    constraint = self._constraint(body)
    bias = tuple(self._bias(body))
    requests = []
    for prompt in prompts:
      for i in range(n):
        try:
          sampling = Sampling(**drawn, seed=(seed + i) % 2**32)
        except ConfigError as e:
          raise BadRequest(str(e), str(e).partition("=")[0]) from None
        requests.append(Request(
            tuple(prompt), most, sampling, frozenset({self._tokenizer.eos}), bias,
            _number(body, "presence_penalty", 0.0, -2, 2, float),
            _number(body, "frequency_penalty", 0.0, -2, 2, float), tops or 0, constraint))
    return Call(tuple(requests), n, tuple(stop), _flag(body, "stream"),
                bool(options and options.get("include_usage")), tops is not None,
                tuple(t for t in texts for _ in range(n)) if texts else ("",) * len(requests))

  def _prompts(self, body) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and their texts."""
    prompt, tokenizer = body.get("prompt"), self._tokenizer
    prompt = "" if prompt is None else prompt
    suffix = body.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
      raise BadRequest(f"suffix={suffix!r} must be a string", "suffix")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _ids(prompt)):
      prompt = [prompt]
    if not isinstance(prompt, list) or not prompt or not all(
        isinstance(p, str) or (isinstance(p, list) and _ids(p)) for p in prompt):
      raise BadRequest("prompt must be a string, a list of token ids, or a list of these", "prompt")
    found, texts = [], []
    for p in prompt:
      self._short(p if isinstance(p, str) else "", suffix or "")
      ids = tokenizer.encode(p) if isinstance(p, str) else p
      if suffix is not None:
        ids = fim.prompt(ids, tokenizer.encode(suffix), tokenizer)
      elif isinstance(p, str) or not p:
        ids = [tokenizer.bos, *ids]
      if max(ids) >= tokenizer.vocab_size:
        raise BadRequest(f"prompt holds token {max(ids)}, outside the vocabulary of "
                         f"{tokenizer.vocab_size}", "prompt")
      found.append(ids)
      texts.append(p if isinstance(p, str) else tokenizer.decode(p))
    return found, texts

  def _short(self, *texts: str) -> None:
    """Refuses what cannot fit, before time is spent on its tokens."""
    size = sum(len(t.encode()) for t in texts)
    if size > self._limit * self._longest:
      raise BadRequest(f"the prompt's {size} bytes are more than the {self._limit} tokens that a "
                       "request may have")

  def _bias(self, body) -> list[tuple[int, float]]:
    bias = body.get("logit_bias")
    if bias is None:
      return []
    try:
      found = [(int(token), float(value)) for token, value in bias.items()]
      right = len(found) <= BIASES and all(str(t) == given for (t, _), given in zip(
          found, bias, strict=True))
    except (AttributeError, TypeError, ValueError, OverflowError):
      right = False
    if not right:
      raise BadRequest(f"logit_bias must be an object of at most {BIASES} token ids to numbers",
                       "logit_bias")
    for token, value in found:
      if not (0 <= token < self._tokenizer.vocab_size and -100 <= value <= 100):
        raise BadRequest(f"logit_bias of token {token} is {value}: tokens lie below "
                         f"{self._tokenizer.vocab_size}, values between -100 and 100", "logit_bias")
    return found

  def _constraint(self, body) -> Callable[[], Any] | None:
    regex, form = body.get("regex"), body.get("response_format")
    if regex is not None and form is not None:
      raise BadRequest("regex and response_format are two constraints; give one", "regex")
    try:
      if regex is not None:
        return self._grammars.regex(regex)
      return None if form is None else self._grammars.response_format(form)
    except ConfigError as e:
      raise BadRequest(str(e), "response_format" if regex is None else "regex") from None


def _known(body: dict[str, Any], kind: str) -> None:
  keys = _KEYS[kind] | _IGNORED
  unknown = sorted(k for k, v in body.items() if k not in keys and v is not None)
  if unknown:
    raise BadRequest(f"{unknown[0]!r} is not understood here; leave it out (known: "
                     f"{', '.join(sorted(_KEYS[kind]))})", unknown[0])


def _ids(value: list[Any]) -> bool:
  return all(isinstance(t, int) and not isinstance(t, bool) and t >= 0 for t in value)


def _plain(messages: Any) -> Any:
  """Messages whose content may be a list of text parts, with content as a string; "developer" is
  what "system" was called later."""
  if not isinstance(messages, list):
    return messages
  found = []
  for i, message in enumerate(messages):
    if isinstance(message, dict):
      content = message.get("content")
      if isinstance(content, list):
        if not all(isinstance(p, dict) and p.get("type") == "text"
                   and isinstance(p.get("text"), str) for p in content):
          raise ConfigError(f"messages[{i}].content has a part that is not text")
        message = {**message, "content": "".join(p["text"] for p in content)}
      if message.get("role") == "developer":
        message = {**message, "role": "system"}
      unknown = {k for k, v in message.items() if v is not None} - {"role", "content", "name"}
      if unknown:
        raise ConfigError(f"messages[{i}] has {min(unknown)!r}, which is not understood here")
    found.append(message)
  return found


def _number(body: dict[str, Any], key: str, default: Any, least: float, most: float, kind: type
            ) -> Any:
  value = body.get(key)
  if value is None:
    return default
  number = isinstance(value, int | float) and not isinstance(value, bool)
  # The comparison comes first: it refuses what has no int() or float().
  if not number or not least <= value <= most or (kind is int and value != int(value)):
    what = "an integer" if kind is int else "a number"
    given = repr(value) if len(repr(value)) < 100 else "..."
    raise BadRequest(f"{key}={given} must be {what} between {least:g} and {most:g}", key)
  return kind(value)


def _flag(body: dict[str, Any], key: str) -> bool:
  value = body.get(key)
  if value is not None and not isinstance(value, bool):
    raise BadRequest(f"{key}={value!r} must be true or false", key)
  return bool(value)
