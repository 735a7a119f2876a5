"""GRPO's batches: outputs that today's policy draws, judged, in the place of text.

The training loop asks for a batch and says what the parameters are. A rollout takes the next
problems, has the serving engine draw a group of outputs of each with these parameters, judges them,
and computes their log-probabilities under the policy and the reference by the training step's own
forward pass: what decoding computes differs from it by rounding, and in FP8 by more, so that the
ratio of the first step would not be 1. `micro_steps` steps then share a rollout's groups.

With `ahead` a second device draws rollout n + 1 with the parameters that rollout n is learned from,
while the first one learns: neither waits, and the policy that drew is one rollout old.

Everything is a function of the seed, the rollout's number and the parameters, so that a resumed run
draws what the interrupted one would have drawn. What is not at hand any more by then, the rest of a
rollout and a refreshed reference, is in files of the workdir that the iterator's state names.
"""

import concurrent.futures
import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.infer import parameters
from dsv3_jax.posttrain import groups, objective, rollout_files
from dsv3_jax.posttrain.draw import Drawer, Output
from dsv3_jax.posttrain.problems import Problem, Reward, Score
from dsv3_jax.posttrain.rollout_files import Rollout
from dsv3_jax.train import checkpoint
from dsv3_jax.train import state as state_lib
from dsv3_jax.train.state import TrainState

TRANSCRIPTS = "transcripts.jsonl"
_SHOWN = 2  # problems of a rollout whose outputs are kept as text


class _Policy(NamedTuple):
  """Parameters and buffers that draw, and those of the reference."""

  params: Any
  buffers: Any
  reference: tuple[Any, Any]


class Rollouts:
  """An iterator for the training loop; see the module's docstring.

  Args:
    cfg: the run.
    tokenizer: the model's.
    problems: to draw from, epoch after epoch, each in its own order.
    reward: judges outputs.
    folder: the workdir.
    fingerprint: of problems and tokenizer.

  Raises:
    ConfigError: a batch has no room for the longest outputs that there may be; no second device to
      draw ahead on.
  """

  def __init__(self, cfg: config.Config, tokenizer: Tokenizer, problems: Sequence[Problem],
               reward: Reward, folder: str, fingerprint: str):
    self._cfg, self._tokenizer, self._reward = cfg, tokenizer, reward
    self._problems = tuple(problems)
    self._prompts = [chat.prompt(p.messages, tokenizer) for p in problems]
    self._folder, self._fingerprint = Path(folder), fingerprint
    self._longest = max(map(len, self._prompts)) + cfg.grpo.new_tokens
    self._check()
    self._logprobs = _logprobs(cfg)
    self._prepare = jax.jit(functools.partial(
        _prepared, cfg=cfg.model, dtype=cfg.runtime.compute_dtype))
    self._drawer: Drawer | None = None
    self._step = 0
    self._rollout = Rollout([], {})
    self._state: TrainState | None = None
    self._reference: Any = None  # params and buffers
    self._ahead = _Ahead() if cfg.grpo.ahead else None

  # --- what the loop calls

  def start(self) -> None:
    """Nothing begins before the first parameters are there."""

  def follow(self, state: TrainState) -> None:
    """Takes the parameters that the next batch is drawn with."""
    self._state = state

  def said(self) -> dict[str, Any]:
    """Numbers of the rollout that the last batch is of."""
    return dict(self._rollout.said)

  def __next__(self) -> dict[str, np.ndarray]:
    # The loop forbids transfers that nobody asked for; here they are the matter.
    with jax.transfer_guard("allow"):
      number, part = divmod(self._step, self._cfg.grpo.micro_steps)
      if part == 0:
        self._rollout = self._take(number)
        if self._cfg.grpo.micro_steps > 1:
          rollout_files.save(self._folder, number, self._rollout)
      made = self._rollout.batches[part]
    self._step += 1
    return made

  def get_state(self) -> dict[str, Any]:
    """Where the next batch begins; a rollout that is being drawn is waited for and kept."""
    if self._ahead is not None and self._ahead.number is not None:
      rollout_files.save(self._folder, self._ahead.number, self._ahead.result())
    rollout_files.tidy(self._folder, self._cfg.grpo.micro_steps, self._cfg.grpo.reference_every)
    return {"version": 1, "corpus": self._fingerprint, "step": self._step}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes on where a state was taken.

    Raises:
      ValueError: it is of other problems.
      ConfigError: a file that it goes on from is missing.
    """
    if state["corpus"] != self._fingerprint:
      raise ValueError(f"the checkpoint was trained on problems {state['corpus']}, this run's are "
                       f"{self._fingerprint}; bring them back, or begin a new workdir")
    self._step = int(state["step"])
    number, part = divmod(self._step, self._cfg.grpo.micro_steps)
    if part:
      self._rollout = rollout_files.load(self._folder, number)
    coming = number + (part > 0)
    if self._ahead is not None and self._step and coming < self._cfg.grpo.rollouts:
      self._ahead.have(coming, rollout_files.load(self._folder, coming))

  def close(self) -> None:
    """Ends what is being drawn."""
    if self._ahead is not None:
      self._ahead.close()

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

  def _take(self, number: int) -> Rollout:
    """A rollout's batches; with `grpo.ahead`, the next one begins to be drawn."""
    ahead = self._ahead
    if ahead is None:
      return self._roll(number, self._policy(number))
    if ahead.number != number:  # the first
      ahead.begin(number, self._roll, ahead.place(self._policy(number)))
    rollout = ahead.take()
    if number + 1 < self._cfg.grpo.rollouts:
      ahead.begin(number + 1, self._roll, ahead.place(self._policy(number + 1)))
    return rollout

  def _roll(self, number: int, policy: _Policy) -> Rollout:
    g = self._cfg.grpo
    chosen = self._chosen(number)
    drawn = self._draw(number, chosen, policy)
    answers = [[self._tokenizer.decode(o.tokens) for o in group] for group in drawn]
    scores = self._judge(chosen, answers, drawn)
    reward_NG = np.array([[s.value for s in group] for group in scores])
    if g.shuffle_rewards:
      rng = np.random.default_rng([self._cfg.train.seed, 1, number])
      reward_NG = rng.permutation(reward_NG.reshape(-1)).reshape(reward_NG.shape)
    advantage_NG, differ_N = groups.advantages(reward_NG, g)
    ended = np.array([[o.ended for o in group] for group in drawn])
    outputs = [[groups.Output(
        self._prompts[i], [*o.tokens, *[self._tokenizer.eos] * o.ended], (), (),
        float(advantage_NG[n, k]), o.ended or g.cut_off != "mask")
        for k, o in enumerate(drawn[n])] for n, i in enumerate(chosen)]
    length = np.array([[len(o.tokens) for o in group] for group in outputs])
    said = {
        "reward": float(reward_NG.mean()), "reward_std": float(reward_NG.std()),
        "solved": float((reward_NG >= 1).mean()), "length": float(length.mean()),
        "length_max": int(length.max()), "cut_off": float(1 - ended.mean()),
        "same_reward": float(1 - differ_N.mean())}
    self._transcribe(number, chosen, answers, scores)
    size = g.prompts // g.micro_steps
    return Rollout([self._batch([o for group in outputs[at:at + size] for o in group], policy)
                    for at in range(0, g.prompts, size)], said)

  def _draw(self, number: int, chosen: Sequence[int], policy: _Policy) -> list[list[Output]]:
    """Outputs of each problem."""
    g = self._cfg.grpo
    weights = self._prepare(policy.params, policy.buffers)
    if self._drawer is None:
      self._drawer = Drawer(self._cfg.model, weights, self._cfg.runtime, self._tokenizer,
                            self._longest, g.prompts * g.group)
    self._drawer.use(weights)
    seeds = [int(np.random.SeedSequence([self._cfg.train.seed, number, i, k]).generate_state(1)[0]
                 >> 1) for i in chosen for k in range(g.group)]
    drawn = self._drawer([self._prompts[i] for i in chosen for _ in range(g.group)], seeds,
                         g.new_tokens, g.temperature)
    return [drawn[at:at + g.group] for at in range(0, len(drawn), g.group)]

  def _judge(self, chosen: Sequence[int], answers: list[list[str]], drawn: list[list[Output]]
             ) -> list[list[Score]]:
    size = self._cfg.grpo.group
    flat = self._reward([self._problems[i] for i in chosen for _ in range(size)],
                        [a for group in answers for a in group])
    scores = [flat[at:at + size] for at in range(0, len(flat), size)]
    if self._cfg.grpo.cut_off == "zero":
      scores = [[s if output.ended else Score(0.0, "cut off: " + s.why)
                 for s, output in zip(group, of, strict=True)]
                for group, of in zip(scores, drawn, strict=True)]
    return scores

  def _batch(self, outputs: list[groups.Output], policy: _Policy) -> dict[str, np.ndarray]:
    """A step's outputs with their log-probabilities, [A, B, T + 1]."""
    data = self._cfg.data
    rows = groups.pack(outputs, data.sequence_length + 1)
    shape = (data.batch_size // data.micro_batch, data.micro_batch, data.sequence_length + 1)
    blank = [[o._replace(old=[0.0] * len(o.tokens), ref=[0.0] * len(o.tokens)) for o in row]
             for row in rows]
    made = groups.batch(blank, data.batch_size, data.sequence_length + 1, self._tokenizer.pad,
                        self._cfg.grpo)
    made = {k: v.reshape(shape) for k, v in made.items()}
    for name, (params, buffers) in (("old", policy[:2]), ("ref", policy.reference)):
      for a in range(shape[0]):
        if made["mask"][a].any():  # the last may be padding alone
          micro = {k: made[k][a] for k in ("tokens", "segments")}
          made[name][a, :, 1:] = np.asarray(self._logprobs(params, buffers, micro))
    return made

  def _policy(self, number: int) -> _Policy:
    """Today's parameters, and the reference of a rollout that they draw."""
    state, every = self._state, self._cfg.grpo.reference_every
    wanted = rollout_files.refreshed(number, every)
    if wanted and wanted == number:
      self._reference = jax.tree.map(jnp.copy, (state.params, state.buffers))
      rollout_files.save_reference(self._folder, wanted, jax.device_get(self._reference))
    elif self._reference is None and wanted:
      self._reference = jax.device_put(rollout_files.load_reference(
          self._folder, wanted, (state.params, state.buffers)))
    elif self._reference is None:
      params, buffers, _ = checkpoint.load_params(self._cfg.train.init)
      self._reference = params, buffers
    return _Policy(state.params, state.buffers, self._reference)

  def _transcribe(self, number: int, chosen, answers, scores) -> None:
    lines = []
    for n in range(min(_SHOWN, len(chosen))):
      problem = self._problems[chosen[n]]
      lines.append(json.dumps({
          "rollout": number, "id": problem.id, "prompt": problem.prompt, "answer": problem.answer,
          "outputs": [{"text": text, "reward": s.value, "why": s.why}
                      for text, s in zip(answers[n], scores[n], strict=True)]}))
    with open(self._folder / TRANSCRIPTS, "a+b") as file:
      if file.tell() and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n":
        file.write(b"\n")  # behind half a line of a run that was killed
      file.write(("\n".join(lines) + "\n").encode())


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


class _Ahead:
  """One rollout that is drawn on another device, while this one learns."""

  def __init__(self) -> None:
    devices = jax.local_devices()
    if len(devices) < 2:
      raise ConfigError("grpo.ahead=True draws on a second device, and there is one; set it to "
                        "False, or on a CPU XLA_FLAGS=--xla_force_host_platform_device_count=2")
    self._device = devices[-1]
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "rollout")
    self._coming: concurrent.futures.Future[Rollout] | None = None
    self.number: int | None = None  # of the rollout that was begun and not taken

  def place(self, policy: _Policy) -> _Policy:
    """A copy on the other device: the training step donates its own."""
    return jax.device_put(policy, self._device)

  def begin(self, number: int, roll: Callable[[int, _Policy], Rollout], policy: _Policy) -> None:
    """Draws a rollout in the background."""
    def run() -> Rollout:
      with jax.default_device(self._device), jax.transfer_guard("allow"):
        return roll(number, policy)

    self.number, self._coming = number, self._thread.submit(run)

  def have(self, number: int, rollout: Rollout) -> None:
    """A rollout that was drawn earlier."""
    self.number, self._coming = number, concurrent.futures.Future()
    self._coming.set_result(rollout)

  def result(self) -> Rollout:
    """The rollout, when it is there."""
    return self._coming.result()

  def take(self) -> Rollout:
    """The same, and it is no more coming."""
    rollout, self.number, self._coming = self.result(), None, None
    return rollout

  def close(self) -> None:
    """Waits for the thread."""
    self._thread.shutdown(cancel_futures=True)
