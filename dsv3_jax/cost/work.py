"""What a moment of the step works with, on top of what it keeps: head, a layer's backward, buffers.

Bytes on one device; see memory.py for the moments. The sizes follow the operations of
`model/cross_entropy.py`, `pallas_kernels/xla/` and `parallel/dispatch.py`.
"""

from dsv3_jax import config
from dsv3_jax.cost import arrays, kept
from dsv3_jax.cost.kept import FP32, Shape


def ends(cfg: config.Config, s: Shape) -> dict[str, int]:
  """Residuals outside the layers: embedding, last norms, MTP's input, gradients of the heads' h."""
  model, item, P = cfg.model, kept.itemsize(cfg.runtime), s.tokens
  D, K = model.dim, model.mtp_depth
  norm = kept.norm(item, "straight" if s.cpu and cfg.runtime.schedule == "none" else "stage")
  remat = "none" if cfg.runtime.schedule == "none" and not kept.looped(cfg.runtime, K) else (
      cfg.runtime.remat)
  found = {"embedding and last norm": P * D * (item + norm), "gradient of the head's input":
           (K + 1) * P * D * item}
  if K:
    found["MTP input"] = K * P * D * (2 * item if remat != "none" else 3 * norm + 3 * item)
  return found


def _chunk(cfg: config.Config, s: Shape) -> tuple[int, int, int]:
  """Tokens and words of a chunk of the loss on one device, and number of chunks."""
  mesh, c = cfg.runtime.mesh, min(cfg.runtime.head_chunk, s.tokens)
  chunks = -(-s.tokens // c)
  if not cfg.runtime.shard_vocab:
    return c, cfg.model.vocab_size, chunks
  devices = mesh.node * mesh.gpu
  return c * devices, cfg.model.vocab_size // devices, chunks


def head(cfg: config.Config, s: Shape) -> tuple[int, int]:
  """The last chunk of the loss: sums of the heads' gradients, and what it works with."""
  (c, V, chunks), item = _chunk(cfg, s), kept.itemsize(cfg.runtime)
  D, K = cfg.model.dim, cfg.model.mtp_depth
  logits, dw = FP32 * c * V, FP32 * D * V
  product = dw + (logits if item == FP32 else logits + item * c * V)
  return (K + (chunks > 1)) * dw, max(2 * logits, product) + 2 * c * D * item


def starts(cfg: config.Config, s: Shape) -> int:
  """Zeros that loops within a loop over layers start from; equal ones are one array."""
  m, D, item = cfg.model.moe, cfg.model.dim, kept.itemsize(cfg.runtime)
  item = FP32 if kept.quantizes(cfg.runtime) else item
  rows = {D, m.ffn_dim} | (set() if kept.quantizes(cfg.runtime) else {2 * m.ffn_dim})
  a, attention = cfg.model.attention, 0
  if kept.tiles(cfg, s.length)[1] > kept.UNROLL:
    attention = s.tokens * a.heads * (2 * a.qk_dim + a.v_dim) * FP32
  return attention + s.rows * item * sum(rows) + FP32 * 3 * s.experts * D * m.ffn_dim


def late_starts(cfg: config.Config, s: Shape) -> int:
  """The same for one layer outside a loop, when its forward is done."""
  item = FP32 if kept.quantizes(cfg.runtime) else kept.itemsize(cfg.runtime)
  return s.rows * item * (cfg.model.dim + cfg.model.moe.ffn_dim)


def weights(cfg: config.Config, depths: dict[str, int], cpu: bool) -> int:
  """Weights besides the masters: quantized, copied for the backward pass, collected from others."""
  runtime, total = cfg.runtime, 0
  item, quantized = kept.itemsize(runtime), kept.quantizes(runtime)
  fp8 = quantized and kept.operands(runtime).fprop_w.startswith("e")
  for a in arrays.parameters(cfg.model):
    values = arrays.in_use(a, runtime) * max(a.depth, 1)
    remat = kept.policy(runtime, depths.get(a.stack, 1))
    loop = kept.looped(runtime, depths.get(a.stack, 0))
    if a.linear and quantized:
      # Both forms, a byte each, or one of two where XLA has no FP8.
      total += values * (2 if fp8 else 2 * item)
      if cpu and not loop:
        total += values * FP32  # dequantized
      elif remat == "none":
        total += values * (1 if fp8 else item)
    elif kept.copied(a, cfg, remat):
      total += values * (FP32 if cpu and loop and kept.widens() else item)
    elif a.name == "head_DV" and item < FP32:
      total += values * item
    elif a.name != "embedding_VD" and arrays.zero_shards(a, runtime) > 1:
      total += values * FP32
  return total


def backward(cfg: config.Config, s: Shape, stack: str, loop: bool) -> int:
  """Backward pass of one layer: what remat makes again, and the larger of experts and attention."""
  runtime, m, D = cfg.runtime, cfg.model.moe, cfg.model.dim
  moe, remat = stack != "dense", cfg.runtime.remat if loop else "none"
  wide = FP32 if s.cpu else kept.itemsize(runtime)
  again = 0
  if remat != "none":
    again = (sum(kept.layer(cfg, s, moe, "none").values())
             - sum(kept.layer(cfg, s, moe, remat).values()))
  experts = wide * (s.rows * (D + 2 * m.ffn_dim) if moe else
                    2 * s.tokens * cfg.model.dense_ffn_dim)
  if kept.quantizes(runtime) and s.cpu and loop:  # dequantized
    experts += s.rows * (D + 3 * m.ffn_dim) * FP32 + FP32 * 3 * s.experts * D * m.ffn_dim
  a = cfg.model.attention
  attention = s.tokens * a.heads * (2 * a.qk_dim + a.v_dim) * (FP32 + wide)
  return again + max(experts, attention) + 2 * s.tokens * D * wide


def exchange(cfg: config.Config, s: Shape) -> int:
  """Buffers of dispatch and combine: what is sent and what arrives, at each hop."""
  if s.room is None:
    return 0
  item, D = kept.itemsize(cfg.runtime), cfg.model.dim
  return 2 * s.arrived * D * item
