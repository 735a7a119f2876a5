"""Preferences: two answers to a question, one better. What a reward model is trained on.

A record of a JSONL file is a conversation that ends with the user's turn, or one question, and the
two answers:

    {"messages": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"}
    {"prompt": "2+2?", "chosen": "4", "rejected": "5", "reference": "4",
     "chosen_thought": "2+2 is 4. It says 4.", "rejected_thought": "2+2 is 4. It says 5."}

| field | |
|---|---|
| `messages` | a system's turn or none, then user and assistant in turns, the user last |
| `prompt`, `system` | in place of it: a user's turn, and the system's text |
| `chosen`, `rejected` | the better and the worse answer, text |
| `chosen_thought`, `rejected_thought` | what leads to the reward (report 5.2), both or none |
| `reference` | the right answer, where there is one: a judge is shown it |
| `id` | whatever you like |

A key beyond these is an error. A thought says why an answer is good or bad and has no verdict: that
is put behind it.

Preferences are also made from problems, whose rule rewards say which answer is right: worked
solutions against corrupted ones (`from_problems`), or a policy's own right and wrong answers
(`from_answers`), which are the mistakes that a reward model will have to see.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import jsonl, messages, rewards
from dsv3_jax.posttrain.messages import Conversation
from dsv3_jax.posttrain.problems import Problem, Score
from dsv3_jax.posttrain.rewards import final, models

_TEXTS = ("chosen", "rejected", "chosen_thought", "rejected_thought", "reference")
_TRIES = 20  # corruptions of one solution before it is given up
_WRONG = 0.5  # a wrong answer's most reward; a right one has 1
_CHARACTER = re.compile(r"\w")
# After an answer, where a score is read after a thought.
ASK = "Is this answer good? Think first, then end with a verdict."


@dataclasses.dataclass(frozen=True)
class Preference:
  """A question with a better and a worse answer.

  Attributes:
    messages: the conversation, the user's turn last.
    chosen, rejected: the better and the worse answer.
    chosen_thought, rejected_thought: about each answer; "" without.
    reference: the right answer or "".
  """

  messages: Conversation
  chosen: str
  rejected: str
  chosen_thought: str = ""
  rejected_thought: str = ""
  reference: str = ""

  @property
  def problem(self) -> Problem:
    """The question as a judge is asked it, earlier turns told in the prompt."""
    first = self.messages[0]
    system, turns = ((first["content"], self.messages[1:]) if first["role"] == "system" else
                     ("", self.messages))
    told = "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in turns)
    return Problem("", turns[0]["content"] if len(turns) == 1 else told, self.reference,
                   system=system)


def read(path: str | Path) -> list[Preference]:
  """Preferences of a .jsonl, .jsonl.gz or .jsonl.zst file.

  Raises:
    ConfigError: as of `jsonl.read` and `check`, with file and line.
  """
  return jsonl.read(path, _preference)


def write(path: str | Path, preferences: Iterable[Preference]) -> Path:
  """Writes preferences as `messages`; errors as of `check` and `jsonl.write`."""
  records = []
  for preference in preferences:
    record = dataclasses.asdict(check(preference))
    records.append({k: v for k, v in record.items() if v or k in ("messages", *_TEXTS[:2])})
  return jsonl.write(path, records)


def _preference(record: dict[str, Any]) -> Preference:
  alone = "messages" not in record
  jsonl.known(record, (*(("prompt", "system") if alone else ("messages",)), *_TEXTS, "id"))
  for name in (("prompt",) if alone else ()) + _TEXTS[:2]:
    if name not in record:
      raise ConfigError("a record needs messages or prompt, chosen and rejected; it has "
                        f"{', '.join(record) or 'nothing'}")
  for name in ("prompt", "system") if alone else ():
    jsonl.text(record.get(name, ""), name)
  turns = record.get("messages")
  if alone:
    told = ("system", record.get("system")), ("user", record["prompt"])
    turns = [{"role": role, "content": text} for role, text in told if text]
  return check(Preference(turns, **{name: record[name] for name in _TEXTS if name in record}))


def check(preference: Preference) -> Preference:
  """The preference, if there is something to learn from it.

  Raises:
    ConfigError: names what is wrong: messages that are no conversation up to the user's turn, text
      that is none, a chosen answer that is empty or the same as the rejected one, one thought
      alone, or one with a verdict.
  """
  for name in _TEXTS:
    jsonl.text(getattr(preference, name), name)
  turns = preference.messages
  if isinstance(turns, list) and turns and isinstance(turns[-1], dict) and (
      turns[-1].get("role") == "assistant"):
    raise ConfigError(f"messages[{len(turns) - 1}].role='assistant': the last turn must be the "
                      "user's; the answers are chosen and rejected")
  if not isinstance(turns, list) or not turns:
    raise ConfigError("messages (or prompt) must have at least the user's turn")
  if not preference.chosen.strip():
    raise ConfigError("chosen is empty; the better answer must have text")
  messages.check([*turns, {"role": "assistant", "content": preference.chosen}])
  if preference.chosen.strip() == preference.rejected.strip():
    raise ConfigError("chosen and rejected are the same; there is nothing to prefer")
  thoughts = preference.chosen_thought, preference.rejected_thought
  if any(thoughts):
    for name, thought in zip(_TEXTS[2:4], thoughts, strict=True):
      try:
        models.verdict(thought, True)
      except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
  return preference


def split(preferences: Sequence[Preference], fraction: float
          ) -> tuple[list[Preference], list[Preference]]:
  """(to train on, held out), by a hash of the question: its pairs are all on one side."""
  kept, held = [], []
  for preference in preferences:
    text = json.dumps(preference.messages, sort_keys=True).encode()
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    (held if number < fraction * 2**64 else kept).append(preference)
  return kept, held


def answered(preference: Preference, chosen: bool, thought: bool) -> Conversation:
  """The conversation that ends with one of the answers, or with the thought and verdict on it."""
  answer, why = ((preference.chosen, preference.chosen_thought) if chosen else
                 (preference.rejected, preference.rejected_thought))
  found = [*preference.messages, {"role": "assistant", "content": answer}]
  if not thought:
    return found
  return [*found, {"role": "user", "content": ASK},
          {"role": "assistant", "content": models.verdict(why, chosen)}]


def judgements(preferences: Iterable[Preference]) -> list[Conversation]:
  """Both answers of each as conversations with a judge (`rewards.models`), to fine-tune on.

  With a reference the question is whether the answer says the same, as "judge" asks; without one,
  whether the answer is good, as "vote" does.

  Raises:
    ConfigError: one has no thoughts.
  """
  found = []
  for number, preference in enumerate(preferences):
    problem = preference.problem
    if not preference.chosen_thought:
      raise ConfigError(f"preference {number} has no thoughts (chosen_thought, rejected_thought), "
                        "and a judge writes one before its verdict; give them, or train "
                        "reward.form='score'")
    for answer, why, yes in ((preference.chosen, preference.chosen_thought, True),
                             (preference.rejected, preference.rejected_thought, False)):
      found.append([{"role": "user", "content": models.asked(problem, answer)},
                    {"role": "assistant", "content": models.verdict(why, yes)}])
  return found


# --- from problems


def from_problems(problems: Sequence[Problem], seed: int, steps: bool = False) -> list[Preference]:
  """Worked solutions, each against a corrupted copy; those that cannot be corrupted are left out.

  Args:
    problems: with `worked`, and rule rewards that say right and wrong.
    seed: of the corruptions.
    steps: thoughts work the problem anew, where no reference is shown.

  Raises:
    ConfigError: a problem has no worked solution.
  """
  found, wrong = [], [corrupted(p, seed) for p in problems]
  judged = rewards.score(problems, [w or "" for w in wrong])
  for problem, text, score in zip(problems, wrong, judged, strict=True):
    if text is not None and score.value < _WRONG:
      found.append(_pair(problem, problem.worked, text, steps))
  return found


def corrupted(problem: Problem, seed: int) -> str | None:
  """The worked solution with another result: a digit (or letter) of the box is another one, and in
  half of them one of the steps' too. None where nothing can be changed.
  """
  if not problem.worked.strip():
    raise ConfigError(f"the problem {problem.id} has no worked solution to corrupt")
  digest = hashlib.sha256(f"{seed}/{problem.id}/{problem.prompt}".encode()).digest()
  rng = np.random.default_rng(list(digest))
  begin = problem.worked.rfind("\\boxed{")
  begin = 0 if begin < 0 else begin + len("\\boxed{")
  steps, box = problem.worked[:begin], problem.worked[begin:]
  for _ in range(_TRIES):
    text = _changed(box, rng)
    if text is not None and final.box(steps + text) != final.box(problem.worked):
      return ((_changed(steps, rng) or steps) if rng.random() < 0.5 else steps) + text
  return None


def _changed(text: str, rng: np.random.Generator) -> str | None:
  """One digit is another one; without digits, one letter or digit's place has another's of it."""
  body = text.removesuffix("\\boxed{")
  digits = [m.start() for m in re.finditer(r"[0-9]", body)]
  if digits:
    at = int(rng.choice(digits))
    return f"{text[:at]}{(int(text[at]) + int(rng.integers(1, 10))) % 10}{text[at + 1:]}"
  places = [m.start() for m in _CHARACTER.finditer(body)]
  others = [body[p] for p in places]
  if len(set(others)) < 2:
    return None
  at = int(rng.choice(places))
  other = str(rng.choice([c for c in others if c != text[at]]))
  return f"{text[:at]}{other}{text[at + 1:]}"


def from_answers(problems: Sequence[Problem], answers: Sequence[Sequence[str]],
                 steps: bool = False, scores: Sequence[Sequence[Score]] | None = None
                 ) -> list[Preference]:
  """Right against wrong answers of a policy: as many pairs a problem as its rarer side has.

  Args:
    problems: whose rule rewards judge.
    answers: of each problem, in any number; equal ones count once.
    steps: as of `from_problems`.
    scores: of the answers; judged here where None.
  """
  if scores is None:
    flat = rewards.score([p for p, of in zip(problems, answers, strict=True) for _ in of],
                         [a for of in answers for a in of])
    scores, at = [], 0
    for of in answers:
      scores.append(flat[at:at + len(of)])
      at += len(of)
  found = []
  for problem, of, judged in zip(problems, answers, scores, strict=True):
    values = dict(zip((a.strip() for a in of), (s.value for s in judged), strict=True))
    right = [a for a, v in values.items() if v >= 1 and a]
    wrong = [a for a, v in values.items() if v < _WRONG]
    found += [_pair(problem, a, b, steps) for a, b in zip(right, wrong, strict=False)]
  return found


def _pair(problem: Problem, right: str, wrong: str, steps: bool) -> Preference:
  """The thought names both results; a wrong answer may have none."""
  box = problem.worked.rfind("\\boxed{")
  anew = problem.worked[:max(box, 0)] if steps else ""
  said = [" ".join((final.box(final.part(a)) or "nothing").split())[:80] for a in (right, wrong)]
  thoughts = [f"{anew}It should be {problem.answer}. It says {text}." for text in said]
  return check(Preference(problem.messages, right, wrong, *thoughts, problem.answer))
