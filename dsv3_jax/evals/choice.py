"""Multiple choice by perplexity: the choice that the model finds likeliest is its answer.

accuracy takes the highest log-probability, which favours short choices; normalised accuracy the
highest one per UTF-8 byte of the choice (the delimiter not counted), whatever the tokenizer. How
question and choices become tokens is told in `pairs`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.evals import pairs, spread
from dsv3_jax.evals.tasks import Choice
from dsv3_jax.infer import score
from dsv3_jax.infer.generate import Generator


def measure(generator: Generator, tokenizer: Any, records: Sequence[Choice], window: int,
            rows: int = 8, say: Callable[[int, int], Any] = lambda done, all: None
            ) -> list[dict[str, Any]]:
  """Asks each question.

  Args:
    generator: has the model.
    tokenizer: `data.tokenizer.Tokenizer`.
    records: the questions.
    window: tokens that the model sees at once; a longer question loses its beginning.
    rows: choices in one pass.
    say: called with the number of choices scored, and of all.

  Returns:
    For each record: name, task, kind, answer; logprobs (nats), bytes and tokens of each choice;
    chosen and chosen_normalised (indices, the first of equals); correct and correct_normalised.

  Raises:
    ConfigError: a choice that is as long as the window.
  """
  asked = []
  for record in records:
    texts = [record.delimiter + choice for choice in record.choices]
    context, rests = pairs.encode(tokenizer, record.question, texts)
    context = pairs.fit(context, max(map(len, rests)), window, record.name)
    asked += [(context, rest) for rest in rests]
  scores = iter(score.score(generator, asked, rows, lambda done: say(done, len(asked))))
  found = []
  for record in records:
    own = [next(scores) for _ in record.choices]
    logprobs = [sum(s.logprobs) for s in own]
    sizes = [len(choice.encode()) for choice in record.choices]
    plain = int(np.argmax(logprobs))
    normalised = int(np.argmax(np.array(logprobs) / sizes))
    found.append({"name": record.name, "task": record.task, "kind": "choice",
                  "answer": record.answer, "logprobs": logprobs, "bytes": sizes,
                  "tokens": [len(s.logprobs) for s in own], "chosen": plain,
                  "chosen_normalised": normalised, "correct": plain == record.answer,
                  "correct_normalised": normalised == record.answer})
  return found


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """records, accuracy, accuracy_normalised, each with its standard error (.._error), and chance:
  what guessing gives."""
  accuracy, error = spread.mean([f["correct"] for f in found])
  normalised, normalised_error = spread.mean([f["correct_normalised"] for f in found])
  return {"kind": "choice", "records": len(found), "accuracy": accuracy, "accuracy_error": error,
          "accuracy_normalised": normalised, "accuracy_normalised_error": normalised_error,
          "chance": spread.mean([1 / len(f["logprobs"]) for f in found])[0]}
