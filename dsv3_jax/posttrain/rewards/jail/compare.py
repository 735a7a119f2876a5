"""The process in which math-verify compares: pairs in, a line each out.

It is limited in memory and refused sockets, new processes and signals, but it is no sandbox: what
it reads is parsed as mathematics, not run. Whoever started it kills it when it takes too long.
"""

import json
import logging
import os
import resource
import sys

from . import kernel

_MEMORY = 2 << 30


def main() -> None:
  out = os.fdopen(os.dup(1), "w", encoding="utf-8")
  os.dup2(2, 1)  # whatever prints does not answer
  from math_verify import LatexExtractionConfig, parse, verify

  logging.disable(logging.CRITICAL)
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  try:
    kernel.no_new_privileges()
    kernel.filter_calls(alone=True)
  except OSError:  # it stands without, too
    pass
  config = [LatexExtractionConfig()]

  def read(text: str):
    return parse(f"${text}$", config, parsing_timeout=3)

  def compare(wanted: str, text: str) -> str:
    gold = read(wanted)
    if not gold:
      return "the problem's own answer is not readable as mathematics"
    found = read(text)
    if not found:
      return "the box is not readable as mathematics"
    return "right" if verify(gold, found, timeout_seconds=3) else f"not equal to {wanted[:60]!r}"

  print("ready", file=out, flush=True)
  for line in sys.stdin:
    wanted, text = json.loads(line)
    try:
      said = compare(wanted, text)
    except Exception as error:
      said = f"not comparable ({type(error).__name__})"
    print(" ".join(said.split()), file=out, flush=True)
