"""Rejection sampling: which of the experts' answers are learnt, and what is mixed in (report 5.1).

Each answer passes filters in this order, and the first one that it does not pass counts it:

| counted as | the answer |
|---|---|
| `cut_off` | did not come to its end |
| `wrong` | has less than full marks of the problem's rewards, `format` apart |
| `form` | has not the form that the reward `format` asks for |
| `long` | has more tokens than `distill.longest` |
| `repeated` | says what another answer to the problem says word for word |
| `spare` | passes, but others of its problem are taken (`distill.keep`, `distill.prefer`) |
| `kept` | is learnt |

What is learnt of a kept answer says `distill.samples`:

| sample | asked | answer |
|---|---|---|
| `short` | the problem | the problem's own worked solution (the report's original response) |
| `long` | the problem, the system's text asks for reflection | the expert's |
| `absorbed` | the problem | the expert's |

Nothing here needs a model.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax import config
from dsv3_jax.posttrain import messages, rewards
from dsv3_jax.posttrain.messages import Conversation
from dsv3_jax.posttrain.problems import Problem

COUNTS = ("cut_off", "wrong", "form", "long", "repeated", "spare", "kept")


class Answer(NamedTuple):
  """What an expert wrote, judged.

  Attributes:
    problem: its id.
    text: without the end token.
    tokens: their number.
    ended: whether it came to its end.
    right, formed: what the rewards say.
    why: in words.
  """

  problem: str
  text: str
  tokens: int
  ended: bool
  right: bool
  formed: bool
  why: str = ""


class Drawn(NamedTuple):
  """An answer before it is judged; `Answer`'s fields."""

  text: str
  tokens: int
  ended: bool


class Taught(NamedTuple):
  """A conversation to learn from.

  Attributes:
    expert: number of the expert that knows it; -1: none, it is mixed in or the problem's own.
    kind: of `config.SAMPLES`, or "other".
    conversation: what is learnt.
  """

  expert: int
  kind: str
  conversation: Conversation


def conversation(problem: Problem, answer: str, reflect: bool) -> Conversation:
  """A question, with the system's request for reflection or without, and an answer."""
  system = messages.REFLECTION if reflect else ""
  answered = dataclasses.replace(problem, worked_long=answer)
  return messages.from_problems([answered], "long", system)[0]


def asked(problem: Problem, reflect: bool) -> Conversation:
  """What an expert is asked."""
  return conversation(problem, "?", reflect)[:-1]


def judge(problems: Sequence[Problem], drawn: Sequence[Drawn]) -> list[Answer]:
  """Answers with their judgements, one for each problem.

  The form is judged apart from the rest, so that the report can say which of them failed; a problem
  that has no reward but `format` is right where that is.
  """
  texts = [d.text for d in drawn]
  plain = [dataclasses.replace(p, reward=tuple(r for r in p.reward if r[0] != "format") or p.reward)
           for p in problems]
  formal = [dataclasses.replace(p, reward=(("format", 1.0),)) for p in problems]
  return [Answer(p.id, *d, right=s.value >= 1, formed=f.value >= 1, why=s.why or f.why)
          for p, d, s, f in zip(problems, drawn, rewards.score(plain, texts),
                                rewards.score(formal, texts), strict=True)]


def choose(answers: Iterable[Answer], cfg: config.Distill
           ) -> tuple[list[Answer], collections.Counter[str]]:
  """The answers of one expert that are learnt, problem by problem; and how many of all were COUNTS.

  Args:
    answers: in the order in which they were drawn.
    cfg: the filters.
  """
  counts: collections.Counter[str] = collections.Counter()
  passed: dict[str, list[Answer]] = {}
  longest = cfg.longest or cfg.new_tokens
  for answer in answers:
    others = passed.setdefault(answer.problem, [])
    failed = ("cut_off" if not answer.ended else
              "wrong" if not answer.right else
              "form" if cfg.format and not answer.formed else
              "long" if answer.tokens > longest else
              "repeated" if any(answer.text == other.text for other in others) else "")
    if failed:
      counts[failed] += 1
    else:
      others.append(answer)
  kept = []
  for of in passed.values():
    if cfg.prefer == "shortest":
      of = sorted(of, key=lambda answer: answer.tokens)  # equal ones stay in their order
    kept += of[:cfg.keep]
    counts["kept"] += len(of[:cfg.keep])
    counts["spare"] += len(of[cfg.keep:])
  return kept, counts


def samples(problems: Sequence[Problem], kept: Sequence[Answer], cfg: config.Distill, expert: int
            ) -> list[Taught]:
  """Conversations of an expert's problems, in the order of `cfg.samples`.

  Args:
    problems: that the expert was asked.
    kept: of `choose`. A problem without any has no sample of any kind: the two kinds are of the
      same problems, as in the report.
    cfg: which samples.
    expert: its number.
  """
  by_id = {p.id: p for p in problems}
  found = []
  for kind in cfg.samples:
    if kind == "short":
      own = [by_id[i] for i in dict.fromkeys(a.problem for a in kept) if by_id[i].worked.strip()]
      found += [Taught(-1, kind, c) for c in messages.from_problems(own, "short")]
    else:
      found += [Taught(expert, kind, conversation(by_id[a.problem], a.text, kind == "long"))
                for a in kept]
  return found


def as_asked(taught: Taught, reflect: bool) -> Conversation:
  """The conversation as the expert wrote its answer: what is learnt may be asked otherwise."""
  system = [m["content"] for m in taught.conversation if m["role"] == "system"]
  if taught.kind == "long":
    system = [text for text in system[0].removesuffix(messages.REFLECTION).split("\n\n") if text]
  if reflect:
    system.append(messages.REFLECTION)
  turns = [m for m in taught.conversation if m["role"] != "system"]
  return [*([{"role": "system", "content": "\n\n".join(system)}] if system else []), *turns]


def distinct(taught: Iterable[Taught]) -> list[Taught]:
  """Without conversations that were there before, word for word: experts may agree."""
  found: dict[tuple[tuple[str, str], ...], Taught] = {}
  for t in taught:
    key = tuple((m["role"], m["content"]) for m in t.conversation)
    if found.setdefault(key, t).expert < 0 <= t.expert:
      found[key] = t  # an expert's, whose probabilities can be had
  return list(found.values())


def mixed(taught: Sequence[Taught], others: Sequence[Conversation], share: float, seed: int
          ) -> list[Taught]:
  """The samples and, behind them, other conversations: `share` of the whole, or all there are.

  Args:
    taught: of `samples`.
    others: of which some are drawn, none twice.
    share: from 0 to below 1.
    seed: which.
  """
  wanted = round(len(taught) * share / (1 - share))
  order = np.random.default_rng([seed, 2]).permutation(len(others))[:wanted]
  return [*taught, *(Taught(-1, "other", others[i]) for i in order)]


def told(problems: Sequence[Problem], answers: Sequence[Answer], kept: Sequence[Answer],
         counts: dict[str, int]) -> dict[str, Any]:
  """An expert's part of the report: plain values."""
  mean = lambda found: sum(a.tokens for a in found) / len(found) if found else 0.0
  return {"problems": len(problems), "answered": len({a.problem for a in kept}),
          "answers": {name: counts.get(name, 0) for name in COUNTS},
          "tokens_drawn": mean(answers), "tokens_kept": mean(kept)}
