"""Training batches through grain: order, transforms, packing, background workers, exact restart.

A micro-batch of J sequences is fed by J lanes. Lane j packs its own endless stream: documents j,
j + J, j + 2J, ... of the shuffled order, epoch after epoch, into row j of every micro-batch. So

- processes and workers take rows, and the batches do not depend on how many of them there are;
- a lane's position is a few integers (documents taken from each pool, offset into the current one),
  because a transformed document is a pure function of (seed, epoch, document): a restart reads one
  document a lane, wherever it is;
- each epoch reads each document exactly once.

With `data.weights` each source is a pool of its own, and a lane draws the pool of its next document
with a frequency proportional to weight over mean length, so that weights are shares of tokens.

Every micro-batch carries the position after it. Therefore prefetched but unused batches need no
care: the state of the iterator is the position of the last micro-batch that was handed out.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dsv3_jax import config
from dsv3_jax.data import fim
from dsv3_jax.data import units as units_lib
from dsv3_jax.data.packing import Packer, Position
from dsv3_jax.data.shards import Shards
from dsv3_jax.data.tokenizer import NewlineSplit, Tokenizer

_GOLDEN = (5**0.5 - 1) / 2
_POOL_STREAM = 2**63  # keeps the draws of pools apart from those of documents

Cursor = tuple[int, ...]  # documents taken from each pool before the current one


@dataclasses.dataclass(frozen=True)
class Recipe:
  """All that a worker needs to make rows; picklable and small."""

  data: config.Data
  folders: tuple[str, ...]  # of the shards, one a source
  tokenizer: Tokenizer

  @property
  def rows(self) -> int:
    """J, sequences of a micro-batch over all processes."""
    return self.data.micro_batch


class Documents:
  """The endless stream of transformed training documents of each lane."""

  def __init__(self, recipe: Recipe):
    data = self._data = recipe.data
    self._rows, self._tokenizer = recipe.rows, recipe.tokenizer
    self._shards = [Shards(f) for f in recipe.folders]
    units, _, _ = units_lib.split(units_lib.of(self._shards), data.validation_fraction)
    self._units = units_lib.cut(units, units_lib.longest(units, data.sequence_length))
    self._split = NewlineSplit(recipe.tokenizer) if data.split_rate else None
    if data.weights:
      self._pools = [np.flatnonzero(self._units.source == i) for i in range(len(self._shards))]
      means = np.array([self._units.length[pool].mean() for pool in self._pools])
      chances = np.asarray(data.weights) / means
      self._thresholds = np.cumsum(chances / chances.sum())
    else:
      self._pools, self._thresholds = [np.arange(len(self._units))], np.ones(1)

  @property
  def pools(self) -> int:
    return len(self._pools)

  def tokens(self, lane: int, cursor: Cursor) -> np.ndarray:
    """The document that a lane stands at, as it is packed: int32 [n]."""
    pool = self._pool(lane, cursor)
    members = self._pools[pool]
    epoch, index = divmod(cursor[pool] * self._rows + lane, len(members))
    return self._transform(int(members[self._shuffle(index, len(members), pool, epoch)]), epoch)

  def advance(self, lane: int, cursor: Cursor) -> Cursor:
    """The cursor of the lane's next document."""
    pool = self._pool(lane, cursor)
    return tuple(n + (i == pool) for i, n in enumerate(cursor))

  def _pool(self, lane: int, cursor: Cursor) -> int:
    if len(self._pools) == 1:
      return 0
    # Multiples of the golden ratio modulo 1 instead of random numbers: they fill [0, 1) evenly, so
    # that the shares are met closely from the first documents on.
    offset = _generator(self._data.seed, _POOL_STREAM + lane, 0).random()
    draw = (offset + sum(cursor) * _GOLDEN) % 1.0
    return min(int(np.searchsorted(self._thresholds, draw, side="right")), len(cursor) - 1)

  def _shuffle(self, index: int, size: int, pool: int, epoch: int) -> int:
    """The `index`-th entry of the epoch's permutation of `size` entries."""
    if size == 1:
      return 0
    seed = np.random.SeedSequence([self._data.seed, pool, epoch]).generate_state(1)[0]
    return grain.experimental.index_shuffle(index, max_index=size - 1, seed=int(seed), rounds=4)

  def _transform(self, unit: int, epoch: int) -> np.ndarray:
    """A document with bos and eos, some in FIM order, some combined tokens cut."""
    data, tokenizer, units = self._data, self._tokenizer, self._units
    start, length = int(units.start[unit]), int(units.length[unit])
    rng = _generator(data.seed, unit, epoch)
    rearrange = rng.random() < data.fim_rate
    # An isolated later part of a document gets the token before it as context, so that its own
    # first token is predicted too. A rearranged part stands for itself, with bos and eos.
    context = int(data.isolate and start > 0 and not rearrange)
    tokens = self._shards[int(units.source[unit])].tokens(
        int(units.document[unit]), start - context, length + context)
    if rearrange:
      tokens = fim.rearrange(tokens, tokenizer, rng)
    if self._split is not None:
      tokens = self._split(tokens, data.split_rate, rng)
    begins, ends = rearrange or start == 0, rearrange or bool(units.last[unit])
    parts = [[tokenizer.bos]] * begins + [tokens] + [[tokenizer.eos]] * ends
    return np.concatenate(parts).astype(np.int32)


class Rows(grain.IterDataset):
  """Endless micro-batches of some lanes.

  An element is tokens int32 [b, S], segments int32 [b, S] and, for each row, offset and cursor
  after this micro-batch: int64 [b, 1 + pools].
  """

  def __init__(self, recipe: Recipe, lanes: Sequence[int],
               positions: Mapping[int, Position] | None):
    super().__init__()
    self._args = recipe, tuple(lanes), positions

  def __iter__(self) -> grain.DatasetIterator:
    return _RowsIterator(*self._args)


class _RowsIterator(grain.DatasetIterator):

  def __init__(self, recipe: Recipe, lanes: Sequence[int],
               positions: Mapping[int, Position] | None):
    super().__init__()
    self._recipe, self._lanes, self._positions = recipe, lanes, positions
    self._packers: list[Packer] | None = None  # opened where and when the first row is made

  def _open(self) -> list[Packer]:
    documents, data = Documents(self._recipe), self._recipe.data
    start = Position((0,) * documents.pools, 0)
    return [Packer(lambda cursor, lane=lane: documents.tokens(lane, cursor),
                   lambda cursor, lane=lane: documents.advance(lane, cursor),
                   data.sequence_length + 1, data.isolate, (self._positions or {}).get(lane, start))
            for lane in self._lanes]

  def __next__(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if self._packers is None:
      self._packers = self._open()
    rows = [p.next() for p in self._packers]
    positions = [[p.position.offset, *p.position.cursor] for p in self._packers]
    return (np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows]),
            np.asarray(positions, np.int64))

  # The positions travel with the rows, see the module's docstring; grain's own bookkeeping around
  # prefetching asks for a state all the same.
  def get_state(self) -> dict[str, Any]:
    return {}

  def set_state(self, state: dict[str, Any]) -> None:
    raise NotImplementedError("start a new iterator at the wanted positions")


class TrainIterator:
  """Batches {"tokens": int32 [A, b, S]}, with isolation also {"segments": int32 [A, b, S]}.

  A = sequences of the step / micro-batch; b = rows of a micro-batch that this process wants;
  S = T + 1. Reading begins with the first `next` or with `start`.
  """

  def __init__(self, recipe: Recipe, corpus: str, batch_schedule: Callable[[int], int],
               rows: Sequence[int] | None = None):
    """Args:
      recipe: what to read and how.
      corpus: identifies the contents; a state of another corpus is refused.
      batch_schedule: step -> sequences of that step's batch, a multiple of the micro-batch.
      rows: those of each micro-batch that this process wants, ascending; all where None.
    """
    self._recipe, self._corpus, self._schedule = recipe, corpus, batch_schedule
    self._lanes = tuple(range(recipe.rows) if rows is None else rows)
    self._step = 0
    self._positions: dict[int, Position] | None = None
    self._feeds: list[Iterator] | None = None

  def __iter__(self) -> "TrainIterator":
    return self

  def start(self) -> None:
    """Starts the background workers, so that they fill up while the caller does other things."""
    if self._feeds is not None:
      return
    if self._recipe.data.workers:
      _accept_grain_flags()
    data, lanes = self._recipe.data, self._lanes
    depth = data.prefetch * max(1, data.batch_size // self._recipe.rows)
    workers = min(data.workers, len(lanes))
    bounds = np.linspace(0, len(lanes), max(1, workers) + 1).astype(int)
    self._feeds = []
    for i, j in zip(bounds[:-1], bounds[1:], strict=True):
      rows = Rows(self._recipe, lanes[i:j], self._positions)
      if workers:
        rows = rows.mp_prefetch(grain.MultiprocessingOptions(
            num_workers=1, per_worker_buffer_size=max(1, depth)), worker_init_fn=_outlive_signals)
      elif depth:
        rows = grain.experimental.ThreadPrefetchIterDataset(rows, prefetch_buffer_size=depth)
      self._feeds.append(iter(rows))
    for feed in self._feeds:
      feed.start_prefetch()

  def __next__(self) -> dict[str, np.ndarray]:
    self.start()
    wanted, rows = self._schedule(self._step), self._recipe.rows
    if wanted < rows or wanted % rows:
      raise ValueError(f"step {self._step} wants {wanted} sequences, which is not a multiple of "
                       f"the micro-batch of {rows}")
    micro = []
    for _ in range(wanted // rows):
      parts = [next(feed) for feed in self._feeds]
      micro.append([np.concatenate(column) for column in zip(*parts, strict=True)])
    self._step += 1
    self._positions = {lane: Position(tuple(p[1:]), p[0]) for lane, p in
                       zip(self._lanes, micro[-1][2].tolist(), strict=True)}
    batch = {"tokens": np.stack([m[0] for m in micro])}
    if self._recipe.data.isolate:
      batch["segments"] = np.stack([m[1] for m in micro])
    return batch

  def follow(self, state: Any) -> None:
    """Hears of the training state before each batch is asked for. Text does not depend on it."""

  def said(self) -> dict[str, Any]:
    """Numbers about the last batch for the step's line of metrics."""
    return {}

  def get_state(self) -> dict[str, Any]:
    """Where the next batch begins; JSON-able. See `merge_states` for several processes."""
    lanes = {} if self._positions is None else {
        str(lane): [p.offset, *p.cursor] for lane, p in self._positions.items()}
    return {"version": 1, "corpus": self._corpus, "rows": self._recipe.rows, "step": self._step,
            "lanes": lanes}

  def set_state(self, state: Mapping[str, Any] | str | bytes) -> None:
    """Goes to the batch that followed when `state` was taken; a state may come as JSON text.

    Raises:
      ValueError: the state belongs to another corpus or micro-batch, or lacks rows of this process.
    """
    if isinstance(state, str | bytes):
      state = json.loads(state)
    if state.get("version") != 1:
      raise ValueError(f"data iterator state of version {state.get('version')}; 1 is expected")
    if state["corpus"] != self._corpus:
      raise ValueError(f"the checkpoint was trained on corpus {state['corpus']}, this run's data "
                       f"give {self._corpus}: the files of data.sources or the tokenizer changed; "
                       "bring them back, or begin a new workdir")
    if state["rows"] != self._recipe.rows:
      raise ValueError(f"the checkpoint's micro-batch has {state['rows']} sequences, this run's "
                       f"{self._recipe.rows}; set data.microbatch={state['rows']}")
    lanes = state["lanes"]
    missing = [lane for lane in self._lanes if str(lane) not in lanes] if lanes else []
    if missing:
      raise ValueError(f"the data iterator state lacks the rows {missing}; join the states of all "
                       "processes with merge_states")
    self.close()
    self._step = int(state["step"])
    self._positions = {lane: Position(tuple(map(int, lanes[str(lane)][1:])),
                                      int(lanes[str(lane)][0]))
                       for lane in self._lanes} if lanes else None

  def close(self) -> None:
    """Stops the workers; a later `next` starts them again where the iterator stands."""
    for feed in self._feeds or ():
      feed.close()
    self._feeds = None


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Joins the states that all processes took at one step, for a restart on any number of them.

  Processes may share rows.
  """
  first = dict(states[0])
  for state in states[1:]:
    if any(state[key] != first[key] for key in ("version", "corpus", "rows", "step")):
      raise ValueError("the states come from different runs or steps")
  lanes = {lane: p for state in states for lane, p in state["lanes"].items()}
  first["lanes"] = {lane: lanes[lane] for lane in sorted(lanes, key=int)}
  return first


def _outlive_signals(index: int, count: int) -> None:
  """In a worker: leaves signals to the parent, which still wants batches to end in order.

  A terminal's Ctrl-C and a batch system's SIGTERM go to all processes of a group. `close` ends a
  worker by other means; where the parent dies without it, the worker leaves too.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)

  def leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()


def _accept_grain_flags() -> None:
  """Lets grain read its absl flags where no absl program parsed them: notebooks and tests."""
  if not flags.FLAGS.is_parsed():
    for name in flags.FLAGS:
      if name.startswith("grain_"):
        flags.FLAGS[name].present = 1


def _generator(seed: int, stream: int, counter: int) -> np.random.Generator:
  """Random numbers that depend on (seed, stream, counter) alone; counter-based, so no state."""
  return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))
