"""Constraints that keep a completion to a regular expression or a JSON schema, by llguidance."""

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer

LONGEST = 4096, 65536  # characters of a regular expression, and of a schema


class Grammars:
  """Makes constraints over a tokenizer's tokens.

  Args:
    tokenizer: the model's.
    vocab_size: rows of the model's embedding.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int):
    self._tokenizer, self._size = tokenizer, vocab_size

  def regex(self, pattern: Any) -> Callable[[], "Matcher"]:
    """Of texts that match as a whole.

    Raises:
      ConfigError: not a regular expression, or llguidance is not installed.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST[0]:
      raise ConfigError(f"regex must be a string of at most {LONGEST[0]} characters")
    return self._made(_library().LLMatcher.grammar_from_regex(pattern), "regex")

  def response_format(self, form: Any) -> Callable[[], "Matcher"] | None:
    """Of OpenAI's response_format: text (no constraint), json_object, json_schema.

    Raises:
      ConfigError: another form, a bad schema, or llguidance is not installed.
    """
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
      return None
    if kind == "json_object":
      schema: Any = {"type": "object"}
    elif kind == "json_schema":
      holder = form.get("json_schema")
      schema = holder.get("schema") if isinstance(holder, dict) else None
      if not isinstance(schema, dict):
        raise ConfigError("response_format.json_schema.schema must be an object")
    else:
      raise ConfigError(f"response_format={form!r}: type must be text, json_object or json_schema")
    text = json.dumps(schema)
    if len(text) > LONGEST[1]:
      raise ConfigError(f"response_format: the schema has more than {LONGEST[1]} characters")
    return self._made(_library().LLMatcher.grammar_from_json_schema(text), "response_format")

  @functools.cached_property
  def _tokens(self) -> Any:
    """The tokenizer as the library takes it."""
    library, tokenizer = _library(), self._tokenizer
    ids = range(self._size)

    class Wrapped:
      eos_token_id, bos_token_id = tokenizer.eos, tokenizer.bos
      tokens = [tokenizer.decode_bytes([t]) for t in ids]
      special_token_ids = [t for t in ids if not tokenizer.token_bytes_V[t]]

      def __call__(self, text: Any) -> list[int]:
        return tokenizer.encode(text if isinstance(text, str) else text.decode())

    return library.LLTokenizer(library.TokenizerWrapper(Wrapped()))

  def _made(self, grammar: str, name: str) -> Callable[[], "Matcher"]:
    wrong = _library().LLMatcher.validate_grammar(grammar, self._tokens)
    if wrong and not wrong.startswith("WARNING"):
      raise ConfigError(f"{name}: {wrong.splitlines()[0]}")
    first = _library().LLMatcher(self._tokens, grammar)
    return lambda: Matcher(first.deep_copy(), self._size)


class Matcher:
  """How far a text has come in a grammar; a `Constraint` of the engine."""

  def __init__(self, matcher: Any, vocab_size: int):
    self._matcher, self._size = matcher, vocab_size

  def allowed(self) -> np.ndarray:
    """bool [V]; a text that is complete may only end.

    Raises:
      RuntimeError: the grammar is too much for the library.
    """
    bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
    if self._matcher.is_error():  # it would let the text end anywhere
      raise RuntimeError(self._matcher.get_error().partition("\n")[0])
    return np.unpackbits(bits, bitorder="little")[:self._size].astype(bool)

  def take(self, token: int) -> None:
    """Raises RuntimeError where the grammar does not allow the token."""
    if not self._matcher.consume_token(token):
      raise RuntimeError(self._matcher.get_error().partition("\n")[0])


def _library() -> Any:
  try:
    import llguidance
  except ImportError:
    raise ConfigError("constraints want llguidance: pip install 'dsv3-jax[serve]'") from None
  return llguidance
