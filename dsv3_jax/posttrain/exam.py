"""What a trained model makes of problems that no training has seen."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from dsv3_jax import config, files
from dsv3_jax.posttrain import rewards, tasks
from dsv3_jax.posttrain.problems import Problem

NAME = "exam.json"
_ROWS = 32  # answers that are written at once


def check(cfg: config.Exam) -> None:
  """Raises ConfigError for problems that there are not, before a run."""
  tasks.named(cfg.problems, 0, "exam.problems", "test")


def take(cfg: config.Exam, workdir: str, seed: int) -> dict[str, Any]:
  """Has the newest model of a run answer the test problems; writes WORKDIR/exam.json.

  An exam that was taken with these settings is not taken again.

  Args:
    cfg: the problems, and how answers are written.
    workdir: of a finished run.
    seed: of the problems.

  Returns:
    What is in the file: "exam" (settings), "parts" (of "FAMILY:LEVEL": problems, solved, the share
    with its standard error, mean tokens of an answer, share cut off), "solved" of all, "answers".
  """
  path, asked = Path(workdir) / NAME, json.loads(json.dumps(config.to_dict(cfg)))
  if path.is_file():
    known = json.loads(path.read_text(encoding="utf-8"))
    if known["exam"] == asked:
      return known
  from dsv3_jax import trained
  from dsv3_jax.data import chat
  from dsv3_jax.infer.sampler import Sampling

  problems = tasks.named(cfg.problems, seed, "exam.problems", "test")
  generator, tokenizer, _ = trained.load(workdir)
  done = []
  for at in range(0, len(problems), _ROWS):
    some = problems[at:at + _ROWS]
    done += generator([chat.prompt(p.messages, tokenizer) for p in some], cfg.new_tokens,
                      [Sampling(cfg.temperature, seed=at + i) for i in range(len(some))],
                      stop=(tokenizer.eos,))
  texts = [tokenizer.decode(d.tokens) for d in done]
  found = summary(problems, texts, [len(d.tokens) for d in done],
                  [d.finish == "stop" for d in done])
  found = {"exam": asked, **found}
  files.write_atomic(path, json.dumps(found, indent=1) + "\n")
  return found


def summary(problems: list[Problem], texts: list[str], lengths: list[int], ended: list[bool]
            ) -> dict[str, Any]:
  """Accuracy by family and level; solved is a score of 1 of an answer that came to its end."""
  scores = rewards.score(problems, texts)
  right = [s.value >= 1 and end for s, end in zip(scores, ended, strict=True)]
  members: dict[str, list[int]] = defaultdict(list)
  for i, problem in enumerate(problems):
    members[f"{problem.family}:{problem.level}"].append(i)
  mean = lambda values: sum(values) / len(values)
  parts = {}
  for name, of in members.items():
    share = mean([right[i] for i in of])
    parts[name] = {
        "problems": len(of), "solved": share, "error": math.sqrt(share * (1 - share) / len(of)),
        "length": mean([lengths[i] for i in of]), "cut_off": 1 - mean([ended[i] for i in of])}
  return {"parts": parts, "solved": mean(right), "length": mean(lengths), "answers": [
      {"id": p.id, "prompt": p.prompt, "answer": p.answer, "text": t, "solved": r, "why": s.why}
      for p, t, r, s in zip(problems, texts, right, scores, strict=True)]}
