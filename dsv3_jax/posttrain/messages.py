"""Conversations to learn from: JSONL, tokens, and which of the tokens count.

A record is a conversation or one question with its answer:

    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2?", "response": "4"}

| field | |
|---|---|
| `messages` | a system's turn or none, then user and assistant in turns, the assistant last |
| `prompt`, `response` | in place of it: a user's and an assistant's turn |
| `system` | with prompt and response: the system's text |
| `id` | whatever you like |

A key beyond these is an error. Loss is taken on the assistant's texts and the end token behind
each, on nothing else: what comes before an answer is exactly what `chat.prompt` gives a model.

A conversation longer than the sequence is cut at a turn: it keeps the turns from the first on up to
the last answer that ends within the sequence. One whose first answer does not is dropped. An answer
is never cut: a model that learns from one without its end learns not to end. `Encoded` counts both.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import jsonl
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.tasks.statements import boxed

# Asks for the long style (report 5.1: the system's prompt asks for reflection and verification).
REFLECTION = "Reflect and verify."
STYLES = ("answer", "short", "long", "both")

Conversation = list[dict[str, str]]


class Sample(NamedTuple):
  """A conversation in tokens.

  Attributes:
    tokens: int32 [n].
    mask: bool [n], true where the token is to be learned: answers and the end token of each.
  """

  tokens: np.ndarray
  mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Conversations in tokens, none too long.

  Attributes:
    samples: in their order.
    cut: how many of them lost turns at their end.
    dropped: how many conversations are not there, for their first answer did not fit.
  """

  samples: tuple[Sample, ...]
  cut: int
  dropped: int


def read(path: str | Path) -> list[Conversation]:
  """Conversations of a .jsonl, .jsonl.gz or .jsonl.zst file.

  Raises:
    ConfigError: as of `jsonl.read` and `check`, with file and line.
  """
  return jsonl.read(path, _conversation)


def write(path: str | Path, conversations: Iterable[Sequence[dict[str, str]]]) -> Path:
  """Writes conversations as `messages`; errors as of `check` and `jsonl.write`."""
  records = [{"messages": check(conversation)} for conversation in conversations]
  return jsonl.write(path, records)


def _conversation(record: dict[str, Any]) -> Conversation:
  if "messages" in record:
    jsonl.known(record, ("messages", "id"))
    return check(record["messages"])
  jsonl.known(record, ("prompt", "response", "system", "id"))
  for name in ("prompt", "response"):
    if name not in record:
      raise ConfigError("a record needs messages, or prompt and response; "
                        f"it has {', '.join(record) or 'nothing'}")
  for name in ("prompt", "response", "system"):
    jsonl.text(record.get(name, ""), name)
  if not record["response"].strip():
    raise ConfigError("response is empty; there is nothing to learn")
  pairs = (("system", record.get("system")), ("user", record["prompt"]),
           ("assistant", record["response"]))
  return check([{"role": role, "content": text} for role, text in pairs
                if text or role != "system"])


def check(messages: Any) -> Conversation:
  """The messages, as a list, if they are a conversation to learn from.

  Raises:
    ConfigError: names the message that is wrong: an unknown key or role, content that is not text,
      an answer without text, roles that do not alternate, a last turn that is not the assistant's.
  """
  chat.check(messages)
  expected = ("system", "user")
  for i, message in enumerate(messages):
    name = f"messages[{i}]"
    try:
      jsonl.known(message, ("role", "content"))
    except ConfigError as error:
      raise ConfigError(f"{name}: {error}") from None
    jsonl.text(message["content"], f"{name}.content")
    role = message["role"]
    if role not in expected:
      raise ConfigError(f"{name}.role={role!r} must be {' or '.join(expected)}: user and assistant "
                        "take turns, after the system's text if there is one")
    expected = ("assistant",) if role == "user" else ("user",)
    if role == "assistant" and not message["content"].strip():
      raise ConfigError(f"{name}.content is empty; an answer must have text")
  if messages[-1]["role"] != "assistant":
    raise ConfigError(f"messages[{len(messages) - 1}].role={messages[-1]['role']!r}: the last turn "
                      "must be the assistant's; there is nothing to learn after it")
  return list(messages)


def encode(conversation: Sequence[dict[str, str]], tokenizer: Tokenizer) -> Sample:
  """A conversation in the chat template (`data/chat.py`), whole.

  Raises:
    ConfigError: as of `check`.
  """
  return _joined(chat.parts(check(conversation), tokenizer))


def _joined(parts: Sequence[chat.Part]) -> Sample:
  tokens = np.array([t for part in parts for t in part.tokens], np.int32)
  return Sample(tokens, np.repeat([part.answer for part in parts], [len(p.tokens) for p in parts]))


def encode_all(conversations: Iterable[Sequence[dict[str, str]]], tokenizer: Tokenizer,
               longest: int) -> Encoded:
  """Conversations in the chat template, each cut at a turn to `longest` tokens or dropped.

  Raises:
    ConfigError: as of `check`.
  """
  samples, cut, dropped = [], 0, 0
  for conversation in conversations:
    parts = chat.parts(check(conversation), tokenizer)
    ends = np.cumsum([len(part.tokens) for part in parts])
    fitting = [i + 1 for i, part in enumerate(parts) if part.answer and ends[i] <= longest]
    if fitting:
      samples.append(_joined(parts[:fitting[-1]]))
      cut += fitting[-1] < len(parts)
    else:
      dropped += 1
  return Encoded(tuple(samples), cut, dropped)


def from_problems(problems: Iterable[Problem], style: str = "short", reflection: str = REFLECTION
                  ) -> list[Conversation]:
  """Problems with their worked solutions, as conversations.

  Args:
    problems: with `answer`, `worked`, `worked_long` or all.
    style: "answer": problem and boxed answer alone. "short": problem and `worked`. "long":
      `reflection` as the system's text, problem and `worked_long`. "both": for each problem short,
      then long (report 5.1's two samples).
    reflection: stands behind the problem's own system text; "" for none.

  Raises:
    ConfigError: an unknown style, or a problem without that solution.
  """
  if style not in STYLES:
    raise ConfigError(f"style={style!r} must be one of {', '.join(STYLES)}")
  found = []
  for problem in problems:
    for kind in ("short", "long") if style == "both" else (style,):
      answer = {"answer": boxed(problem.answer), "short": problem.worked,
                "long": problem.worked_long}[kind]
      if not (answer if kind != "answer" else problem.answer).strip():
        raise ConfigError(f"the problem {problem.id} has no "
                          f"{kind if kind == 'answer' else f'{kind} worked solution'}")
      extra = reflection if kind == "long" else ""
      system = "\n\n".join(text for text in (problem.system, extra) if text)
      asked = dataclasses.replace(problem, system=system).messages
      found.append([*asked, {"role": "assistant", "content": answer}])
  return found
