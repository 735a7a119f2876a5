"""Written answers: exact match, and pass@k of samples.

A text is right if, normalised (`tasks`: what to ignore), it equals one of the answers, or by its
regex. A prompt is continued as it is: one that ends in a space asks for a token that goes on after
a lone space, which most tokenizers seldom produce within a text, so leave that to the answer.

pass@k is the chance that at least one of k samples is right. Of n samples with c right, the
unbiased estimate is 1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1); its mean over
records and the standard error of that are reported.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.evals import pairs, spread
from dsv3_jax.evals.tasks import Generation
from dsv3_jax.infer import sampler
from dsv3_jax.infer.generate import Generator
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.infer.text import Stream


@dataclasses.dataclass(frozen=True)
class Job:
  """One text to be written: token ids to continue, how far, strings that end it."""

  prompt: list[int]
  max_tokens: int
  stop: tuple[str, ...] = ()
  sampling: Sampling = sampler.GREEDY


@dataclasses.dataclass(frozen=True)
class Written:
  """What came of a job: the text before a stop string, its tokens, and "stop" or "length"."""

  text: str
  tokens: int
  finish: str


def write(generator: Generator, tokenizer: Any, jobs: Sequence[Job], rows: int = 8,
          say: Callable[[int, int], Any] = lambda done, all: None) -> list[Written]:
  """Writes texts, `rows` at a time, those of like length together; each ends with eos too."""
  V = generator.cfg.vocab_size
  bias_V = None
  if tokenizer.vocab_size < V:  # ids that pad the model's vocabulary stand for nothing
    bias_V = np.where(np.arange(V) < tokenizer.vocab_size, 0.0, -np.inf).astype(np.float32)
  found: list[Written | None] = [None] * len(jobs)
  order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i].prompt) - jobs[i].max_tokens)
  size = min(rows, len(jobs))
  for at in range(0, len(order), size):
    group = [jobs[i] for i in order[at:at + size]]
    full = group + [group[-1]] * (size - len(group))  # one more size would compile anew
    streams = [Stream(tokenizer.decode_bytes, job.stop) for job in full]
    counts = [0] * size

    def push(row: int, tokens: list[int], full=full, streams=streams, counts=counts) -> bool:
      tokens = tokens[:full[row].max_tokens - counts[row]]
      counts[row] += len(tokens)
      streams[row].push(tokens)
      return streams[row].ended or counts[row] == full[row].max_tokens

    # Whoever listens gets token after token, which costs a call of the compiled function each.
    listens = any(job.stop for job in group)
    done = generator([job.prompt for job in full], max(job.max_tokens for job in full),
                     [job.sampling for job in full], stop=(tokenizer.eos,), bias_V=bias_V,
                     on_tokens=push if listens else None)
    for row, i in enumerate(order[at:at + size]):
      if not listens:
        push(row, done[row].tokens)
      stream = streams[row]
      stream.close()
      ended = stream.ended or (done[row].finish == "stop" and counts[row] < full[row].max_tokens)
      found[i] = Written(stream.text, counts[row], "stop" if ended else "length")
    say(min(at + size, len(jobs)), len(jobs))
  return [w for w in found if w is not None]


def normalise(text: str, ignore: Sequence[str]) -> str:
  """Unicode's NFC, without what is to be ignored: case, then punctuation (Unicode's categories
  P..), then space at both ends, while other white space becomes one space."""
  text = unicodedata.normalize("NFC", text)
  if "case" in ignore:
    text = text.casefold()
  if "punctuation" in ignore:
    text = "".join(c for c in text if not unicodedata.category(c).startswith("P"))
  return " ".join(text.split()) if "space" in ignore else text


def correct(record: Generation, text: str) -> bool:
  """Whether a text is right."""
  if record.regex is not None:
    matches = list(re.finditer(record.regex, text))
    if not matches or not record.answers:
      return bool(matches)
    last = matches[-1]
    text = (last[1] or "") if last.re.groups else last[0]
  return normalise(text, record.ignore) in {normalise(a, record.ignore) for a in record.answers}


def pass_at(n: int, c: int, k: int) -> float:
  """Unbiased estimate of pass@k from n samples of which c are right; k <= n."""
  return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0


def measure(generator: Generator, tokenizer: Any, records: Sequence[Generation], window: int,
            samples: int = 1, sampling: Sampling = sampler.GREEDY, ks: Sequence[int] = (),
            rows: int = 8, say: Callable[[int, int], Any] = lambda done, all: None
            ) -> list[dict[str, Any]]:
  """Lets the model write.

  Args:
    generator: has the model.
    tokenizer: `data.tokenizer.Tokenizer`.
    records: what to write.
    window: tokens of prompt and answer together; a longer prompt loses its beginning.
    samples: n, texts of each record.
    sampling: how tokens are chosen; each sample's seed is made from this one's, the record's
      number and the sample's.
    ks: of pass@k; (): 1 and n.
    rows: texts at once.
    say: called with the number of texts done, and of all.

  Returns:
    For each record: name, task, kind; samples: text, tokens, finish, seed, correct of each; exact,
    the share of correct ones; pass_at: {"k": value}.

  Raises:
    ConfigError: several samples at temperature 0, a k above n, max_tokens that fill the window.
  """
  ks = check(samples, sampling.temperature, ks)
  jobs = []
  for i, record in enumerate(records):
    prompt = pairs.fit([tokenizer.bos, *tokenizer.encode(record.prompt)], record.max_tokens, window,
                       record.name)
    for j in range(samples):
      seed = int(np.random.SeedSequence([sampling.seed, i, j]).generate_state(1)[0])
      jobs.append(Job(prompt, record.max_tokens, record.stop,
                      dataclasses.replace(sampling, seed=seed)))
  written = iter(zip(jobs, write(generator, tokenizer, jobs, rows, say), strict=True))
  found = []
  for record in records:
    own = []
    for _ in range(samples):
      job, w = next(written)
      own.append({**dataclasses.asdict(w), "seed": job.sampling.seed,
                  "correct": correct(record, w.text)})
    right = sum(s["correct"] for s in own)
    found.append({"name": record.name, "task": record.task, "kind": "generation", "samples": own,
                  "exact": right / samples,
                  "pass_at": {str(k): pass_at(samples, right, k) for k in ks}})
  return found


def check(samples: int, temperature: float, ks: Sequence[int] = ()) -> tuple[int, ...]:
  """The k's of pass@k, 1 and n where none are asked for; errors as of `measure`."""
  if samples < 1:
    raise ConfigError(f"--samples={samples} must be at least 1")
  if samples > 1 and not temperature:
    raise ConfigError(f"--samples={samples} at temperature 0 are all the same; give --temperature, "
                      "or one sample")
  for k in ks:
    if not 1 <= k <= samples:
      raise ConfigError(f"pass@{k}: k must be from 1 to the number of samples, and --samples="
                        f"{samples}")
  return tuple(sorted(set(ks))) or tuple(sorted({1, samples}))


def summary(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """records, samples of each, exact (mean share of correct samples) and pass_at: {"k": mean}, with
  standard errors over records (exact_error, pass_at_error)."""
  exact, error = spread.mean([f["exact"] for f in found])
  passes = {k: spread.mean([f["pass_at"][k] for f in found]) for k in found[0]["pass_at"]}
  return {"kind": "generation", "records": len(found), "samples": len(found[0]["samples"]),
          "exact": exact, "exact_error": error, "pass_at": {k: m for k, (m, _) in passes.items()},
          "pass_at_error": {k: e for k, (_, e) in passes.items()}}
