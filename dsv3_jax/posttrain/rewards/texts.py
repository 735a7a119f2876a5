"""Rewards that read an answer as text: exact, format, length."""

import re
from collections.abc import Sequence
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain.problems import Problem, Score
from dsv3_jax.posttrain.rewards import final
from dsv3_jax.posttrain.rewards.registry import register

# What only a template, a judge or a test run writes: an answer with it imitates one of them.
_MARKS = re.compile(
    r"<[|｜][^<>\n]{1,40}[|｜]>|^\W{0,4}(verdict|score|reward|grade|vote)\W{0,4}[:=]"
    r"|^(all )?\d* ?tests? passed", re.IGNORECASE | re.MULTILINE)


@register("exact")
def exact(problems: Sequence[Problem], answers: Sequence[str]) -> list[Score]:
  """1 where the last box (the whole final part, where there is no box) is the problem's answer.

  As text, but for white space, Unicode's compatible forms, a full stop, and dollar signs around it.
  """
  return [_exact(p, a) for p, a in zip(problems, answers, strict=True)]


def _exact(problem: Problem, answer: str) -> Score:
  text = final.part(answer, problem.prompt)
  found = final.box(text) if final.boxes(text) else text.strip() or None
  if found is None:
    return Score(0.0, "no answer")
  if final.normal(found) == final.normal(problem.answer):
    return Score(1.0)
  return Score(0.0, f"{_short(found)} is not {_short(problem.answer)}")


@register("format")
def form(problems: Sequence[Problem], answers: Sequence[str]) -> list[Score]:
  r"""1 where an answer has the required form.

  extra["format"] may say {"tags": ["think", "answer"], "box": true}, here with the defaults
  {"tags": [], "box": true}:
   - Each tag is opened and closed exactly once, in this order and one after another, with something
     in it; nothing but space comes before the first, between two of them, or after a last "answer".
     Thoughts are optional where "think" is not required, but then come once, first, and closed.
   - The final part, after the thoughts, is not empty. With "box" it has exactly one \boxed{...},
     which is not empty, and nothing follows but its sentence's or formula's end.
   - Nowhere stands what only a template, a judge or a test run writes (<|...|>, "score: 1.0").

  Raises:
    ConfigError: extra["format"] is something else.
  """
  return [_form(p, a) for p, a in zip(problems, answers, strict=True)]


def _form(problem: Problem, answer: str) -> Score:
  wanted = _settings(problem, "format", {"tags": list, "box": bool})
  tags, boxed = list(wanted.get("tags", [])), wanted.get("box", True)
  if "think" not in tags and ("<think>" in answer or "</think>" in answer):
    tags.insert(0, "think")
  if marks := _MARKS.search(answer):
    return Score(0.0, f"imitates a mark: {_short(marks.group())}")
  for tag in tags:
    for mark in (f"<{tag}>", f"</{tag}>"):
      if answer.count(mark) != 1:
        return Score(0.0, f"{mark} stands {answer.count(mark)} times, not once")
  rest = answer
  for i, tag in enumerate(tags):
    before, _, rest = rest.partition(f"<{tag}>")
    inside, closed, rest = rest.partition(f"</{tag}>")
    if not closed or not inside.strip():
      return Score(0.0, f"<{tag}> is empty, or not in its order")
    if before.strip():
      return Score(0.0, f"text before <{tag}>")
    if i == len(tags) - 1 and tag == "answer":
      if rest.strip():
        return Score(0.0, "text after </answer>")
      rest = inside
  if not rest.strip():
    return Score(0.0, "nothing after the thoughts")
  if boxed:
    found = final.boxes(rest)
    if len(found) != 1 or not found[0]:
      return Score(0.0, "an empty or open box" if len(found) == 1 else f"{len(found)} boxes, not 1")
    if re.search(r"[^\s.$)\]\\]", final.after_box(rest)):
      return Score(0.0, "text after the box")
  return Score(1.0)


@register("length")
def length(problems: Sequence[Problem], answers: Sequence[str]) -> list[Score]:
  """1 where an answer has extra["length"] = {"least": 1, "most": 4000} characters, both optional.

  Raises:
    ConfigError: extra["length"] is something else.
  """
  scores = []
  for problem, answer in zip(problems, answers, strict=True):
    wanted = _settings(problem, "length", {"least": int, "most": int})
    size, least, most = len(answer.strip()), wanted.get("least", 1), wanted.get("most")
    right = size >= least and (most is None or size <= most)
    scores.append(Score(1.0) if right else
                  Score(0.0, f"{size:,} characters, not {least:,} to {most or 'any'}"))
  return scores


def _settings(problem: Problem, name: str, kinds: dict[str, type]) -> dict[str, Any]:
  found = problem.extra.get(name, {})
  if not isinstance(found, dict) or any(
      not isinstance(value, kinds.get(key, ())) for key, value in found.items()):
    said = ", ".join(f"{key}: {kind.__name__}" for key, kind in kinds.items())
    raise ConfigError(f"problem {problem.id!r}: extra[{name!r}]={found!r} must be an object of "
                      f"{said}")
  return found


def _short(text: str) -> str:
  return repr(text if len(text) <= 60 else text[:57] + "...")
