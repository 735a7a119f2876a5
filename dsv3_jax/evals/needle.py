"""Needle in a haystack: a value told once in a long text, and asked for at the end of it.

A haystack of L tokens is, by construction,

    bos | filler ... | The magic number of zofami is 48213. | ... filler | The magic number of zofami is

and its answer, " 48213", which counts among the L. Key, value and stretch of filler are drawn with
a seed; the haystacks of one number have one key and value, and those of one length differ by depth
alone (what stands where), while a longer one has more filler before: so depths and lengths compare
like with like, and models with one tokenizer see the very same ones. The needle lies between two
lines of the filler, at the border nearest to `depth` times the filler's tokens: 0 is the beginning,
1 right before the question. Parts are tokenised apart, which at the end of a line is how the whole
would be; the stretch begins within a line where it must, as windows of training do.

Three measures, from hard to soft:

    recall   the greedily written text begins with the value (and no letter or digit follows it)
    forced   each token of the value is the likeliest given those before it
    bits     -log2 of the value's probability; five random digits are 16.5 bits to whom the needle
             says nothing, one of n given words log2(n). `gain`: how many fewer than after the
             question alone

The first two differ only where a value is written in other tokens. Bits still tell models apart
that never recall anything.
"""  # noqa: E501

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.evals import generation, pairs, spread
from dsv3_jax.infer import score
from dsv3_jax.infer.generate import Generator

TEMPLATE = "The magic number of {key} is {value}.\n"
DIGITS = 5
LONGEST = 64  # tokens of a line of filler; longer ones are cut
_LINE = re.compile(r"[^\n]*\n(?:[^\S\n]*\n)*")
_SUBJECTS = ("The old bridge", "A grey heron", "The baker's cart", "Rain from the west",
             "The night train", "A narrow path", "The harbour light", "Someone's bicycle",
             "The orchard wall", "A flock of starlings", "The village clock", "A little smoke")
_VERBS = ("waits beside", "passes", "can be seen from", "leads away from", "comes slowly towards",
          "stands a little above", "is forgotten near", "moves along")
_OBJECTS = ("the river", "the market square", "a field of barley", "the empty school",
            "the edge of the forest", "the stone steps", "the mill", "a row of poplars",
            "the ferry landing", "the last houses")


@dataclasses.dataclass(frozen=True)
class Haystack:
  """One question.

  Attributes:
    length: tokens of prompt and answer.
    depth: asked for.
    place: share of the filler's tokens before the needle.
    number: from 0, among those of one length and depth.
    key, value: of the needle.
    prompt, answer: token ids.
    question: ids of the question, the end of `prompt`.
  """

  length: int
  depth: float
  place: float
  number: int
  key: str
  value: str
  prompt: list[int]
  answer: list[int]
  question: list[int]


def plain_filler() -> str:
  """Sentences that say nothing, one a line: the filler where none is given."""
  every = [f"{s} {v} {o}.\n" for s in _SUBJECTS for v in _VERBS for o in _OBJECTS]
  return "".join(every[i] for i in np.random.default_rng(0).permutation(len(every)))


class Filler:
  """Text to hide a needle in, as lines of token ids.

  Args:
    tokenizer: `data.tokenizer.Tokenizer`.
    texts: documents; (): `plain_filler`.

  Raises:
    ConfigError: texts without a token.
  """

  def __init__(self, tokenizer: Any, texts: Sequence[str] = ()):
    self.tokenizer = tokenizer
    lines = [line for text in texts or (plain_filler(),)
             for line in _LINE.findall(text if text.endswith("\n") else text + "\n")]
    self.lines = [ids[at:at + LONGEST] for ids in tokenizer.encode_batch(lines)
                  for at in range(0, len(ids), LONGEST)]
    if not self.lines:
      raise ConfigError("the filler has no text; give another")

  def stretch(self, tokens: int, rng: np.random.Generator) -> list[list[int]]:
    """Lines that follow each other and have `tokens` in all, the first cut at its left; at the
    filler's end it begins again."""
    at, found = int(rng.integers(len(self.lines))), []
    while tokens > 0:
      found.append(self.lines[at % len(self.lines)][-tokens:])
      tokens -= len(found[-1])
      at -= 1
    return found[::-1]


def make(filler: Filler, length: int, depths: Sequence[float], number: int = 0, seed: int = 0,
         template: str = TEMPLATE, digits: int = DIGITS, values: Sequence[str] = (),
         keys: Sequence[str] = ()) -> list[Haystack]:
  """Haystacks that differ by depth alone.

  Args:
    filler: what to hide the needle in.
    length: L.
    depths: from 0 to 1.
    number, seed: choose key, value and filler.
    template: the needle, with {key} and, later, {value}; the question is what stands before
      {value}.
    digits: of the value.
    values, keys: words of which value and key are one instead, for models that cannot copy
      numbers, or read a word that they never saw.

  Raises:
    ConfigError: a template without its two names in that order, a depth that is none, or a length
      that leaves no room for filler.
  """
  check(template, depths, digits, values, keys)
  tokenizer, rng = filler.tokenizer, np.random.default_rng([seed, number])
  letters = zip(rng.choice(list("bdfgklmnprstvz"), 3), rng.choice(list("aeiou"), 3), strict=True)
  key = str(rng.choice(keys)) if keys else "".join(c for pair in letters for c in pair)
  value = str(rng.choice(values) if values else rng.integers(10**(digits - 1), 10**digits))
  text = template.replace("{key}", key)
  asked, _, after = text.partition("{value}")
  needle = tokenizer.encode(f"{asked}{value}{after}".rstrip("\n") + "\n")
  # A space before the value is part of the answer's first token.
  context, (answer,) = pairs.encode(tokenizer, asked.rstrip(" "),
                                    [asked[len(asked.rstrip(" ")):] + value])
  question = context[1:]
  room = length - 1 - len(needle) - len(question) - len(answer)
  if room < 1:
    raise ConfigError(f"a haystack of {length} tokens has no room: needle, question and answer "
                      f"take {length - room}; make it longer")
  lines = filler.stretch(room, rng)
  border = np.cumsum([0, *map(len, lines)])
  found = []
  for depth in depths:
    at = int(np.abs(border - depth * room).argmin())
    before, behind = (sum(part, []) for part in (lines[:at], lines[at:]))
    found.append(Haystack(length, depth, len(before) / room, number, key, value,
                          [tokenizer.bos, *before, *needle, *behind, *question], answer, question))
  return found


def check(template: str, depths: Sequence[float], digits: int = DIGITS,
          values: Sequence[str] = (), keys: Sequence[str] = ()) -> None:
  """Errors of `make` that do not depend on a tokenizer."""
  key, value = template.find("{key}"), template.find("{value}")
  if not 0 <= key < value:
    raise ConfigError(f"the needle {template!r} must have {{key}} and after it {{value}}, as "
                      f"{TEMPLATE!r} has")
  if not depths or not all(0 <= depth <= 1 for depth in depths):
    raise ConfigError(f"depths {', '.join(f'{d:g}' for d in depths)}: each must be from 0 (the "
                      "beginning) to 1 (the end)")
  if not 1 <= digits <= 18:
    raise ConfigError(f"{digits} digits; a value has from 1 to 18")
  for name, words in (("values", values), ("keys", keys)):
    if words and (len(set(words)) < 2 or not all(w.strip() == w != "" for w in words)):
      raise ConfigError(f"{name} {', '.join(map(repr, words))}: give two or more, without space "
                        "around them")


def measure(generator: Generator, tokenizer: Any, haystacks: Sequence[Haystack], rows: int = 8,
            say: Callable[[int, int], Any] = lambda done, all: None) -> list[dict[str, Any]]:
  """Asks a model for the values.

  Args:
    generator: has the model.
    tokenizer: that of the haystacks.
    haystacks: of `make`.
    rows: haystacks in one pass.
    say: called with the number of passes' haystacks done, and of all: two passes each.

  Returns:
    For each: length, depth, place, number, key, value; text (what was written), recall, forced,
    bits, gain, and ranks: how many tokens were likelier than each of the answer's.
  """
  every = 2 * len(haystacks)
  alone = {(tuple(h.question), tuple(h.answer)): 0.0 for h in haystacks}
  scores = score.score(generator, [([tokenizer.bos, *q], a) for q, a in alone], rows)
  for pair, own in zip(alone, scores, strict=True):
    alone[pair] = _bits(own)
  scores = score.score(generator, [(h.prompt, h.answer) for h in haystacks], rows,
                       lambda done: say(done, every))
  # A byte a token at worst, one before them, and one more to see what follows.
  jobs = [generation.Job(h.prompt, len(h.value.encode()) + 2) for h in haystacks]
  texts = generation.write(generator, tokenizer, jobs, rows,
                           lambda done, _: say(len(haystacks) + done, every))
  found = []
  for h, own, written in zip(haystacks, scores, texts, strict=True):
    bits = _bits(own)
    found.append({"length": h.length, "depth": h.depth, "place": h.place, "number": h.number,
                  "key": h.key, "value": h.value, "text": written.text,
                  "recall": recalled(tokenizer.decode(h.answer), written.text),
                  "forced": own.greedy, "bits": bits, "ranks": own.ranks,
                  "gain": alone[tuple(h.question), tuple(h.answer)] - bits})
  return found


def recalled(answer: str, text: str) -> bool:
  """Whether a text begins with the answer, and no letter or digit follows it; space at the
  beginning does not count."""
  return bool(re.match(rf"{re.escape(answer.strip())}(?!\w)", text.lstrip()))


def _bits(own: score.Score) -> float:
  return -sum(own.logprobs) / math.log(2)


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Means over needles: of each cell [length][depth], of each length with standard error, of all.

  The error of a length is over its numbers, which are independent; their depths are not.
  """
  lengths = sorted({f["length"] for f in found})
  depths = sorted({f["depth"] for f in found})
  numbers = sorted({f["number"] for f in found})
  mean = lambda key, **at: spread.mean([
      f[key] for f in found if all(f[name] == value for name, value in at.items())])[0]
  names = ("recall", "forced", "bits", "gain")
  grid = {name: [[mean(name, length=x, depth=y) for y in depths] for x in lengths]
          for name in names}
  by_length = []
  for x in lengths:
    each = {name: spread.mean([mean(name, length=x, number=n) for n in numbers]) for name in names}
    by_length.append({"length": x, **{name: m for name, (m, _) in each.items()},
                      **{f"{name}_error": e for name, (_, e) in each.items()}})
  return {"lengths": lengths, "depths": depths, "needles": len(numbers), "grid": grid,
          "by_length": by_length, **{name: mean(name) for name in names}}
