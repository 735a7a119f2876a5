"""Outputs drawn by the serving engine, many at once."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dsv3_jax import config
from dsv3_jax.infer.batches import Settings
from dsv3_jax.infer.engine import Engine
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.request import Event, Request
from dsv3_jax.infer.sampler import Sampling

RUNNING = 64  # outputs that are written at once, at most
_PAGE = 16  # tokens of a page of the engine's cache


class Output(NamedTuple):
  """What was drawn after a prompt: tokens without the end token, and whether that came."""

  tokens: list[int]
  ended: bool


class Stopped(Exception):
  """Somebody wants the run to end."""


class Drawer:
  """An engine of its own, with an empty cache at the beginning of each call.

  So that what it draws is a function of weights, prompts and seeds alone.

  Args:
    cfg: the model.
    weights: of `parameters.prepare`.
    runtime: implementations.
    tokenizer: `data.tokenizer.Tokenizer`.
    longest: tokens of a prompt with its output, at most.
    count: outputs of a call, at most.
  """

  def __init__(self, cfg: config.Model, weights: Parameters, runtime: config.Runtime,
               tokenizer: Any, longest: int, count: int):
    self._weights = weights
    running = 1 << max(min(count, RUNNING).bit_length() - 1, 0)
    pages = -(-longest // _PAGE) + 1
    self._engine = Engine(
        cfg, weights, Settings(pages=pages * running, page_size=_PAGE, longest=longest,
                               running=running, chunk=256, run=8, queue=count),
        runtime, "", frozenset({tokenizer.eos}), tokenizer.vocab_size)

  def use(self, weights: Parameters) -> None:
    """Draws with these from now on."""
    self._weights = weights

  def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], new_tokens: int,
               temperature: float, stop: Callable[[], bool] = lambda: False) -> list[Output]:
    """An output of each prompt.

    Args:
      prompts: tokens.
      seeds: below 2^31, of each output.
      new_tokens: most tokens of an output.
      temperature: 0 is greedy.
      stop: asked between the engine's steps.

    Raises:
      Stopped: `stop` said so.
      RuntimeError: the engine could not.
    """
    self._engine.use(self._weights)  # forgets the pages of the last call
    events: list[list[Event]] = []
    for prompt, seed in zip(prompts, seeds, strict=True):
      events.append([])
      self._engine.submit(Request(tuple(prompt), new_tokens, Sampling(temperature, seed=seed)),
                          events[-1].append)
    while self._engine.step():
      if stop():
        raise Stopped
    for of in events:
      if of[-1].finish not in ("stop", "length"):
        raise RuntimeError(f"an output could not be drawn: {of[-1].error}")
    return [Output([t.id for e in of for t in e.tokens], of[-1].finish == "stop") for of in events]
