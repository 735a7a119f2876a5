"""Conversations as tokens, in the released model's format.

    bos, the system's text, then of each turn  <｜User｜> text  or  <｜Assistant｜> text eos

A prompt ends with <｜Assistant｜>, after which the model answers. Special tokens come from here
alone: text that spells one stays text (`Tokenizer.encode`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


class Part(NamedTuple):
  """Tokens in a row of which the model wrote all or none."""

  tokens: list[int]
  answer: bool


def parts(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[Part]:
  """A conversation in parts; an answer's part holds its text and eos, not <｜Assistant｜>.

  Args:
    messages: dicts of "role" (system, user, assistant) and "content", a string.
    tokenizer: has the special ids.

  Raises:
    ConfigError: names the message that is none.
  """
  check(messages)
  system = "\n\n".join(m["content"] for m in messages if m["role"] == "system")
  found = [Part([tokenizer.bos, *tokenizer.encode(system)], False)]
  for message in messages:
    tokens = tokenizer.encode(message["content"])
    if message["role"] == "user":
      found.append(Part([tokenizer.user, *tokens], False))
    elif message["role"] == "assistant":
      found += [Part([tokenizer.assistant], False), Part([*tokens, tokenizer.eos], True)]
  return found


def prompt(messages: Sequence[dict[str, Any]], tokenizer: Tokenizer) -> list[int]:
  """Tokens after which the model answers the last message; errors as for `parts`."""
  found = [t for part in parts(messages, tokenizer) for t in part.tokens]
  return [*found, tokenizer.assistant]


def check(messages: Any) -> None:
  """Raises ConfigError where this is not a list of messages."""
  if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
    raise ConfigError("messages must be a list with at least one message")
  for i, message in enumerate(messages):
    name = f"messages[{i}]"
    if not isinstance(message, dict):
      raise ConfigError(f"{name} is no object with role and content")
    if message.get("role") not in ROLES:
      raise ConfigError(f"{name}.role={message.get('role')!r} must be one of {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
      raise ConfigError(f"{name}.content={message.get('content')!r} must be a string")
