"""The compiled functions over jobs of any number and length, padded to a few sizes, and the cache.

A batch is *plain* if logits, temperatures and truncation decide about every token in it; otherwise
penalties, biases and alternatives are computed for all. So there are two programs a size of
decoding, and one (with everything) a size of a prompt's chunk, which `warm` compiles.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import decode, sampler
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.request import TOPS, Job

_LEAST = 16  # a bound of the smallest size that chunks are padded to


@dataclasses.dataclass(frozen=True)
class Settings:
  """Sizes of an engine.

  Attributes:
    pages: of the cache.
    page_size: tokens a page; the GPU's kernel takes 64.
    longest: tokens that one request may have; 0: as many as the pages hold.
    running: requests that decode at once.
    chunk: tokens of a prompt that are run at once.
    run: tokens that each request writes in a step, where no prompt waits.
    queue: requests that may wait; more are refused.
    share: whether requests share the pages of a common beginning.
  """

  pages: int = 512
  page_size: int = 64
  longest: int = 0
  running: int = 16
  chunk: int = 256
  run: int = 4
  queue: int = 1024
  share: bool = True

  def __post_init__(self):
    for name in ("pages", "page_size", "running", "chunk", "run", "queue"):
      if getattr(self, name) < 1:
        raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
    most = self.pages * self.page_size
    if not 0 <= self.longest <= most:
      raise ConfigError(f"longest={self.longest} tokens are more than pages={self.pages} of "
                        f"{self.page_size} hold; at most {most}")

  @property
  def limit(self) -> int:
    """Tokens that one request may have."""
    return self.longest or self.pages * self.page_size


class Batches:
  """Runs batches of jobs; holds the cache's pools.

  Args:
    cfg: the model.
    weights: of `parameters.prepare`.
    settings: sizes.
    runtime: implementations.
    cache_dtype: of the cache; "": the weights'.
    stop: tokens that end any request.
    vocabulary: ids from here on only pad the model's vocabulary and are never drawn; 0: none.

  Attributes:
    ranks: devices that have sequences of their own, each with `settings.pages` pages and up to
      `settings.running` jobs that decode.
  """

  def __init__(self, cfg: config.Model, weights: Parameters, settings: Settings,
               runtime: config.Runtime, cache_dtype: str, stop: frozenset[int], vocabulary: int):
    self.ranks = 1
    self._cfg, self._weights, self._settings = cfg, weights, settings
    self._call: dict[str, Any] = dict(drafts=0, cfg=cfg, runtime=runtime)
    self._dtype = cache_dtype or runtime.compute_dtype
    self._ends = np.array(sorted(stop), np.int32)
    self._tops = min(TOPS, cfg.vocab_size)
    self._forbidden_V = None
    if 0 < vocabulary < cfg.vocab_size:
      self._forbidden_V = np.zeros(cfg.vocab_size, np.float32)
      self._forbidden_V[vocabulary:] = -np.inf
    self._table = -(-settings.limit // settings.page_size)  # N, pages that a request may have
    self._sizes = [settings.chunk]
    while self._sizes[-1] // 2 >= _LEAST:
      self._sizes.append(self._sizes[-1] // 2)
    self.reset()

  def reset(self) -> None:
    """An empty cache."""
    s = self._settings
    self._layers: Any = ()  # two caches at once may be more than there is room for
    plain = config.replace(self._cfg, mtp_depth=0)  # no drafts, so no layers for their modules
    made = cache_lib.make_paged(plain, 1, s.pages, s.page_size, 1, self._dtype)
    # On a device for good, as what comes out of a step is: otherwise the first step compiles anew.
    self._layers = jax.device_put(made.layers, min(
        self._weights.final_norm_D.devices(), key=lambda d: d.id))

  def warm(self, say: Callable[[str], Any]) -> None:
    """Compiles all sizes; `say` hears of each."""
    for first in (True, False):
      for tokens in self._sizes:
        say(f"{'first' if first else 'later'} chunks of prompts, {tokens} tokens")
        self._read([], [0] * tokens, 0, 1, first)
    B = 1
    while B < 2 * self._settings.running:
      say(f"decoding of {B} requests")
      for plain in (True, False):
        self._write([], B, 1, plain)
      B *= 2

  def read(self, jobs: Sequence[Job | None], parts: Sequence[Sequence[int]]) -> decode.New:
    """Runs the next tokens of prompts, one of each rank; draws the one after each.

    Args:
      jobs: of each rank, or None.
      parts: the tokens, none where there is no job.

    Returns:
      Row r is rank r's.
    """
    (job,), (part,) = jobs, parts
    return self._read([job], part, len(part), job.left, job.written == 0)

  def write(self, jobs: Sequence[Sequence[Job]], run: int) -> tuple[decode.New, int]:
    """Up to `run` steps of decoding for jobs whose prompts were run.

    Args:
      jobs: of each rank.
      run: steps.

    Returns:
      What was drawn, and rows a rank: rank r's j-th job has row r * rows + j.
    """
    (jobs,) = jobs
    B = 1
    while B < len(jobs):
      B *= 2
    return self._write(jobs, B, run, all(job.plain for job in jobs)), B

  def _read(self, jobs: list[Job], part: Sequence[int], new: int, left: int, first: bool
            ) -> decode.New:
    size = min(size for size in self._sizes if size >= len(part))
    tokens_1T = np.zeros((1, size), np.int32)
    tokens_1T[0, :len(part)] = part
    state, drawn = decode.prefill(
        self._weights, self._cache(jobs, 1), tokens_1T, np.array([new], np.int32), np.int32(left),
        self._seen(jobs, 1), self._rows(jobs, 1), self._bias(jobs, 1), self._ends, **self._call,
        tops=self._tops, fresh=first)
    self._layers = state.cache.layers
    return drawn

  def _write(self, jobs: list[Job], B: int, run: int, plain: bool) -> decode.New:
    column = lambda values: np.array([*values, *[0] * (B - len(jobs))], np.int32)
    left_B = column([job.left for job in jobs])
    state = decode.State(self._cache(jobs, B), column([job.tokens[-1] for job in jobs]), left_B,
                         None if plain else self._seen(jobs, B), None)
    state, drawn = decode.run(
        self._weights, state, left_B > 0, self._rows(jobs, B),
        self._forbidden_V if plain else self._bias(jobs, B), self._ends, np.int32(run),
        most=self._settings.run, **self._call, tops=0 if plain else self._tops)
    self._layers = state.cache.layers
    return drawn

  def _rows(self, jobs: list[Job], B: int) -> sampler.Rows:
    padding = [sampler.GREEDY] * (B - len(jobs))
    return sampler.rows([job.request.sampling for job in jobs] + padding)

  def _cache(self, jobs: list[Job], B: int) -> Cache:
    pages_BN, lengths_B = np.zeros((B, self._table), np.int32), np.zeros(B, np.int32)
    for b, job in enumerate(jobs):
      pages_BN[b, :len(job.pages)] = job.pages
      lengths_B[b] = job.written
    return Cache(self._layers, lengths_B, pages_BN)

  def _seen(self, jobs: list[Job], B: int) -> np.ndarray:
    seen_BV = np.zeros((B, self._cfg.vocab_size), bool)
    for b, job in enumerate(jobs):
      if job.request.sampling.repetition_penalty != 1:
        seen_BV[b, job.whole] = True
    return seen_BV

  def _bias(self, jobs: list[Job], B: int) -> np.ndarray:
    bias_BV = np.zeros((B, self._cfg.vocab_size), np.float32)
    if self._forbidden_V is not None:
      bias_BV += self._forbidden_V
    for b, job in enumerate(jobs):
      if job.bias_V is not None:
        bias_BV[b] += job.bias_V
    return bias_BV
