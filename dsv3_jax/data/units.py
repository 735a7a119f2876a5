"""Units: the stretches of text that are shuffled, dealt out and held out.

A unit is a document, except that a long one is cut into several: a row of the batch reads its units
one after another, and steps that follow each other should not show it the same text for long. The
split into training and validation is by hash of a document's text, so that it does not depend on
order, and a text never falls on both sides. Only where that leaves one side empty (a single file,
say) are parts of documents held out instead.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv3_jax.data.shards import Shards

SEQUENCES = 4  # longest training unit: longer ones would fill a row of many batches with one text
FEWEST = 64  # units that a corpus of few documents is cut into, if its length allows
PARTS = 256  # parts that a corpus is cut into where whole documents cannot be held out


@dataclasses.dataclass(frozen=True)
class Units:
  """Parallel arrays, one entry a unit; all int64 [units] but `hash`, uint64."""

  source: np.ndarray  # which of the shard folders
  document: np.ndarray  # in that folder
  start: np.ndarray  # first token within the document
  length: np.ndarray  # tokens
  last: np.ndarray  # bool: reaches the document's end
  hash: np.ndarray

  def __len__(self) -> int:
    return len(self.source)

  def take(self, keep: np.ndarray) -> "Units":
    """The units that an index array or mask selects."""
    return Units(*(getattr(self, f.name)[keep] for f in dataclasses.fields(self)))


def held_out(hashes: np.ndarray, fraction: float) -> np.ndarray:
  """Which 64-bit hashes (uint64 [n]) belong to validation: bool [n]."""
  return np.asarray(hashes, np.uint64) < np.uint64(min(fraction * 2.0**64, 2.0**64 - 2048))


def of(corpora: Sequence[Shards]) -> Units:
  """One unit for each document."""
  parts = [s.records for s in corpora]
  length = np.concatenate([p["length"] for p in parts])
  return Units(
      source=np.repeat(np.arange(len(parts)), [len(p) for p in parts]),
      document=np.concatenate([np.arange(len(p)) for p in parts]),
      start=np.zeros_like(length), length=length, last=np.ones(len(length), bool),
      hash=np.concatenate([p["hash"] for p in parts]))


def cut(units: Units, longest: int) -> Units:
  """Cuts units of more than `longest` tokens into equal parts; a part's hash is new."""
  count = np.maximum(1, -(-units.length // longest))
  if count.max(initial=1) == 1:
    return units
  old = np.repeat(np.arange(len(units)), count)
  part = np.arange(len(old)) - np.repeat(np.cumsum(count) - count, count)
  whole, parts = units.length[old], count[old]
  first, end = whole * part // parts, whole * (part + 1) // parts
  return Units(source=units.source[old], document=units.document[old],
               start=units.start[old] + first, length=end - first,
               last=units.last[old] & (part + 1 == parts),
               hash=np.where(parts > 1, _mix(units.hash[old] + part.astype(np.uint64)),
                             units.hash[old]))


def split(units: Units, fraction: float) -> tuple[Units, Units, bool]:
  """Training units, validation units, and whether documents had to be cut for that.

  Validation is ordered by hash: fixed whatever the order of the sources, and any first part of it
  is a fair sample. Fraction 0 holds nothing out.
  """
  out = held_out(units.hash, fraction)
  was_cut = fraction > 0 and (out.all() or not out.any())
  if was_cut:
    units = cut(units, max(64, int(units.length.sum()) // PARTS))
    out = held_out(units.hash, fraction)
  validation = units.take(out)
  return units.take(~out), validation.take(np.argsort(validation.hash, kind="stable")), was_cut


def longest(units: Units, sequence_length: int) -> int:
  """Where to cut training units: at a few sequences, shorter where the units would be too few."""
  limit = SEQUENCES * sequence_length
  while limit // 2 >= sequence_length and (-(-units.length // limit)).sum() < FEWEST:
    limit //= 2
  return limit


def _mix(x: np.ndarray) -> np.ndarray:
  """The finalizer of splitmix64 (Steele et al. 2014): uint64 -> uint64, a bijection."""
  with np.errstate(over="ignore"):
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
