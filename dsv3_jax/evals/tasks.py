"""Tasks: a file of records, one a line (JSON), of several kinds. Needs no jax.

Multiple choice (`choices` is there):

    {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}

| field | |
|---|---|
| `question` (or `context`) | what comes before each choice; may be "" |
| `choices` | two texts or more, all different |
| `answer` | the index of the right one, from 0 |
| `delimiter` | between question and choice; default: one space |

A text to be written (`prompt` is there):

    {"prompt": "2 + 2 =", "answer": "4", "stop": "\\n", "max_tokens": 8}

| field | |
|---|---|
| `prompt` | what is to be continued |
| `answer` | the text, or a list of texts of which one will do; compared after normalisation |
| `ignore` | what the normalisation takes away, a list of `space` (at both ends; elsewhere white space becomes one space), `case`, `punctuation`; default: `["space"]` |
| `regex` | without `answer`: right if it matches anywhere. With `answer`: what its first group (or the whole of it) matched last is compared in place of the text |
| `stop` | a text, or a list of them, that ends the answer and is no part of it |
| `max_tokens` | of the answer; default: 64 |

Both may have `id`, `kind` ("choice" or "generation"), and `task`, the name under which results are
added up (default: the file's name). Any other field is an error: a misspelt one would be passed
over in silence.
"""  # noqa: E501

import dataclasses
import difflib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3_jax.config import ConfigError

IGNORE = ("space", "case", "punctuation")
SHOWN = 8  # errors of one file that are told at once
_COMMON = ("id", "kind", "task")


@dataclasses.dataclass(frozen=True)
class Choice:
  """One question of multiple choice; see the module's docstring."""

  name: str  # the file and the line
  task: str
  question: str
  choices: tuple[str, ...]
  answer: int
  delimiter: str = " "


@dataclasses.dataclass(frozen=True)
class Generation:
  """One text to be written; see the module's docstring."""

  name: str
  task: str
  prompt: str
  answers: tuple[str, ...] = ()
  regex: str | None = None
  ignore: tuple[str, ...] = ("space",)
  stop: tuple[str, ...] = ()
  max_tokens: int = 64


Record = Choice | Generation


def read(path: str | Path) -> list[Record]:
  """The records of a file, in its order.

  Raises:
    ConfigError: no such file, no UTF-8, no record, or bad records: each is named by its line, with
      the field and what would be right.
  """
  path = Path(path)
  try:
    lines = path.read_bytes().splitlines()
  except OSError as error:
    raise ConfigError(f"--tasks={path} cannot be read: {error.strerror}") from None
  found, errors = [], []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      found.append(_record(line, f"{path}:{number}", path.stem))
    except ConfigError as error:
      errors.append(f"{path}:{number}: {error}")
  if errors:
    more = [f"and {len(errors) - SHOWN} more lines"] if len(errors) > SHOWN else []
    raise ConfigError("\n".join([*errors[:SHOWN], *more]))
  if not found:
    raise ConfigError(f"--tasks={path} has no records; write one JSON object a line")
  return found


def _record(line: bytes, name: str, task: str) -> Record:
  """One line's record; errors say what is wrong, not where."""
  try:
    values = json.loads(line.decode("utf-8"))
  except ValueError as error:  # UnicodeDecodeError too
    raise ConfigError(f"not a JSON object in UTF-8: {error}") from None
  if not isinstance(values, dict):
    raise ConfigError(f"a record is an object, not {_named(values)}")
  kind = values.get("kind") or ("choice" if "choices" in values else
                                "generation" if "prompt" in values else "")
  if kind not in _KINDS:
    raise ConfigError(f"kind={kind!r} is not choice or generation" if kind else
                      "neither choices (multiple choice) nor prompt (text to be written)")
  make, fields = _KINDS[kind]
  known = (*_COMMON, *fields)
  for key in values:
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1)
      raise ConfigError(f"unknown field {key!r} of kind {kind}"
                        f"{f'; did you mean {near[0]!r}?' if near else ''} "
                        f"(fields: {', '.join(known)})")
  return make(values, name, _text(values, "task", task))


def _choice(values: dict[str, Any], name: str, task: str) -> Choice:
  if ("question" in values) == ("context" in values):
    raise ConfigError("give one of question and context")
  question = _text(values, "question" if "question" in values else "context")
  choices, answer = _texts(values, "choices"), values.get("answer")
  if len(choices) < 2:
    raise ConfigError(f"choices has {len(choices)} texts; give two or more")
  if len(set(choices)) < len(choices):
    raise ConfigError(f"choices has {max(choices, key=choices.count)!r} twice")
  if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
    raise ConfigError(f"answer={answer!r} must be the index of the right choice, from 0 to "
                      f"{len(choices) - 1}")
  return Choice(name, task, question, choices, answer, _text(values, "delimiter", " "))


def _generation(values: dict[str, Any], name: str, task: str) -> Generation:
  prompt = _text(values, "prompt")
  if "answer" not in values and "regex" not in values:
    raise ConfigError("give answer or regex, or nothing can be right")
  answers = _texts(values, "answer", single=True) if "answer" in values else ()
  regex = values.get("regex")
  if "regex" in values:
    regex = _text(values, "regex")
    try:
      re.compile(regex)
    except re.error as error:
      raise ConfigError(f"regex={regex!r} is none: {error}") from None
  ignore = _texts(values, "ignore", empty=True) if "ignore" in values else ("space",)
  for word in ignore:
    if word not in IGNORE:
      raise ConfigError(f"ignore has {word!r}; it may have {', '.join(IGNORE)}")
  stop = _texts(values, "stop", single=True, empty=True) if "stop" in values else ()
  most = values.get("max_tokens", Generation.max_tokens)
  if not isinstance(most, int) or isinstance(most, bool) or most < 1:
    raise ConfigError(f"max_tokens={most!r} must be a whole number, at least 1")
  return Generation(name, task, prompt, answers, regex, ignore, stop, most)


_KINDS: dict[str, tuple[Callable[..., Record], tuple[str, ...]]] = {
    "choice": (_choice, ("question", "context", "choices", "answer", "delimiter")),
    "generation": (_generation, ("prompt", "answer", "regex", "ignore", "stop", "max_tokens"))}


def _text(values: dict[str, Any], key: str, default: str | None = None) -> str:
  value = values.get(key, default)
  if not isinstance(value, str):
    raise ConfigError(f"{key} must be a text, not {_named(value)}" if key in values else
                      f"{key} is missing")
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ConfigError(f"{key} is no valid Unicode: {error.reason} at character {error.start}"
                      ) from None
  return value


def _texts(values: dict[str, Any], key: str, single: bool = False, empty: bool = False
           ) -> tuple[str, ...]:
  """A list of texts that are not empty, or, where `single`, one text."""
  value = values.get(key)
  if single and isinstance(value, str):
    value = [value]
  if not isinstance(value, list) or not (value or empty):
    raise ConfigError(f"{key} must be {'a text or ' * single}a list of texts, not {_named(value)}")
  found = tuple(_text({key: item}, key) for item in value)
  if "" in found:
    raise ConfigError(f"{key} has an empty text")
  return found


def _named(value: Any) -> str:
  names = {dict: "an object", list: "a list" if value else "an empty list", str: "a text",
           bool: "true or false", int: "a number", float: "a number", type(None): "null"}
  return names[type(value)]
