"""What a layer keeps between its forward and its backward pass, from the code that keeps it.

The lists follow `model/` and `fp8/` line by line: without a recipe what differentiation asks for
(jax's partial evaluation), with one the residuals of the layers' own derivatives, and under a remat
policy the names that it saves (`model/remat.py`). All numbers are bytes on one device.

A layer that is not looped over (a stack of one, or `runtime.layer_unroll` 0) keeps as if remat were
"none": `jax.checkpoint` runs there with prevent_cse=False, and XLA merges the recomputation with the
first pass. XLA also finds attention's score tiles in both passes equal, and keeps them.
"""

import functools
import math
from typing import NamedTuple

from dsv3_jax import config
from dsv3_jax.cost import arrays
from dsv3_jax.fp8 import recipes
from dsv3_jax.parallel.room import Room, room

FP32 = 4
_UNROLL = 10  # of pallas_kernels/xla/attention.py: tiles up to which the loop is unrolled
_BITS = {"e4m3": 8, "e5m2": 8, "e5m6": 12}


class Shape(NamedTuple):
  """What one device computes of one micro-batch in one layer.

  Attributes:
    sequences, length: B and T of this device.
    rows: M, rows of the experts' matmuls, padding included.
    experts: e, routed experts of this device.
    arrived: Z, token rows that reach this device's experts; P where all experts are here.
    room: of dispatch's buffers; None where all experts are here.
  """

  sequences: int
  length: int
  rows: int
  experts: int
  arrived: int
  room: Room | None

  @property
  def tokens(self) -> int:
    return self.sequences * self.length


def itemsize(runtime: config.Runtime) -> int:
  """Bytes of a number in the compute dtype."""
  return 2 if runtime.compute_dtype == "bfloat16" else 4


def operand(text: str, rows: int, columns: int, item: int) -> int:
  """Bytes of an array [rows, columns] held as a recipe's text says; `item`: of "compute"."""
  words = text.split()
  if words[0] not in _BITS:
    return rows * columns * {"compute": item, "bf16": 2, "fp32": 4}[words[0]]
  codes = rows * columns if words[0] != "e5m6" else rows * 3 * -(-columns // 2)
  tile = (rows, columns) if words[1] == "tensor" else tuple(map(int, words[1].split("x")))
  scales = math.prod(-(-n // t) for n, t in zip((rows, columns), tile, strict=True))
  return codes + scales * (1 if words[2] == "pow2" else 4)


def quantizes(runtime: config.Runtime) -> bool:
  """Whether linear layers run under a recipe at all (`fp8/recipe.resolve`)."""
  plain = {"compute", {"float32": "fp32", "bfloat16": "bf16"}[runtime.compute_dtype]}
  texts = [v for v in vars(recipes.merged(runtime)).values() if isinstance(v, str)]
  return runtime.recipe != "none" and not set(texts) <= plain


def block_rows(pairs: int, experts: int) -> int:
  """As `model.moe.block_rows` where no FP8 kernel has a block of its own."""
  share = max(pairs // (4 * experts), 1)
  return min(max(2 ** int(math.log2(share)), 8), 64)


@functools.cache
def shape(cfg: config.Config, kernels: bool = False) -> Shape:
  """Sizes of a layer on one device. `kernels`: FP8 kernels run, whose blocks have 128 rows."""
  mesh, m = cfg.runtime.mesh, cfg.model.moe
  micro = cfg.data.microbatch or cfg.data.batch_size
  B, T = micro // mesh.batch_shards, cfg.data.sequence_length
  pairs, devices = B * T * m.active, mesh.node * mesh.gpu
  local = m.experts // devices
  block = 128 if kernels and quantizes(cfg.runtime) else block_rows(pairs, local)
  if devices == 1:
    return Shape(B, T, (pairs // block + min(local, pairs)) * block, local, B * T, None)
  sizes = tuple(n for n in (mesh.node, mesh.gpu) if n > 1)
  form = cfg.runtime.dispatch.form
  form = "flat" if form == "two_hop" and len(sizes) == 1 else form
  limit = m.active_groups if m.groups % mesh.node == 0 else 0
  space = room(B * T, m.active, local, sizes, form, cfg.runtime.dispatch.factor, limit)
  rows = (space.pairs // block + min(local, space.pairs)) * block
  return Shape(B, T, rows, local, space.arrived, space)


def policy(runtime: config.Runtime, depth: int) -> str:
  """The remat policy that has an effect on a stack of so many layers; see the module docstring."""
  if runtime.schedule == "none" and (depth == 1 or runtime.layer_unroll == 0
                                     or runtime.layer_unroll >= depth):
    return "none"
  return runtime.remat


def layer(cfg: config.Config, s: Shape, moe: bool, remat: str) -> dict[str, int]:
  """Bytes that one layer keeps for one micro-batch, by what they are; weights are not among them."""
  item, D = itemsize(cfg.runtime), cfg.model.dim
  if remat == "layer":
    return {"block input": s.tokens * D * item}
  found = _attention(cfg, s, remat)
  return found | (_moe(cfg, s, remat) if moe else _dense(cfg, s, remat))


def _norm(item: int) -> int:
  """Bytes a value of RMSNorm's input: kept are it and two products, in bf16 also its fp32 copy."""
  return 12 if item == 4 else 10


def _attention(cfg: config.Config, s: Shape, remat: str) -> dict[str, int]:
  a, D, P, item = cfg.model.attention, cfg.model.dim, s.tokens, itemsize(cfg.runtime)
  texts, quantized = recipes.merged(cfg.runtime), quantizes(cfg.runtime)
  H, K, U, Q, C = a.heads, a.qk_dim, a.v_dim, a.q_rank, a.kv_rank
  gqa = a.kind == "gqa"
  J = (a.kv_heads or H) if gqa else H
  joined = quantized and texts.output_cache.startswith("e5m6")
  cache = operand(texts.output_cache, P, H * U, item) if quantized else P * H * U * item
  found = {"attention output": cache if joined else P * H * U * item,
           "attention log-sum-exp": P * H * FP32}
  if remat == "report":
    latents = 0 if gqa else (Q + C + a.rope_dim)
    return found | {"block input": P * D * item, "latents": P * latents * item,
                    "residual after attention": P * D * item}
  inputs = [(D, 3 if gqa else 2)] + ([] if gqa else [(Q, 1), (C, 1)])
  found["linear inputs"] = sum(
      operand(texts.fprop_x, P, n, item) if quantized else P * n * times * item
      for n, times in inputs if n)
  if not joined:  # the projection's own copy of its input
    found["linear inputs"] += cache
  found["norms"] = P * _norm(item) * (2 * D + (0 if gqa else Q + C))
  found["queries, keys, values"] = P * item * (H * K + J * (K + U))
  return found


def _dense(cfg: config.Config, s: Shape, remat: str) -> dict[str, int]:
  return _swiglu(cfg, s.tokens, cfg.model.dense_ffn_dim, remat, 2, "feed-forward")


def _swiglu(cfg, P: int, F: int, remat: str, inputs: int, name: str) -> dict[str, int]:
  """A feed-forward that is not routed; `inputs`: copies of its input that are kept."""
  D, item, texts = cfg.model.dim, itemsize(cfg.runtime), recipes.merged(cfg.runtime)
  quantized = quantizes(cfg.runtime)
  if quantized:
    kept = 2 * operand(texts.swiglu_cache, P, F, item)
    kept += operand(texts.fprop_x, P, D, item) if remat == "none" else 0
  else:
    kept = P * item * (2 * F if remat == "report" else 6 * F + inputs * D)
  return {name: kept}


def _moe(cfg: config.Config, s: Shape, remat: str) -> dict[str, int]:
  m, D, item, P, M = cfg.model.moe, cfg.model.dim, itemsize(cfg.runtime), s.tokens, s.rows
  texts, quantized = recipes.merged(cfg.runtime), quantizes(cfg.runtime)
  F, Z = m.ffn_dim, s.arrived
  found = _swiglu(cfg, P, m.shared * F, remat, 1, "shared expert") if m.shared else {}
  if quantized:
    found["dispatched rows"] = operand(texts.dispatch_x, Z, D, item)
    found["routed experts"] = 2 * operand(texts.swiglu_cache, M, F, item)
  else:
    found["dispatched rows"] = (M if s.room is None or remat == "none" else Z) * D * item
    found["routed experts"] = M * item * (2 * F if remat == "report" else 7 * F)
  if remat == "none":
    found["router"] = P * (FP32 * 2 * m.experts + (FP32 * D if item == 2 else 0))
  # Integers of the plan and gates: which pair stands in which row, and the reverse.
  plan = FP32 * M
  if s.room is not None or remat == "none":
    plan += FP32 * (2 * M + Z * 4 * m.active)
  return found | {"plan": plan}


def stacked_weights(cfg: config.Config, s: Shape, moe: bool, remat: str) -> int:
  """Bytes of one layer's weights that a loop over layers keeps for its backward pass.

  Without remat the loop saves each layer's weights as they are multiplied: cast, and those of
  attention and of the experts' joint projection rearranged.
  """
  if remat != "none":
    return 0
  runtime, item = cfg.runtime, itemsize(cfg.runtime)
  total = 0
  for name, dims in arrays.block(cfg.model, moe).items():
    array = arrays.Array("", name, dims)
    if not array.linear:
      continue
    size = arrays.in_use(array, runtime)
    ffn = name.rpartition("_")[2] in ("DF", "FD", "EFD")
    if quantizes(runtime):
      total += size if recipes.merged(runtime).fprop_w[:2] == "e4" else size * item
    elif item == 2 or not ffn:
      total += size * item
  return total


def scores(cfg: config.Config, s: Shape) -> int:
  """Bytes of score tiles, and of blocks of q, k and v, that a layer outside a loop keeps."""
  a, T = cfg.model.attention, s.length
  size = cfg.runtime.attention_block or attention_block(T)
  size = min(size, T)
  blocks = -(-T // size)
  tiles = blocks * (blocks + 1) // 2
  if tiles > _UNROLL:
    return 0
  item = itemsize(cfg.runtime)
  tile = s.sequences * a.heads * size * size * (FP32 if item == 4 else FP32 + 2)
  return tiles * tile + s.tokens * a.heads * (2 * a.qk_dim + a.v_dim) * item


def attention_block(length: int) -> int:
  """As `pallas_kernels.xla.attention.default_block`."""
  if length <= 512:
    return min(max(length // 4 // 64 * 64, 64), 128)
  return min(max(length // 16 // 128 * 128, 128), 512)
