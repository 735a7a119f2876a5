"""The part of an answer that is judged: after the thoughts, without echoes; its box, its code.

What stands in an answer is never trusted as a mark: a second box, a copied question that has one, a
thought that is not closed. One rule each, and where a rule finds nothing there is no answer.
"""

import re
import unicodedata

OPEN, CLOSE = "<think>", "</think>"
_BOX = re.compile(r"\\boxed\s*\{")
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)^[ \t]*```[ \t]*$", re.MULTILINE | re.DOTALL)


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

  An escaped brace is a character; the others must balance.
  """
  found = []
  for match in _BOX.finditer(text):
    depth, place = 1, match.end()
    while place < len(text) and depth:
      if text[place] == "\\":
        place += 1
      else:
        depth += {"{": 1, "}": -1}.get(text[place], 0)
      place += 1
    found.append((0, 0) if depth else (match.end(), place - 1))
  return found


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
  blocks = _FENCE.findall(text)
  if blocks:
    return blocks[-1][1]
  return None if "```" in text or not text.strip() else text


def normal(text: str) -> str:
  """For comparison as text: Unicode's compatible forms, one space for many, no dollar signs around
  it, no full stop at its end.
  """
  text = " ".join(unicodedata.normalize("NFKC", text).split())
  if len(text) > 2 and text[0] == text[-1] == "$":
    text = text[1:-1].strip()
  return text[:-1].rstrip() if len(text) > 1 and text.endswith(".") else text
