"""Byte-level BPE with DeepSeek's pretokenizer and special tokens (report section 4.1).

The pretokenizer cuts a text, in this order: digits in groups of one to three; runs of CJK
ideographs and kana; then one regular expression whose third alternative (optional space,
punctuation, trailing line breaks) lets BPE learn tokens that combine punctuation with line breaks.
Such tokens make a prompt that does not end in a line break atypical, so a share of them is cut in
two in training (`NewlineSplit`). The share is not disclosed: `data.split_rate`.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterable, Sequence

import numpy as np

from dsv3_jax.config import ConfigError

# Name of the attribute -> text of the token. The first three take ids 0, 1, 2, as in the release.
SPECIAL_TOKENS = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
}

DIGITS = r"\p{N}{1,3}"
CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""  # punctuation followed by letters
    r"""|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""  # one other character, letters and marks
    r"""| ?[\p{P}\p{S}]+[\r\n]*"""  # space, punctuation and symbols, trailing line breaks
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


class Tokenizer:
  """A byte-level tokenizer whose special tokens are known by name.

  `encode` never produces a special token, whatever the text contains: `<｜User｜>` in a document is
  text. Special ids are added by the caller. For a byte-level tokenizer without a normalizer,
  `decode(encode(text)) == text` for every text that UTF-8 can express.

  Attributes:
    bos, eos, pad, fim_hole, fim_begin, fim_end, user, assistant: ids.
    vocab_size: the largest id + 1.
    token_bytes_V: int32 [V], UTF-8 bytes a token stands for; 0 for added tokens and for ids beyond
      the tokenizer's own, which exist when the model's vocabulary is padded.
    hash: identifies the tokenizer; equal for files that differ in white space only.
  """

  bos: int
  eos: int
  pad: int
  fim_hole: int
  fim_begin: int
  fim_end: int
  user: int
  assistant: int

  def __init__(self, text: str, name: str = "tokenizer.json", vocab_size: int = 0):
    """Args:
      text: contents of a tokenizer.json.
      name: what to call it in errors.
      vocab_size: rows of the model's embedding; 0 takes the tokenizer's own.

    Raises:
      ConfigError: not a tokenizer, not byte-level, a special token is missing, or more ids than
        `vocab_size`.
    """
    import tokenizers

    try:
      spec = json.loads(text)
      kinds = {part["type"] for part in _parts(spec["pre_tokenizer"])}
      for token in spec["added_tokens"]:
        token["special"] = True  # so that no text is taken for one of them
      text = json.dumps(spec, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
      self._tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
      raise ConfigError(f"{name} is not a tokenizer.json of the tokenizers library: "
                        f"{error!r}") from None
    if "ByteLevel" not in kinds:
      raise ConfigError(f"{name} is not a byte-level tokenizer (its pre_tokenizer has "
                        f"{', '.join(sorted(kinds)) or 'no parts'}); a ByteLevel part is needed, "
                        "or leave data.tokenizer empty to train one")
    self._tokenizer.encode_special_tokens = True
    self._tokenizer.no_padding()
    self._tokenizer.no_truncation()
    self._text, self._name = text, name
    self.hash = hashlib.sha256(text.encode()).hexdigest()[:16]

    vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    moved = [f"{s} {i} -> {vocabulary[s]}" for s, i in added.items() if vocabulary[s] != i]
    if moved:
      raise ConfigError(f"{name}: the tokenizers library renumbers added tokens that do not follow "
                        f"the vocabulary without a gap ({', '.join(moved[:3])}); fill the gap with "
                        "placeholders")
    missing = [s for s in SPECIAL_TOKENS.values() if s not in added]
    if missing:
      raise ConfigError(f"{name} lacks the special tokens {', '.join(missing)}; add them to its "
                        "added_tokens, or leave data.tokenizer empty to train a tokenizer")
    for attribute, content in SPECIAL_TOKENS.items():
      setattr(self, attribute, added[content])
    self.vocab_size = max(vocabulary.values()) + 1
    if vocab_size and self.vocab_size > vocab_size:
      raise ConfigError(
          f"{name} has {self.vocab_size} tokens, but model.vocab_size={vocab_size}; set "
          f"model.vocab_size to at least {self.vocab_size}, or take a smaller tokenizer")

    from_unicode = {c: b for b, c in _byte_alphabet().items()}
    rows = max(vocab_size, self.vocab_size)
    self._bytes = [b""] * rows
    for token, i in vocabulary.items():
      # A plain token is spelt in the byte alphabet; an added one is spelt as it is.
      plain = token not in added and all(c in from_unicode for c in token)
      self._bytes[i] = bytes(from_unicode[c] for c in token) if plain else token.encode()
    self.token_bytes_V = np.array([len(b) for b in self._bytes], np.int32)
    self.token_bytes_V[list(added.values())] = 0

  @classmethod
  def load(cls, path: str, vocab_size: int = 0) -> "Tokenizer":
    """Reads a tokenizer.json, the released one included; errors as the constructor's."""
    try:
      with open(path, encoding="utf-8") as f:
        text = f.read()
    except (OSError, UnicodeDecodeError) as error:
      raise ConfigError(f"data.tokenizer={path!r} cannot be read: {error}") from None
    return cls(text, name=path, vocab_size=vocab_size)

  def __reduce__(self):
    return Tokenizer, (self._text, self._name, len(self.token_bytes_V))

  def to_json(self) -> str:
    """Text of a tokenizer.json that the tokenizers library and transformers read."""
    return self._text

  def encode(self, text: str) -> list[int]:
    """Ids of `text`, without bos and eos."""
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text; on all cores."""
    encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [e.ids for e in encodings]

  def decode_bytes(self, tokens: Iterable[int]) -> bytes:
    """The bytes that ids stand for; special tokens in their spelling, padding ids nothing."""
    return b"".join([self._bytes[t] for t in np.asarray(tokens, np.int64).tolist()])

  def decode(self, tokens: Iterable[int]) -> str:
    """Text of ids; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
    return self.decode_bytes(tokens).decode("utf-8", errors="replace")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
  """Trains a byte-level BPE on `texts`, which are read once and not kept.

  The special tokens take the ids 0 to 7, the 256 bytes the next ones. A small corpus gives fewer
  than `vocab_size` tokens. Equal texts in equal order give an equal tokenizer.

  Raises:
    ConfigError: `vocab_size` leaves no room for the bytes and special tokens.
  """
  from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
  from tokenizers import Tokenizer as Backend

  if vocab_size < SMALLEST_VOCABULARY:
    raise ConfigError(f"model.vocab_size={vocab_size} is smaller than the smallest tokenizer "
                      f"(256 bytes and {len(SPECIAL_TOKENS)} special tokens); set it to at least "
                      f"{SMALLEST_VOCABULARY}")
  backend = Backend(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Sequence([
      pre_tokenizers.Split(Regex(DIGITS), "isolated"),
      pre_tokenizers.Split(Regex(CJK), "isolated"),
      pre_tokenizers.Split(Regex(WORDS), "isolated"),
      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(texts, trainers.BpeTrainer(
      vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS.values()),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
  return Tokenizer(backend.to_str(), name="trained tokenizer", vocab_size=vocab_size)


class NewlineSplit:
  """Random cut of tokens that combine punctuation and line breaks (report section 4.1).

  The table of such tokens is computed once: token -> ids of its punctuation, then of its line
  breaks, each encoded alone. The text of a sequence stays the same.
  """

  def __init__(self, tokenizer: Tokenizer):
    self.parts: dict[int, np.ndarray] = {}
    for i, data in enumerate(tokenizer._bytes):
      if tokenizer.token_bytes_V[i] < 2 or data[-1] not in b"\r\n":
        continue
      text = tokenizer.decode([i])
      body = text.rstrip("\r\n")
      if body != text and _is_punctuation(body):
        halves = tokenizer.encode(body) + tokenizer.encode(text[len(body):])
        self.parts[i] = np.asarray(halves, np.int32)
    self._combined_V = np.zeros(tokenizer.vocab_size, bool)
    self._combined_V[list(self.parts)] = True

  def __call__(self, tokens: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Cuts each combined token of `tokens` (int32 [n]) with probability `rate`."""
    at = np.flatnonzero(self._combined_V[tokens])
    at = at[rng.random(len(at)) < rate]
    if not len(at):
      return tokens
    pieces, start = [], 0
    for i in at.tolist():
      pieces += [tokens[start:i], self.parts[int(tokens[i])]]
      start = i + 1
    return np.concatenate(pieces + [tokens[start:]])


def _is_punctuation(text: str) -> bool:
  """Whether `text` is an optional space followed by punctuation and symbols alone."""
  text = text.removeprefix(" ")
  return bool(text) and all(unicodedata.category(c)[0] in "PS" for c in text)


def _parts(pre_tokenizer: dict | None) -> list[dict]:
  if pre_tokenizer is None:
    return []
  return pre_tokenizer.get("pretokenizers", [pre_tokenizer])


def _byte_alphabet() -> dict[int, str]:
  """The printable character by which byte-level BPE spells each byte (GPT-2's table).

  Printable Latin-1 characters stand for themselves; the others take U+0100, U+0101, ... in order.
  """
  printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [b for b in range(256) if b not in printable]
  return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}
