"""The part of an answer that is judged: after the thoughts, without echoes; its box, its code.

What stands in an answer is never trusted as a mark: a second box, a copied question that has one, a
thought that is not closed. One rule each, and where a rule finds nothing there is no answer.
"""

import re
import unicodedata

OPEN, CLOSE = "<think>", "</think>"
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def part(answer: str, prompt: str = "") -> str:
  """What follows the last closed thought, copies of the prompt cut out; "" in an open thought."""
  before, found, after = answer.rpartition(CLOSE)
  text = after if found else answer
  if OPEN in text:
    return ""
  # A copied question may bring its own box. Short ones, such as "2", are no copies.
  if len(prompt.strip()) >= 8:
    text = text.replace(prompt.strip(), " ")
  return text


def _spans(text: str) -> list[tuple[int, int]]:
  r"""Where the contents of each \boxed{...} begin and end; (0, 0) for one that is not closed.

  An escaped brace is a character; the others must balance. One pass, however hostile the text.
  """
  found: list[tuple[int, int]] = []
  opened: list[int] = []  # of each open brace: the number of its box, -1 where it has none
  for match in _BRACES.finditer(text):
    if match.group() == "}":
      number = opened.pop() if opened else -1
      if number >= 0:
        found[number] = found[number][1], match.start()
    elif match.group() == "{":
      opened.append(-1)
    elif match.group().startswith("\\boxed"):
      opened.append(len(found))
      found.append((0, match.end()))
  return [(begin, end) if begin else (0, 0) for begin, end in found]


def boxes(text: str) -> list[str | None]:
  r"""Contents of all \boxed{...} in the order of their beginnings; None: one that is not closed."""
  return [text[begin:end].strip() if end else None for begin, end in _spans(text)]


def box(text: str) -> str | None:
  """The last box's contents; None where there is none, or it is empty or not closed."""
  return (boxes(text) or [None])[-1] or None


def after_box(text: str) -> str:
  """What follows the last box; the whole text where there is none, or it is not closed."""
  end = (_spans(text) or [(0, 0)])[-1][1]
  return text[end + 1:] if end else text


def code(text: str) -> str | None:
  """The last closed block between ``` fences, else the whole text if it has no fence."""
  block: list[str] | None = None
  last = None
  for line in text.splitlines(keepends=True):
    if not line.lstrip().startswith("```"):
      if block is not None:
        block.append(line)
    elif block is None:
      block = []
    elif line.strip() == "```":
      last, block = "".join(block), None
  return last if "```" in text else text if text.strip() else None


def normal(text: str) -> str:
  """For comparison as text: Unicode's compatible forms, one space for many, no dollar signs around
  it, no full stop at its end.
  """
  text = " ".join(unicodedata.normalize("NFKC", text).split())
  if len(text) > 2 and text[0] == text[-1] == "$":
    text = text[1:-1].strip()
  return text[:-1].rstrip() if len(text) > 1 and text.endswith(".") else text
