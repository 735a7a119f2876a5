"""What a client gets: objects of OpenAI's API from the engine's events."""

import dataclasses
from typing import Any

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer.request import Event, Token
from dsv3_jax.infer.text import Stream


@dataclasses.dataclass
class Piece:
  """A part of one choice.

  Attributes:
    text: what is settled since the part before.
    tokens: the tokens since.
    finish: "stop" or "length" in the last part, before that None.
  """

  text: str
  tokens: tuple[Token, ...]
  finish: str | None = None


class Choice:
  """One completion while it comes.

  Args:
    tokenizer: the model's.
    stop: strings that end it.

  Attributes:
    count: tokens so far.
    error: what went wrong, in words.
  """

  def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]):
    self._stream = Stream(tokenizer.decode_bytes, stop)
    self.count, self.error = 0, ""

  @property
  def ended(self) -> bool:
    """Whether a stop string was met, after which nothing counts."""
    return self._stream.ended

  def take(self, event: Event) -> Piece:
    """The next part."""
    text, tokens = "", []
    for token in event.tokens:  # one by one, so that none after a stop string counts
      if self._stream.ended:
        break
      text += self._stream.push([token.id])
      tokens.append(token)
    self.count += len(tokens)
    self.error = event.error
    finish = "stop" if self._stream.ended else event.finish or None
    if event.finish:
      text += self._stream.close()
    return Piece(text, tuple(tokens), finish)


def usage(prompt: int, completion: int) -> dict[str, int]:
  """Counts of tokens."""
  return {"prompt_tokens": prompt, "completion_tokens": completion,
          "total_tokens": prompt + completion}


def error(message: str, kind: str, param: str | None = None, code: str | None = None
          ) -> dict[str, Any]:
  """The body of a refusal."""
  return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def text_logprobs(tokens: list[Token], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
  """`logprobs` of a completion's choice; `offset` is where its first token's text begins."""
  found: dict[str, list[Any]] = {
      "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
  for token in tokens:
    found["tokens"].append(tokenizer.decode([token.id]))
    found["token_logprobs"].append(token.logprob)
    tops: dict[str, float] = {}
    for t, p in (*token.tops, (token.id, token.logprob)):  # the likeliest of one spelling
      tops.setdefault(tokenizer.decode([t]), p)
    found["top_logprobs"].append(tops)
    found["text_offset"].append(offset)
    offset += len(found["tokens"][-1])
  return found


def chat_logprobs(tokens: list[Token], tokenizer: Tokenizer) -> dict[str, Any]:
  """`logprobs` of a chat's choice."""
  def one(id: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.decode_bytes([id])
    return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

  return {"content": [{**one(t.id, t.logprob), "top_logprobs": [one(*top) for top in t.tops]}
                      for t in tokens]}
