"""GRPO's batches: outputs that today's policy draws, judged, in the place of text.

The training loop asks for a batch and says what the parameters are. A rollout takes the next
problems, has the serving engine draw a group of outputs of each with these parameters, judges them,
and computes their log-probabilities under the policy and the reference by the training step's own
forward pass: what decoding computes differs from it by rounding, and in FP8 by more, so that the
ratio of the first step would not be 1. `micro_steps` steps then share a rollout's groups.

Everything is a function of the seed, the rollout's number and the parameters, so that a resumed run
draws what the interrupted one would have drawn. What is not at hand any more by then, the rest of a
rollout and a refreshed reference, is in files of the workdir that the iterator's state names.
"""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import parameters
from dsv3_jax.infer.batches import Settings
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.request import Event, Request
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.posttrain import groups, objective
from dsv3_jax.posttrain.problems import Problem, Reward, Score
from dsv3_jax.train import checkpoint
from dsv3_jax.train import state as state_lib
from dsv3_jax.train.state import TrainState

TRANSCRIPTS = "transcripts.jsonl"
_SHOWN = 2  # problems of a rollout whose outputs are kept as text
_PAGE = 16  # tokens of a page of the engine's cache


class Rollouts:
  """An iterator for the training loop; see the module's docstring.

  Args:
    cfg: the run.
    tokenizer: the model's.
    problems: to draw from, epoch after epoch, each in its own order.
    reward: judges outputs.
    folder: the workdir.
    fingerprint: of problems and tokenizer.
    schedule: step -> sequences of its batch.

  Raises:
    ConfigError: a batch has no room for the longest outputs that there may be.
  """

  def __init__(self, cfg: config.Config, tokenizer: Tokenizer, problems: Sequence[Problem],
               reward: Reward, folder: str, fingerprint: str, schedule: Callable[[int], int]):
    self._cfg, self._tokenizer, self._reward = cfg, tokenizer, reward
    self._problems = tuple(problems)
    self._prompts = [chat.prompt(p.messages, tokenizer) for p in problems]
    self._folder, self._fingerprint = Path(folder), fingerprint
    self._schedule = schedule
    self._longest = max(map(len, self._prompts)) + cfg.grpo.new_tokens
    self._check()
    self._logprobs = _logprobs(cfg)
    self._prepare = jax.jit(functools.partial(
        _prepared, cfg=cfg.model, dtype=cfg.runtime.compute_dtype))
    self._engine: Engine | None = None
    self._step, self._rest, self._said = 0, [], {}
    self._state: TrainState | None = None
    self._reference: Any = None  # params and buffers

  # --- what the loop calls

  def start(self) -> None:
    """Nothing begins before the first parameters are there."""

  def follow(self, state: TrainState) -> None:
    """Takes the parameters that the next batch is drawn with."""
    self._state = state

  def said(self) -> dict[str, Any]:
    """Numbers of the rollout that the last batch is of."""
    return dict(self._said)

  def __next__(self) -> dict[str, np.ndarray]:
    # The loop forbids transfers that nobody asked for; here they are the matter.
    with jax.transfer_guard("allow"):
      number, part = divmod(self._step, self._cfg.grpo.micro_steps)
      self._refresh(number)
      if part == 0:
        self._rest = self._roll(number)
        self._keep(number)
      made = self._rest[part]
    self._step += 1
    return made

  def get_state(self) -> dict[str, Any]:
    """Where the next batch begins; files of earlier rollouts are removed."""
    number = self._step // self._cfg.grpo.micro_steps
    refreshed = self._refreshed(number)
    for path in self._folder.glob("rollout-*.npz"):
      if int(path.stem.removeprefix("rollout-")) < number:
        path.unlink(missing_ok=True)
    for path in self._folder.glob("reference-*.npz"):
      if int(path.stem.removeprefix("reference-")) < refreshed:
        path.unlink(missing_ok=True)
    return {"version": 1, "corpus": self._fingerprint, "step": self._step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where a state was taken.

    Raises:
      ValueError: it is of other problems.
    """
    if state["corpus"] != self._fingerprint:
      raise ValueError(f"the checkpoint was trained on problems {state['corpus']}, this run's are "
                       f"{self._fingerprint}; bring them back, or begin a new workdir")
    self._step = int(state["step"])
    number, part = divmod(self._step, self._cfg.grpo.micro_steps)
    if part:
      self._rest, self._said = _load_rollout(self._folder / f"rollout-{number}.npz")

  def close(self) -> None:
    """Nothing to end."""

  # --- a rollout

  def _check(self) -> None:
    g, data = self._cfg.grpo, self._cfg.data
    outputs = g.prompts * g.group // g.micro_steps
    per_row = (data.sequence_length + 1) // self._longest
    if data.batch_size * per_row < outputs:
      raise ConfigError(
          f"data.batch_size={data.batch_size} sequences of data.sequence_length="
          f"{data.sequence_length} have room for {data.batch_size * per_row} outputs of up to "
          f"{self._longest} tokens (the longest prompt and grpo.new_tokens={g.new_tokens}), and a "
          f"step has {outputs}; raise them, or lower grpo.prompts, group or new_tokens")

  def _chosen(self, number: int) -> list[int]:
    """The problems of a rollout."""
    n, count = self._cfg.grpo.prompts, len(self._problems)
    found = []
    for at in range(number * n, (number + 1) * n):
      epoch, place = divmod(at, count)
      order = np.random.default_rng([self._cfg.data.seed, epoch]).permutation(count)
      found.append(int(order[place]))
    return found

  def _roll(self, number: int) -> list[dict[str, np.ndarray]]:
    g = self._cfg.grpo
    chosen = self._chosen(number)
    drawn = self._draw(number, chosen)
    answers = [[self._tokenizer.decode(tokens) for tokens, _ in group] for group in drawn]
    scores = self._judge(chosen, answers, drawn)
    reward_NG = np.array([[s.value for s in group] for group in scores])
    if g.shuffle_rewards:
      rng = np.random.default_rng([self._cfg.train.seed, 1, number])
      reward_NG = rng.permutation(reward_NG.reshape(-1)).reshape(reward_NG.shape)
    advantage_NG, differ_N = groups.advantages(reward_NG, g)
    ended = np.array([[finish == "stop" for _, finish in group] for group in drawn])
    outputs = [[groups.Output(
        self._prompts[i], [*tokens, *[self._tokenizer.eos] * (finish == "stop")], (), (),
        float(advantage_NG[n, k]), finish == "stop" or g.cut_off != "mask")
        for k, (tokens, finish) in enumerate(drawn[n])] for n, i in enumerate(chosen)]
    length = np.array([[len(o.tokens) for o in group] for group in outputs])
    self._said = {
        "reward": float(reward_NG.mean()), "reward_std": float(reward_NG.std()),
        "solved": float((reward_NG >= 1).mean()), "length": float(length.mean()),
        "length_max": int(length.max()), "cut_off": float(1 - ended.mean()),
        "same_reward": float(1 - differ_N.mean())}
    self._transcribe(number, chosen, answers, scores)
    size = g.prompts // g.micro_steps
    return [self._batch([o for group in outputs[at:at + size] for o in group])
            for at in range(0, g.prompts, size)]

  def _draw(self, number: int, chosen: Sequence[int]) -> list[list[tuple[list[int], str]]]:
    """(tokens without the end token, how it ended) of each output of each problem."""
    g = self._cfg.grpo
    weights = self._prepare(self._state.params, self._state.buffers)
    if self._engine is None:
      count = g.prompts * g.group
      running = 1 << max(min(count, 64).bit_length() - 1, 0)
      pages = -(-self._longest // _PAGE) + 1
      self._engine = Engine(
          self._cfg.model, weights, Settings(
              pages=pages * running, page_size=_PAGE, longest=self._longest, running=running,
              chunk=256, run=8, queue=count),
          self._cfg.runtime, "",
          frozenset({self._tokenizer.eos}), self._tokenizer.vocab_size)
    else:
      self._engine.use(weights)
    events: list[list[Event]] = []
    for i in chosen:
      for k in range(g.group):
        seed = int(np.random.SeedSequence([self._cfg.train.seed, number, i, k]).generate_state(1)[0]
                   >> 1)
        events.append([])
        self._engine.submit(Request(tuple(self._prompts[i]), g.new_tokens,
                                    Sampling(g.temperature, seed=seed)), events[-1].append)
    while self._engine.step():
      pass
    for of in events:
      if of[-1].finish not in ("stop", "length"):
        raise RuntimeError(f"an output could not be drawn: {of[-1].error}")
    drawn = [([t.id for e in of for t in e.tokens], of[-1].finish) for of in events]
    return [drawn[at:at + g.group] for at in range(0, len(drawn), g.group)]

  def _judge(self, chosen, answers, drawn) -> list[list[Score]]:
    size = self._cfg.grpo.group
    flat = self._reward([self._problems[i] for i in chosen for _ in range(size)],
                        [a for group in answers for a in group])
    scores = [flat[at:at + size] for at in range(0, len(flat), size)]
    if self._cfg.grpo.cut_off == "zero":
      scores = [[s if finish == "stop" else Score(0.0, "cut off: " + s.why)
                 for s, (_, finish) in zip(group, of, strict=True)]
                for group, of in zip(scores, drawn, strict=True)]
    return scores

  def _batch(self, outputs: list[groups.Output]) -> dict[str, np.ndarray]:
    """A step's outputs with their log-probabilities, [A, B, T + 1]."""
    data = self._cfg.data
    rows = groups.pack(outputs, data.sequence_length + 1)
    shape = (data.batch_size // data.micro_batch, data.micro_batch, data.sequence_length + 1)
    blank = [[o._replace(old=[0.0] * len(o.tokens), ref=[0.0] * len(o.tokens)) for o in row]
             for row in rows]
    made = groups.batch(blank, data.batch_size, data.sequence_length + 1, self._tokenizer.pad,
                        self._cfg.grpo)
    made = {k: v.reshape(shape) for k, v in made.items()}
    state = self._state
    for name, (params, buffers) in (("old", (state.params, state.buffers)),
                                    ("ref", self._reference)):
      for a in range(shape[0]):
        micro = {k: made[k][a] for k in ("tokens", "segments")}
        made[name][a, :, 1:] = np.asarray(self._logprobs(params, buffers, micro))
    return made

  # --- reference, files

  def _refreshed(self, number: int) -> int:
    """The rollout before which the reference of this one was taken; 0: the initial one."""
    every = self._cfg.grpo.reference_every
    return number // every * every if every else 0

  def _refresh(self, number: int) -> None:
    wanted = self._refreshed(number)
    copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))
    path = self._folder / f"reference-{wanted}.npz"
    if wanted and wanted == number and self._step % self._cfg.grpo.micro_steps == 0:
      self._reference = copy((self._state.params, self._state.buffers))
      flat = checkpoint.flatten(jax.device_get(self._reference))
      _save(path, flat)
    elif self._reference is None and wanted:
      with np.load(path) as held:
        self._reference = checkpoint.unflatten(dict(held), (self._state.params,
                                                            self._state.buffers))
    elif self._reference is None:
      params, buffers, _ = checkpoint.load_params(self._cfg.train.init)
      self._reference = params, buffers

  def _keep(self, number: int) -> None:
    """The rollout in a file, if later steps want it."""
    if self._cfg.grpo.micro_steps > 1:
      arrays = {f"{i}/{name}": x for i, made in enumerate(self._rest) for name, x in made.items()}
      said = np.frombuffer(json.dumps(self._said).encode(), np.uint8)
      _save(self._folder / f"rollout-{number}.npz", {**arrays, "said": said})

  def _transcribe(self, number: int, chosen, answers, scores) -> None:
    lines = []
    for n in range(min(_SHOWN, len(chosen))):
      problem = self._problems[chosen[n]]
      lines.append(json.dumps({
          "rollout": number, "id": problem.id, "prompt": problem.prompt, "answer": problem.answer,
          "outputs": [{"text": text, "reward": s.value, "why": s.why}
                      for text, s in zip(answers[n], scores[n], strict=True)]}))
    with open(self._folder / TRANSCRIPTS, "a", encoding="utf-8") as file:
      file.write("\n".join(lines) + "\n")


def _prepared(params: Any, buffers: Any, cfg: config.Model, dtype: str) -> Any:
  # A copy: the training step donates its state, and what is only passed on would go with it.
  return jax.tree.map(jnp.copy, parameters.prepare(params, buffers, cfg, dtype))


def _logprobs(cfg: config.Config) -> Callable:
  """(params, buffers, {"tokens", "segments"} [B, T + 1]) -> log-probabilities [B, T]."""
  graphdef = state_lib.split(nnx.eval_shape(lambda: state_lib.build_model(cfg.model, 0)))[0]

  @jax.jit
  def run(params, buffers, batch):
    return objective.predicted(nnx.merge(graphdef, params, buffers), batch, cfg.grpo,
                               cfg.runtime)[0]

  return run


def _save(path: Path, arrays: dict[str, Any]) -> None:
  temporary = path.with_name(f".{path.name}.tmp.npz")
  with open(temporary, "wb") as file:
    np.savez(file, **arrays)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _load_rollout(path: Path) -> tuple[list[dict[str, np.ndarray]], dict[str, Any]]:
  if not path.is_file():
    raise ConfigError(f"{path} is missing: the checkpoint was taken between two steps of that "
                      "rollout; begin a new workdir, or remove the newest checkpoint")
  with np.load(path) as held:
    arrays = dict(held)
  said = json.loads(bytes(arrays.pop("said")))
  found: list[dict[str, np.ndarray]] = []
  for name, x in arrays.items():
    index, key = name.split("/")
    while len(found) <= int(index):
      found.append({})
    found[int(index)][key] = x
  return found, said
