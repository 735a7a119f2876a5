"""The compiled functions over jobs of any number and length, padded to a few sizes, and the cache.

A batch is *plain* if logits, temperatures and truncation decide about every token in it; otherwise
penalties, biases and alternatives are computed for all. So there are two programs a size of
decoding, and one (with everything) a size of a prompt's chunk, which `warm` compiles.

Over a mesh each device is a *rank* with jobs and pages of its own, and all run at once (`spmd.py`):
a rank without anything to do has empty rows. How many tokens each expert got is counted on the
way; `watch.py` and `balance.py` say what follows of it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.infer import balance, decode, handover, sampler, slots, spmd
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer.cache import Cache
from dsv3_jax.infer.parameters import Parameters
from dsv3_jax.infer.request import TOPS, Job
from dsv3_jax.infer.watch import Watch
from dsv3_jax.parallel import mesh as mesh_lib

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
    halves: whether decoding and chunks run as two micro-batches, one's tokens on their way to
      experts while the other attends.
    window: seconds between two looks at the experts' load; 0: none.
  """

  pages: int = 512
  page_size: int = 64
  longest: int = 0
  running: int = 16
  chunk: int = 256
  run: int = 4
  queue: int = 1024
  share: bool = True
  halves: bool = False
  window: float = 0.0

  def __post_init__(self):
    if not self.window >= 0:
      raise ConfigError(f"window={self.window} seconds must not be negative; 0 never looks")
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
    weights: of `parameters.prepare`; over a mesh of `slots.place`.
    settings: sizes.
    runtime: implementations; `runtime.mesh` is that of the mesh.
    cache_dtype: of the cache; "": the weights'.
    stop: tokens that end any request.
    vocabulary: ids from here on only pad the model's vocabulary and are never drawn; 0: none.
    mesh: devices; None: the one that the weights are on.
    expert_LI: of a mesh, the expert of each slot of each MoE layer.

  Attributes:
    ranks: devices that have sequences of their own, each with `settings.pages` pages and up to
      `settings.running` jobs that decode.
    dtype: of the cache.
    table: pages that a request may have.
    balancer: of a mesh, or None.
    watch: over the experts' load, to be stepped between two steps.
  """

  def __init__(self, cfg: config.Model, weights: Parameters, settings: Settings,
               runtime: config.Runtime, cache_dtype: str, stop: frozenset[int], vocabulary: int,
               mesh: jax.sharding.Mesh | None = None, expert_LI: np.ndarray | None = None):
    if mesh is not None and runtime.dispatch.overflow == "drop":
      raise ConfigError("runtime.dispatch.overflow='drop' loses tokens; serve with 'rounds'")
    if settings.halves and (mesh is None or mesh.size == 1 or runtime.dispatch.form == "gather"):
      raise ConfigError("halves=True runs two micro-batches so that the tokens of one travel while "
                        "the other computes; on a single device nothing travels, and where "
                        "runtime.dispatch.form='gather' all devices wait for all tokens")
    assert (mesh is None) == (expert_LI is None), "a mesh comes with a placement"
    assert mesh is None or dict(mesh.shape) == {
        a: getattr(runtime.mesh, a) for a in mesh.shape}, (mesh.shape, runtime.mesh)
    self.ranks = 1 if mesh is None else mesh.size
    self.balancer = None if mesh is None else balance.Balancer(cfg, weights, expert_LI, mesh)
    specs = None if mesh is None else slots.specs(weights)
    self._functions = spmd.functions(mesh, specs, settings.halves)
    self._cfg, self._own, self._settings, self._mesh = cfg, weights, settings, mesh
    self._call: dict[str, Any] = dict(drafts=0, cfg=cfg, runtime=runtime)
    self.dtype = cache_dtype or runtime.compute_dtype
    self._ends = np.array(sorted(stop), np.int32)
    self._tops = min(TOPS, cfg.vocab_size)
    self._forbidden_V = None
    if 0 < vocabulary < cfg.vocab_size:
      self._forbidden_V = np.zeros(cfg.vocab_size, np.float32)
      self._forbidden_V[vocabulary:] = -np.inf
    self.table = -(-settings.limit // settings.page_size)  # N
    self._sizes = [settings.chunk]
    while self._sizes[-1] // 2 >= _LEAST:
      self._sizes.append(self._sizes[-1] // 2)
    self.watch = Watch(settings.window, self._taken, self.balancer)
    self.reset()

  @property
  def devices(self) -> frozenset[jax.Device]:
    """That it computes on."""
    return frozenset(self.weights.final_norm_D.devices())

  @property
  def weights(self) -> Parameters:
    """As they are now."""
    return self._own if self.balancer is None else self.balancer.weights

  def use(self, weights: Parameters) -> None:
    """Goes on with other weights of the same model, on one device; what is in the cache is of the
    old ones and goes."""
    assert self.balancer is None
    self._own = weights
    self.reset()

  def reset(self) -> None:
    """An empty cache, and no load."""
    s = self._settings
    self._layers: Any = ()  # two caches at once may be more than there is room for
    plain = config.replace(self._cfg, mtp_depth=0)  # no drafts, so no layers for their modules
    made = jax.eval_shape(lambda: cache_lib.make_paged(
        plain, 1, self.ranks * s.pages, s.page_size, 1, self.dtype))
    # On devices for good, as what comes out of a step is: otherwise the first step compiles anew.
    self._layers = tuple(jnp.zeros(x.shape, x.dtype, device=self._on(mesh_lib.BATCH))
                         for x in made.layers)
    self._load_LE = self._no_load()

  def warm(self, say: Callable[[str], Any], reads: bool = True, writes: bool = True) -> None:
    """Compiles all sizes of what is going to be called; `say` hears of each."""
    for first in (True, False) if reads else ():
      for tokens in self._sizes:
        say(f"{'first' if first else 'later'} chunks of prompts, {tokens} tokens")
        self._read([], [[0] * tokens], first)
    B = 1
    while writes and B < 2 * self._settings.running:
      say(f"decoding of {B} requests" + (" on each device" if self.ranks > 1 else ""))
      for plain in (True, False):
        self._write([], B, 1, plain)
      B *= 2
    if self.balancer is not None:
      say("moving experts")
      self.balancer.warm()
    self.watch.start()

  def read(self, jobs: Sequence[Job | None], parts: Sequence[Sequence[int]]) -> decode.New:
    """Runs the next tokens of prompts, one of each rank; draws the one after each.

    Args:
      jobs: of each rank, or None.
      parts: the tokens, none where there is no job.

    Returns:
      Row r is rank r's.
    """
    return self._read(jobs, parts, all(job is None or job.written == 0 for job in jobs))

  def write(self, jobs: Sequence[Sequence[Job]], run: int) -> tuple[decode.New, int]:
    """Up to `run` steps of decoding for jobs whose prompts were run.

    Args:
      jobs: of each rank.
      run: steps.

    Returns:
      What was drawn, and rows a rank: rank r's j-th job has row r * rows + j.
    """
    B = 1
    while B < max(map(len, jobs)):
      B *= 2
    rows = [job for of in jobs for job in (*of, *[None] * (B - len(of)))]
    drawn = self._write(rows, B, run, all(job.plain for of in jobs for job in of))
    return drawn, B

  def fetch(self, rank: int, pages: Sequence[int]) -> list[jax.Array]:
    """A copy of a device's pages, in blocks (`handover.fetch`)."""
    return handover.fetch(self._layers, rank, self.ranks, pages)

  def store(self, rank: int, pages: Sequence[int], blocks: Sequence[jax.Array]) -> None:
    """Puts blocks of another cache into a device's pages."""
    self._layers = handover.store(self._layers, rank, self.ranks, pages, blocks)

  def _on(self, axes: tuple[str, ...]) -> Any:
    """Where an array lies that is cut over axes of the mesh; the device, if there is no mesh."""
    if self._mesh is not None:
      return mesh_lib.cut(self._mesh, axes)
    return min(self.devices, key=lambda d: d.id)

  def _no_load(self) -> jax.Array:
    return jnp.zeros((self._cfg.moe_layers, self._cfg.moe.experts),
                     device=self._on(()))

  def _taken(self) -> np.ndarray:
    """The load since it was asked for last."""
    load_LE = np.asarray(self._load_LE, np.float64)
    self._load_LE = self._no_load()
    return load_LE

  def _read(self, jobs: Sequence[Job | None], parts: Sequence[Sequence[int]], first: bool
            ) -> decode.New:
    size = min(size for size in self._sizes if size >= max(map(len, parts)))
    tokens_BT, new_B = np.zeros((self.ranks, size), np.int32), np.zeros(self.ranks, np.int32)
    for row, (job, part) in enumerate(zip(jobs, parts)):
      tokens_BT[row, :len(part)] = part
      new_B[row] = len(part) if job is not None else 0
    rows = [*jobs, *[None] * (self.ranks - len(jobs))]
    state, drawn = self._functions.prefill(
        self.weights, self._cache(rows), tokens_BT, new_B, np.int32(1), self._seen(rows),
        self._rows(rows), self._bias(rows), self._ends, **self._call, tops=self._tops, fresh=first)
    self._layers, self._load_LE = state.cache.layers, self._load_LE + state.counts_LE
    return drawn

  def _write(self, jobs: Sequence[Job | None], B: int, run: int, plain: bool) -> decode.New:
    rows = [*jobs, *[None] * (self.ranks * B - len(jobs))]
    column = lambda of: np.array([0 if job is None else of(job) for job in rows], np.int32)
    left_B = column(lambda job: job.left)
    state = decode.State(self._cache(rows), column(lambda job: job.tokens[-1]), left_B,
                         None if plain else self._seen(rows), None, self._load_LE)
    state, drawn = self._functions.run(
        self.weights, state, left_B > 0, self._rows(rows),
        self._forbidden_V if plain else self._bias(rows), self._ends, np.int32(run),
        most=self._settings.run, **self._call, tops=0 if plain else self._tops)
    self._layers, self._load_LE = state.cache.layers, state.counts_LE
    return drawn

  def _rows(self, rows: Sequence[Job | None]) -> sampler.Rows:
    return sampler.rows([sampler.GREEDY if job is None else job.request.sampling for job in rows])

  def _cache(self, rows: Sequence[Job | None]) -> Cache:
    pages_BN = np.zeros((len(rows), self.table), np.int32)
    lengths_B = np.zeros(len(rows), np.int32)
    for b, job in enumerate(rows):
      if job is not None:
        pages_BN[b, :len(job.pages)] = job.pages
        lengths_B[b] = job.written
    return Cache(self._layers, lengths_B, pages_BN)

  def _seen(self, rows: Sequence[Job | None]) -> np.ndarray:
    seen_BV = np.zeros((len(rows), self._cfg.vocab_size), bool)
    for b, job in enumerate(rows):
      if job is not None and job.request.sampling.repetition_penalty != 1:
        seen_BV[b, job.whole] = True
    return seen_BV

  def _bias(self, rows: Sequence[Job | None]) -> np.ndarray:
    bias_BV = np.zeros((len(rows), self._cfg.vocab_size), np.float32)
    if self._forbidden_V is not None:
      bias_BV += self._forbidden_V
    for b, job in enumerate(rows):
      if job is not None and job.bias_V is not None:
        bias_BV[b] += job.bias_V
    return bias_BV
