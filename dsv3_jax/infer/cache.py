"""The latent cache: of each token and layer the C + R numbers that MLA attends to, nothing else.

For the released model that is 576 numbers, 61 layers of them in bf16 70,272 bytes a token, where
keys and values of all heads would be 4.2 MB. A cache is contiguous, [B, S, Z] a layer, or paged: a
pool [pages, page size, Z] a layer and a table of page numbers a sequence, the same for all layers.
With dtype "fp8" a token is a record of 8-bit codes (`ops.mla_record`).

Writing is functional; where the cache is donated to the step that writes, XLA writes in place.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax import config, ops
from dsv3_jax.config import ConfigError

DTYPES = ("float32", "bfloat16", "fp8")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """What has been seen of B sequences.

  Attributes:
    layers: [B, S, Z] each, or pools [pages, page size, Z]; the main model's layers, then one for
      each MTP module. Records are int32 [..., words] in place of Z numbers.
    lengths_B: int32, tokens that each sequence has in the cache.
    pages_BN: int32, numbers of each sequence's pages in order, anything beyond its last page; None:
      contiguous.
  """

  layers: tuple[jax.Array, ...]
  lengths_B: jax.Array
  pages_BN: jax.Array | None = None

  @property
  def capacity(self) -> int:
    """Tokens that a sequence has room for."""
    size = self.layers[0].shape[1]
    return size if self.pages_BN is None else size * self.pages_BN.shape[1]


def _entry(cfg: config.Attention, dtype: str) -> tuple[int, jnp.dtype]:
  """Words of a token and their type."""
  if dtype not in DTYPES:
    raise ConfigError(f"cache dtype {dtype!r} must be one of {', '.join(DTYPES)}")
  if dtype == "fp8":
    return ops.mla_record_words(cfg.kv_rank, cfg.rope_dim), jnp.dtype("int32")
  return cfg.cached, jnp.dtype(dtype)


def bytes_per_token(cfg: config.Model, dtype: str = "bfloat16", mtp: bool = False) -> int:
  """Bytes that one token takes in all layers: 70,272 for the released model in bf16 (facts 1.4).

  Args:
    cfg: the model.
    dtype: float32, bfloat16, or fp8 (656 bytes a layer of the released model).
    mtp: count MTP modules' layers too, which speculative decoding needs.
  """
  words, kind = _entry(cfg.attention, dtype)
  return (cfg.layers + mtp * cfg.mtp_depth) * words * kind.itemsize


def make(cfg: config.Model, sequences: int, length: int, dtype: str = "float32") -> Cache:
  """An empty contiguous cache with room for `length` tokens of each sequence."""
  words, kind = _entry(cfg.attention, dtype)
  shape = (sequences, length, words)
  return Cache(tuple(jnp.zeros(shape, kind) for _ in range(cfg.layers + cfg.mtp_depth)),
               jnp.zeros((sequences,), jnp.int32))


def make_paged(cfg: config.Model, sequences: int, pages: int, page_size: int, most_pages: int,
               dtype: str = "float32") -> Cache:
  """An empty paged cache.

  Args:
    cfg: the model.
    sequences: B, slots.
    pages: in each layer's pool, for all sequences together.
    page_size: tokens a page.
    most_pages: N, pages that one sequence may have.
    dtype: of the entries.
  """
  words, kind = _entry(cfg.attention, dtype)
  shape = (pages, page_size, words)
  return Cache(tuple(jnp.zeros(shape, kind) for _ in range(cfg.layers + cfg.mtp_depth)),
               jnp.zeros((sequences,), jnp.int32),
               jnp.zeros((sequences, most_pages), jnp.int32))


def entries(c_BTC: jax.Array, k_rope_BTR: jax.Array, like: jax.Array) -> jax.Array:
  """Latents and rotary keys as entries [B, T, words] of the cache layer `like`."""
  if like.dtype == jnp.int32:
    return ops.mla_record(c_BTC, k_rope_BTR)
  return jnp.concatenate([c_BTC, k_rope_BTR], -1).astype(like.dtype)


def write(layer: jax.Array, entries_BTZ: jax.Array, lengths_B: jax.Array, new_B: jax.Array,
          pages_BN: jax.Array | None) -> jax.Array:
  """A layer with `new_B` entries of each sequence from position `lengths_B` on.

  Entries from `new_B` on are left out, those at negative positions, and those without room.
  """
  t = jnp.arange(entries_BTZ.shape[1], dtype=jnp.int32)
  position_BT = lengths_B[:, None] + t
  valid_BT = (t < new_B[:, None]) & (position_BT >= 0)
  size = layer.shape[1]
  if pages_BN is None:
    rows = jnp.arange(layer.shape[0])[:, None]
    return layer.at[rows, jnp.where(valid_BT, position_BT, size)].set(entries_BTZ, mode="drop")
  place_BT, N = position_BT // size, pages_BN.shape[1]
  page_BT = jnp.take_along_axis(pages_BN, jnp.minimum(place_BT, N - 1), axis=1)
  page_BT = jnp.where(valid_BT & (place_BT < N), page_BT, layer.shape[0])
  return layer.at[page_BT, position_BT % size].set(entries_BTZ, mode="drop")
