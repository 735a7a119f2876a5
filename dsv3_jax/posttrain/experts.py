"""Experts' answers, drawn by the serving engine in shards (report 5.1).

A shard is some problems of one expert with all their answers, in a file of its own under
WORKDIR/distill. Each is a function of the config and its number alone: a draw's seed comes from
expert, problem and answer, and the engine begins each shard with an empty cache. So a run that was
killed goes on with the first shard that is missing, and makes what it would have made.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3_jax import config, trained
from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.posttrain import draw, jsonl, rejection, rewards, tasks
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.posttrain.rejection import Answer, Drawn
from dsv3_jax.posttrain.tasks import records
from dsv3_jax.train import checkpoint, metrics

SHARD = 256  # answers of a shard, about


class Expert(NamedTuple):
  """A trained model and what it is asked.

  Attributes:
    source: its workdir, or a Hugging Face folder.
    problems: each once.
  """

  source: str
  problems: tuple[Problem, ...]


class Shard(NamedTuple):
  """Some problems of an expert: `expert.problems[start:end]`."""

  number: int
  expert: int
  start: int
  end: int

  @property
  def name(self) -> str:
    """Of its file."""
    return f"answers-{self.number:05}.jsonl"


def named(cfg: config.Distill, seed: int) -> list[Expert]:
  """The experts that `cfg.experts` names, those of one workdir as one.

  Args:
    cfg: its entries are WORKDIR=FAMILY:LEVEL:COUNT or WORKDIR=FILE.jsonl.
    seed: of generated problems, which are of the train split.

  Raises:
    ConfigError: an entry of another form, no such model, or problems that do not exist.
  """
  found: dict[str, dict[str, Problem]] = {}
  for text in cfg.experts:
    source, problems = entry(text, seed)
    known = found.setdefault(source, {})
    for p in problems:
      if known.setdefault(p.id, p) != p:
        raise ConfigError(f"distill.experts: {source} is asked two problems with the id {p.id!r}; "
                          "give each its own")
  experts = [Expert(source, tuple(problems.values())) for source, problems in found.items()]
  for expert in experts:
    rewards.check(expert.problems)
  return experts


def entry(text: str, seed: int, coming: Collection[str] = ()) -> tuple[str, list[Problem]]:
  """An expert's workdir and what it is asked, of an entry of `cfg.experts`; errors as of `named`.

  Args:
    text: the entry.
    seed: of generated problems.
    coming: workdirs that need not be there yet.
  """
  source, _, asked = text.rpartition("=")
  if not source or not asked:
    raise ConfigError(f"distill.experts: {text!r} must be WORKDIR=FAMILY:LEVEL:COUNT or "
                      "WORKDIR=FILE.jsonl, such as runs/expert=add:0:1000")
  try:
    if source not in coming:
      trained.check(source)
  except ConfigError as error:
    raise ConfigError(f"distill.experts: {error}; in a chain an earlier stage's name stands for "
                      "its workdir") from None
  return source, (records.read(asked) if ".jsonl" in asked
                  else tasks.named([asked], seed, "distill.experts"))


def version(source: str) -> int:
  """The step of the checkpoint that a run would be asked with; -1: a Hugging Face folder."""
  return checkpoint.load_meta(source)["step"] if trained.check(source) else -1


def shards(experts: Sequence[Expert], answers: int) -> list[Shard]:
  """All shards, numbered over the experts."""
  size = max(SHARD // answers, 1)
  parts = [(i, start, min(start + size, len(expert.problems)))
           for i, expert in enumerate(experts) for start in range(0, len(expert.problems), size)]
  return [Shard(number, *part) for number, part in enumerate(parts)]


def sample(experts: Sequence[Expert], cfg: config.Distill, seed: int, folder: Path,
           ui: metrics.Silent, stop: Callable[[], bool]) -> None:
  """Has the experts answer; writes each shard's judged answers into `folder`, if not there yet.

  Args:
    experts, cfg: of `named`.
    seed: of the draws.
    folder: of the shards' files.
    ui: hears how far it is.
    stop: asked between the engine's steps.

  Raises:
    draw.Stopped: `stop` said so; what is complete is kept.
  """
  parts = shards(experts, cfg.answers)
  missing = [part for part in parts if not (folder / part.name).is_file()]
  asking, current = None, -1
  for done, part in enumerate(missing, len(parts) - len(missing)):
    ui.progress(f"experts' answers, part {done + 1} of {len(parts)}", done / len(parts))
    if part.expert != current:
      asking, current = None, part.expert  # the last one's weights are free before these come
      asking = _Asking(experts[current], cfg, ui)
    problems = experts[current].problems[part.start:part.end]
    seeds = [int(np.random.SeedSequence([seed, 3, current, i, k]).generate_state(1)[0] >> 1)
             for i in range(part.start, part.end) for k in range(cfg.answers)]
    repeated = [p for p in problems for _ in range(cfg.answers)]
    answers = rejection.judge(repeated, asking(repeated, seeds, stop))
    jsonl.write(folder / part.name, [answer._asdict() for answer in answers])


def drawn(experts: Sequence[Expert], cfg: config.Distill, folder: Path
          ) -> Iterator[list[Answer]]:
  """All answers of each expert, from `folder`."""
  answers: list[list[Answer]] = [[] for _ in experts]
  for part in shards(experts, cfg.answers):
    answers[part.expert] += jsonl.read(folder / part.name, lambda record: Answer(**record))
  yield from answers


class _Asking:
  """An expert's engine."""

  def __init__(self, expert: Expert, cfg: config.Distill, ui: metrics.Silent):
    generator, self._tokenizer, context = trained.load(expert.source)
    self._cfg = cfg
    longest = cfg.new_tokens + max(len(self._prompt(p)) for p in expert.problems)
    if longest > context:
      ui.note(f"warning: {expert.source} was trained to see {context} at once; its longest "
              f"question and distill.new_tokens={cfg.new_tokens} are {longest} tokens")
    self._draw = draw.Drawer(generator.cfg, generator.weights, generator.runtime, self._tokenizer,
                             longest, max(SHARD, cfg.answers))

  def _prompt(self, problem: Problem) -> list[int]:
    return chat.prompt(rejection.asked(problem, self._cfg.reflect), self._tokenizer)

  def __call__(self, problems: Sequence[Problem], seeds: Sequence[int], stop: Callable[[], bool]
               ) -> list[Drawn]:
    """An answer to each."""
    outputs = self._draw([self._prompt(p) for p in problems], seeds, self._cfg.new_tokens,
                         self._cfg.temperature, stop)
    return [Drawn(self._tokenizer.decode(o.tokens), len(o.tokens), o.ended) for o in outputs]
