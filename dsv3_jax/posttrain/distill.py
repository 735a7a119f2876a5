"""Distillation as a run: experts' answers are drawn, filtered, mixed, and learnt (report 5.1).

In WORKDIR/distill:

| file | |
|---|---|
| `plan.json` | what was asked for, and which checkpoint of each expert answers |
| `answers-N.jsonl` | all answers of a shard with their judgements (experts.py) |
| `distilled.jsonl` | conversations that are learnt: `messages`, and as `id` "EXPERT KIND" |
| `report.json` | how many answers each filter rejected |
| `logits-N.npz` | for `distill.mode="logits"`, experts' probabilities (teachers.py) |

Each file is whole or not there, and what is there is not made again: a run that was killed goes on
with the first file that is missing. With other settings it is refused.
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3_jax import config, files, host
from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import experts, jsonl, messages, rejection, soft, teachers
from dsv3_jax.posttrain import samples as samples_lib
from dsv3_jax.posttrain.draw import Stopped
from dsv3_jax.posttrain.experts import Expert
from dsv3_jax.posttrain.messages import Conversation
from dsv3_jax.posttrain.rejection import Taught
from dsv3_jax.posttrain.samples import Samples
from dsv3_jax.posttrain.teachers import Kept
from dsv3_jax.train import loop, metrics
from dsv3_jax.train.workdir import Workdir

FOLDER, PLAN, LEARNT, REPORT = "distill", "plan.json", "distilled.jsonl", "report.json"
# Settings of learning, which no file depends on.
_LEARNING = ("distill.alpha", "sft.epochs")


class Soft(NamedTuple):
  """A conversation in tokens, with an expert's probabilities of its n answer tokens.

  Attributes:
    tokens, mask: as of `messages.Sample`.
    kept: see soft.py; None where no expert knows it.
  """

  tokens: np.ndarray
  mask: np.ndarray
  kept: Kept | None


class SoftSamples(Samples):
  """Conversations of `Soft` as a corpus whose rows have `soft.ARRAYS` too.

  Args:
    top: k of its probabilities.
    others: of `Samples`.
  """

  def __init__(self, *others: Any, top: int):
    self._top = top
    super().__init__(*others)

  def row(self, members: Sequence[int], samples: Sequence[Soft]) -> dict[str, np.ndarray]:
    """As there, and what its expert says of each token, at the token's place."""
    made = super().row(members, samples)
    S = len(made["tokens"])
    made |= {"top": np.zeros((S, self._top), np.int32),
             "top_logprob": np.zeros((S, self._top), np.float32),
             "rest_logprob": np.zeros(S, np.float32), "taught": np.zeros(S, np.int8)}
    at = 0
    for sample in (samples[i] for i in members):
      where = at + np.flatnonzero(sample.mask)
      at += len(sample.tokens)
      if sample.kept is not None:
        for name, values in zip(soft.ARRAYS, (*sample.kept, 1), strict=True):
          made[name][where] = values
    return made

  def validation_batches(self, batch_size: int, limit: int = 0) -> list[dict[str, np.ndarray]]:
    """As there: validation is of words."""
    return [{name: x for name, x in batch.items() if name not in soft.ARRAYS}
            for batch in super().validation_batches(batch_size, limit)]


def corpus(cfg: config.Config, workdir: str, tokenizer: Tokenizer,
           others: Callable[[], list[Conversation]], ui: metrics.Silent) -> Samples:
  """What the run learns from; drawn now, as far as it is not there.

  Args:
    cfg: the run.
    workdir: its folder.
    tokenizer: the student's.
    others: gives the conversations to mix in.
    ui: hears how far it is.

  Raises:
    ConfigError: experts or problems that there are not, answers that were made with other settings,
      none that passes the filters.
    Stopped: by SIGINT or SIGTERM, whose number is its argument; the same call goes on.
  """
  folder, data = Path(workdir) / FOLDER, cfg.data
  plan = _plan(cfg)
  _check(folder, plan)
  if not complete(cfg, workdir):
    host.keep_memory()  # before the first question to jax
    loop.use_compilation_cache()
    with Workdir(workdir, cfg), host.Signals() as signals:
      try:
        _make(cfg, folder, plan, tokenizer, others, ui, lambda: signals.received is not None)
        if signals.received is not None:  # after the last time that it was asked for
          raise Stopped
      except Stopped:
        ui.note("what was drawn is kept; run the same command to go on")
        raise Stopped(signals.received) from None
  taught = read(workdir)
  ui.note(said(json.loads((folder / REPORT).read_text(encoding="utf-8"))))
  kept = (teachers.load(taught, folder) if cfg.distill.mode == "logits" else [None] * len(taught))
  found, dropped = [], 0
  for t, k in zip(taught, kept, strict=True):
    encoded = messages.encode_all([t.conversation], tokenizer, data.sequence_length + 1)
    dropped += encoded.dropped
    # One that was cut at a turn is no expert's, whose answers are last turns.
    found += [Soft(*sample, k) for sample in encoded.samples]
  parts = samples_lib.split(found, data.validation_fraction)
  note = f"{dropped:,} too long and left out" if dropped else ""
  how = (tokenizer, data.sequence_length, data.micro_batch, data.seed, note)
  if cfg.distill.mode == "logits":
    return SoftSamples(*parts, *how, top=cfg.distill.top)
  return Samples(*parts, *how)


def losses(cfg: config.Config) -> dict[str, Callable]:
  """What `train.run` is given beside the corpus."""
  if cfg.distill.mode == "answers":
    return {}
  return {"loss_fn": functools.partial(soft.loss_fn, cfg=cfg.distill)}


def complete(cfg: config.Config, workdir: str) -> bool:
  """Whether all files are there."""
  folder = Path(workdir) / FOLDER
  return (folder / REPORT).is_file() and (
      cfg.distill.mode == "answers" or not teachers.missing(read(workdir), folder))


def read(workdir: str | Path) -> list[Taught]:
  """What a run learns from."""
  return jsonl.read(Path(workdir) / FOLDER / LEARNT, _taught)


def said(report: dict[str, Any]) -> str:
  """The report in a line."""
  counts = [e["answers"] for e in report["experts"]]
  total = {name: sum(c[name] for c in counts) for name in rejection.COUNTS}
  left = [f"{n:,} {name.replace('_', ' ')}" for name, n in total.items() if n and name != "kept"]
  kinds = ", ".join(f"{n:,} {kind}" for kind, n in report["conversations"].items())
  return (f"{sum(total.values()):,} answers of {len(counts)} expert{'s' * (len(counts) > 1)}: "
          + ", ".join([f"{total['kept']:,} kept", *left]) + f"; to learn are {kinds}")


def _taught(record: dict[str, Any]) -> Taught:
  number, kind = record["id"].split()
  return Taught(int(number), kind, messages.check(record["messages"]))


# --- making the files


def _plan(cfg: config.Config) -> dict[str, Any]:
  """What the files depend on, as plain values."""
  own = {f"{name}.{key}": value for name in ("distill", "sft")
         for key, value in config.to_dict(getattr(cfg, name)).items()}
  plan = {key: value for key, value in own.items() if key not in _LEARNING}
  return json.loads(json.dumps(plan | {"data.seed": cfg.data.seed}))


def _check(folder: Path, plan: dict[str, Any]) -> None:
  path = folder / PLAN
  if not path.is_file():
    return
  old = json.loads(path.read_text(encoding="utf-8"))["settings"]
  for key in sorted(old.keys() & plan.keys()):
    if old[key] != plan[key]:
      raise ConfigError(f"{key}={plan[key]!r}, but the answers in {folder} were made with "
                        f"{old[key]!r}; set it back, or give another --workdir")


def _make(cfg: config.Config, folder: Path, plan: dict[str, Any], tokenizer: Tokenizer,
          others: Callable[[], list[Conversation]], ui: metrics.Silent, stop: Callable[[], bool]
          ) -> None:
  d, seed = cfg.distill, cfg.data.seed
  asked = experts.named(d, seed)
  mixed = others() if d.share else []
  if d.mode == "logits":
    teachers.check(asked, cfg, tokenizer)
  folder.mkdir(exist_ok=True)
  for path in folder.glob(".*.tmp"):  # of a write that was killed
    path.unlink()
  _versions(asked, folder, plan)
  if not (folder / REPORT).is_file():
    problems = sum(len(e.problems) for e in asked)
    ui.note(f"{problems:,} problems, {d.answers} answers to each, by "
            + ", ".join(e.source for e in asked))
    experts.sample(asked, d, seed, folder, ui, stop)
    _curate(asked, cfg, folder, mixed)
  if d.mode == "logits":
    teachers.keep(jsonl.read(folder / LEARNT, _taught), asked, cfg, tokenizer, folder, ui, stop)


def _versions(asked: Sequence[Expert], folder: Path, plan: dict[str, Any]) -> None:
  """Notes which checkpoints answer; raises ConfigError where others answered before."""
  steps = {e.source: experts.version(e.source) for e in asked}
  path = folder / PLAN
  if not path.is_file():
    files.write_atomic(path, json.dumps({"settings": plan, "steps": steps}, indent=1) + "\n")
    return
  for source, step in json.loads(path.read_text(encoding="utf-8"))["steps"].items():
    if steps[source] != step:
      raise ConfigError(f"the expert {source} is at step {steps[source]} now, and was at {step} "
                        f"when it gave the first answers in {folder}; give another --workdir")


def _curate(asked: Sequence[Expert], cfg: config.Config, folder: Path,
            mixed: list[Conversation]) -> None:
  taught, told = [], []
  answers = experts.drawn(asked, cfg.distill, folder)
  for i, (expert, of) in enumerate(zip(asked, answers, strict=True)):
    kept, counts = rejection.choose(of, cfg.distill)
    taught += rejection.samples(expert.problems, kept, cfg.distill, i)
    told.append({"expert": expert.source, **rejection.told(expert.problems, of, kept, counts)})
  taught = rejection.distinct(taught)
  if not taught:
    found = "; ".join(f"{t['expert']} {t['answers']}" for t in told)
    raise ConfigError(f"no answer of distill.experts passed the filters: {found}. Ask easier "
                      "problems or better experts in another --workdir, or allow what most answers "
                      "failed")
  learnt = rejection.mixed(taught, mixed, cfg.distill.share, cfg.data.seed)
  kinds = [t.kind for t in learnt]
  jsonl.write(folder / LEARNT, [
      {"messages": t.conversation, "id": f"{t.expert} {t.kind}"} for t in learnt])
  files.write_atomic(folder / REPORT, json.dumps({
      "experts": told, "conversations": {k: kinds.count(k) for k in dict.fromkeys(kinds)},
      "share": 1 - len(taught) / len(learnt)}, indent=1) + "\n")
