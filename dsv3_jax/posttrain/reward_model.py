"""Reward models: their preferences, how one is measured, and one as a reward.

    rewards.score(problems, answers, reward_model.load(cfg.reward))

Form "score" is a number (`scores.py`), form "judge" the model fine-tuned on judgements in words
(`rewards/models.py`). `load` makes three rewards of a workdir: "preference" is the sigmoid of the
score, "judge" and "vote" ask the model in words, whatever it was trained on. They are functions of
problem and answer: a resumed run of GRPO gets the same ones again.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax import config, files, trained
from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.posttrain import messages, pairs, preferences, rewards, tasks
from dsv3_jax.posttrain.messages import Conversation
from dsv3_jax.posttrain.pairs import Pairs
from dsv3_jax.posttrain.preferences import Preference
from dsv3_jax.posttrain.problems import Problem, Reward, Score
from dsv3_jax.posttrain.rewards import models
from dsv3_jax.posttrain.samples import Samples
from dsv3_jax.train import metrics

NAME = "preference.json"
SAMPLED, SETTINGS = "preferences.jsonl", "preferences.json"
_SAMPLING = ("problems", "samples", "new_tokens", "temperature", "form", "thought")
NAMES = ("preference", "judge", "vote")
_ROWS = 32  # answers that are written at once
_MEASURED = 256  # held-out pairs that are judged after a run


# --- what is trained on


def gather(cfg: config.Config, tokenizer: Tokenizer, workdir: str, paths: Sequence[Path],
           ui: metrics.Silent) -> list[Preference]:
  """The preferences that `cfg.reward` names.

  Sampled answers are drawn once: WORKDIR/preferences.jsonl has the pairs made of them.

  Raises:
    ConfigError: see `preferences.read`, `tasks.make`; no answer was wrong where another was right.
  """
  own = cfg.reward
  found = [p for path in paths for p in preferences.read(path)]
  problems = tasks.named(own.problems, cfg.data.seed, "reward.problems")
  steps = own.form == "score" and own.thought
  if not own.samples:
    return found + preferences.from_problems(problems, cfg.data.seed, steps)
  path, settings = Path(workdir) / SAMPLED, Path(workdir) / SETTINGS
  made_with = sampling(cfg)
  if path.is_file() and settings.is_file():
    for key, old in json.loads(settings.read_text(encoding="utf-8")).items():
      if made_with[key] != old:
        raise ConfigError(f"{key}={made_with[key]!r}, but the pairs in {path} were made with "
                          f"{old!r}; set it back, or give another --workdir")
  else:
    made = preferences.from_answers(problems, sampled(cfg, problems, ui), steps)
    if not made:
      raise ConfigError(f"reward.samples={own.samples}: of no problem was one answer right and "
                        "another wrong; take more samples or other problems")
    files.write_atomic(settings, json.dumps(made_with, indent=1) + "\n")
    preferences.write(path, made)
    ui.note(f"{len(made):,} pairs of a right and a wrong answer, in {path}")
  return found + preferences.read(path)


def sampling(cfg: config.Config) -> dict[str, Any]:
  """What the pairs of sampled answers depend on, as plain values."""
  own = {f"reward.{key}": getattr(cfg.reward, key) for key in _SAMPLING}
  return json.loads(json.dumps(
      {**own, "data.seed": cfg.data.seed, "train.init": cfg.train.init}))


def sampled(cfg: config.Config, problems: Sequence[Problem], ui: metrics.Silent
            ) -> list[list[str]]:
  """Answers of train.init's model, `reward.samples` of each problem; those cut off are left out."""
  from dsv3_jax.infer.sampler import Sampling

  own = cfg.reward
  generator, tokenizer, _ = trained.load(cfg.train.init)
  prompts = [(i, chat.prompt(p.messages, tokenizer)) for i, p in enumerate(problems)
             for _ in range(own.samples)]
  found: list[list[str]] = [[] for _ in problems]
  for at in range(0, len(prompts), _ROWS):
    some = prompts[at:at + _ROWS]
    ui.progress(f"answers of {cfg.train.init}: {at:,} of {len(prompts):,}", at / len(prompts))
    done = generator([tokens for _, tokens in some], own.new_tokens,
                     [Sampling(own.temperature, seed=cfg.data.seed + at + k)
                      for k in range(len(some))], stop=(tokenizer.eos,))
    for (i, _), one in zip(some, done, strict=True):
      if one.finish == "stop":
        found[i].append(tokenizer.decode(one.tokens))
  return found


def corpus(cfg: config.Config, tokenizer: Tokenizer, found: Sequence[Preference]) -> Samples:
  """Preferences as `train.run` takes them: pairs, or judgements of both answers.

  Raises:
    ConfigError: none fits, or thoughts are missing.
  """
  data = cfg.data
  kept, held = preferences.split(found, data.validation_fraction)
  rest = (tokenizer, data.sequence_length, data.micro_batch, data.seed)
  said = lambda dropped: f"{dropped:,} too long and left out" if dropped else ""
  if cfg.reward.form == "judge":
    made = [messages.encode_all(preferences.judgements(part), tokenizer, data.sequence_length + 1)
            for part in (kept, held)]
    return Samples(made[0].samples, made[1].samples, *rest, said(made[0].dropped + made[1].dropped))
  encoded = [pairs.encode_all(part, tokenizer, cfg.reward.thought, data.sequence_length)
             for part in (kept, held)]
  return Pairs(encoded[0][0], encoded[1][0], *rest, said(encoded[0][1] + encoded[1][1]))


def check(cfg: config.Config) -> None:
  """Raises ConfigError for what a score cannot be trained on, before a run."""
  if cfg.reward.form == "score" and (cfg.runtime.schedule != "none" or cfg.runtime.shard_vocab):
    raise ConfigError("kind='reward' reads a score from one column of the head, outside a "
                      "pipeline; leave runtime.schedule and runtime.shard_vocab as they are by "
                      "default")


def losses(cfg: config.Config, tokenizer: Tokenizer) -> dict[str, Callable]:
  """`train.run`'s loss_fn and eval_fn; none for a judge, which learns text."""
  if cfg.reward.form == "judge":
    return {}
  from dsv3_jax.posttrain import scores

  made = functools.partial(scores.loss_fn, cfg=cfg.reward, pad=tokenizer.pad)
  return {"loss_fn": made, "eval_fn": made}


# --- one as a reward


class _Model:
  """A reward model of a workdir; its parts are read when they are first asked for."""

  def __init__(self, cfg: config.Reward):
    trained.check(cfg.model)
    self._cfg = cfg

  @functools.cached_property
  def written(self) -> trained.Trained:
    """The model that writes, with its tokenizer."""
    return trained.load(self._cfg.model)

  @functools.cached_property
  def scored(self) -> tuple[config.Config, Tokenizer, Callable[..., list[float]]]:
    """Its run, its tokenizer, and scores of token sequences."""
    from dsv3_jax.posttrain import scores
    from dsv3_jax.train import checkpoint

    params, buffers, meta = checkpoint.load_params(self._cfg.model)
    of = config.from_dict(meta["config"])
    if of.kind != "reward" or of.reward.form != "score":
      raise ConfigError(f"reward.model={self._cfg.model!r} is a run of kind={of.kind!r}"
                        f"{f', form {of.reward.form!r}' if of.kind == 'reward' else ''}; "
                        "'preference' needs one of kind='reward' with reward.form='score'")
    tokenizer = Tokenizer.load(str(Path(self._cfg.model) / "tokenizer.json"), of.model.vocab_size)
    return of, tokenizer, scores.Scorer(of, params, buffers, tokenizer.pad)

  def scores(self, conversations: Sequence[Conversation]) -> list[tuple[float, str]]:
    """Of conversations that end with an answer: the score, and the thought before it or ""."""
    of, tokenizer, scorer = self.scored
    if not of.reward.thought:
      return [(score, "") for score in scorer(
          [[t for part in chat.parts(c, tokenizer) for t in part.tokens] for c in conversations])]
    from dsv3_jax.infer.sampler import GREEDY

    prompts = [chat.prompt([*c, {"role": "user", "content": preferences.ASK}], tokenizer)
               for c in conversations]
    thoughts: dict[int, list[int]] = {}
    for rows in models.batches([-(-len(p) // 64) for p in prompts], _ROWS):
      done = self.written.generator([prompts[i] for i in rows], self._cfg.new_tokens,
                                    [GREEDY] * len(rows), stop=(tokenizer.eos,))
      thoughts.update({i: list(c.tokens) for i, c in zip(rows, done, strict=True)})
    found = scorer([[*p, *thoughts[i], tokenizer.eos] for i, p in enumerate(prompts)])
    return [(score, tokenizer.decode(thoughts[i]).strip()) for i, score in enumerate(found)]


def load(cfg: config.Reward) -> dict[str, Reward]:
  """The rewards that ask the model of a workdir, for `rewards.score`.

  Args:
    cfg: `model`, `new_tokens` (of a thought), `votes`, `temperature`.

  Raises:
    ConfigError: the workdir holds no run. When "preference" is first asked: its run is of another
      kind.
  """
  model = _Model(cfg)
  asked = lambda make, **more: _asked(model, functools.partial(make, steps=cfg.new_tokens, **more))
  return {"preference": _preference(model), "judge": asked(rewards.judge),
          "vote": asked(rewards.vote, votes=cfg.votes, temperature=cfg.temperature)}


def _asked(model: _Model, make: Callable[..., Reward]) -> Reward:
  return lambda problems, answers: make(model.written.generator, model.written.tokenizer)(
      problems, answers)


def _preference(model: _Model) -> Reward:
  def reward(problems: Sequence[Problem], answers: Sequence[str]) -> list[Score]:
    found = model.scores([[*p.messages, {"role": "assistant", "content": a}]
                          for p, a in zip(problems, answers, strict=True)])
    return [Score(_sigmoid(score), f"score {score:.3f}{f': {thought[-400:]}' if thought else ''}")
            for score, thought in found]

  return reward


def _sigmoid(x: float) -> float:
  return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def of_problems(problems: Sequence[Problem], cfg: config.Reward) -> list[Problem]:
  """Problems with the rewards `cfg.names`, if there are any, in place of their own.

  Raises:
    ConfigError: a name without weight, or one that needs reward.model.
  """
  named = []
  for text in cfg.names:
    name, _, weight = text.partition(":")
    try:
      named.append((name, float(weight)))
    except ValueError:
      raise ConfigError(f"reward.names: {text!r} must be NAME:WEIGHT, such as preference:1"
                        ) from None
  found = [dataclasses.replace(p, reward=tuple(named)) for p in problems] if named else problems
  asking = {name for p in found for name, _ in p.reward} & set(NAMES)
  if asking and not cfg.model:
    raise ConfigError(f"the reward {min(asking)!r} asks a model; name its workdir in reward.model")
  rewards.check(found, dict.fromkeys(NAMES, lambda problems, answers: []))
  return list(found)


# --- how good it is


def measure(cfg: config.Config, workdir: str, found: Sequence[Preference]) -> dict[str, Any]:
  """Judges held-out pairs with a finished run as GRPO would; writes WORKDIR/preference.json.

  In training a score stands after the given thought, here after the model's own.

  Args:
    cfg: of the run.
    workdir: its folder.
    found: preferences, of which the held-out ones are taken, at most 256.

  Returns:
    "pairs"; of form "score" "accuracy" (chosen above rejected, a tie a half), its standard "error"
    and the mean "margin"; of form "judge" "accuracy" (of single verdicts), "yes_to_chosen" and
    "yes_to_rejected".
  """
  held = preferences.split(found, cfg.data.validation_fraction)[1][:_MEASURED]
  path, known = Path(workdir) / NAME, {"pairs": len(held), "form": cfg.reward.form}
  if not held:
    return known
  own = dataclasses.replace(cfg.reward, model=workdir, votes=1)
  mean = lambda values: sum(values) / len(values)
  if own.form == "score":
    scored = _Model(own).scores([[*p.messages, {"role": "assistant", "content": a}]
                                 for p in held for a in (p.chosen, p.rejected)])
    margins = [a[0] - b[0] for a, b in zip(scored[::2], scored[1::2], strict=True)]
    accuracy = mean([0.5 if m == 0 else float(m > 0) for m in margins])
    known |= {"accuracy": accuracy, "margin": mean(margins),
              "error": math.sqrt(accuracy * (1 - accuracy) / len(held))}
  else:
    problems = [dataclasses.replace(p.problem, reward=(("judge" if p.reference else "vote", 1.0),))
                for p in held]
    model = load(own)
    asked = [rewards.score(problems, [getattr(p, side) for p in held], model)
             for side in ("chosen", "rejected")]
    yes = [mean([s.value for s in scores]) for scores in asked]
    known |= {"accuracy": (yes[0] + 1 - yes[1]) / 2, "yes_to_chosen": yes[0],
              "yes_to_rejected": yes[1]}
  files.write_atomic(path, json.dumps(known, indent=1) + "\n")
  return known


def said(found: dict[str, Any]) -> str:
  """What `measure` found, as a line."""
  if not found["pairs"]:
    return "no pair is held out (data.validation_fraction): the reward model is not measured"
  of = f"held-out pairs: {found['pairs']}, "
  if found["form"] == "judge":
    return (f"{of}{found['accuracy']:.1%} of verdicts right; yes to {found['yes_to_chosen']:.1%} "
            f"of the better answers and {found['yes_to_rejected']:.1%} of the worse ones")
  return (f"{of}{found['accuracy']:.1%} ± {found['error']:.1%} ranked right, mean margin "
          f"{found['margin']:.2f}")
