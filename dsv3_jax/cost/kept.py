"""What a layer keeps between its forward and its backward pass, from the code that keeps it.

The lists follow `model/` and `fp8/` line by line: without a recipe what differentiation asks for
(jax's partial evaluation), with one the residuals of the layers' own derivatives, and under a remat
policy the names that it saves (`model/remat.py`). All numbers are bytes on one device.

Where a layer stands decides too:

    loop      in a loop over a stack's layers: XLA for CPUs keeps bf16 residuals in fp32, before
              jaxlib 0.11
    straight  outside of one (a stack of one layer, or `runtime.layer_unroll` 0). `jax.checkpoint`
              has prevent_cse=False, so XLA merges the recomputation with the first pass: remat has
              no effect. On a CPU it finds attention's score tiles in both passes equal as well, and
              under a recipe the dequantized operands, and keeps them.
    stage     in a pipeline's stage: forward and backward are different branches
"""

import functools
import importlib.metadata
import math
from typing import NamedTuple

from dsv3_jax import config
from dsv3_jax.cost import arrays, communication
from dsv3_jax.cost.operations import operand
from dsv3_jax.fp8 import recipes
from dsv3_jax.parallel.room import Room

FP32 = 4
UNROLL = 10  # of pallas_kernels/xla/attention.py: tiles up to which the loop is unrolled


class Shape(NamedTuple):
  """What one device computes of one micro-batch in one layer.

  Attributes:
    sequences, length: B and T of this device.
    rows: M, rows of the experts' matmuls, padding included.
    experts: e, routed experts of this device.
    arrived: Z, token rows that reach this device's experts; P where all experts are here.
    room: of dispatch's buffers; None where all experts are here.
    cpu: whether XLA for CPUs compiles the step.
  """

  sequences: int
  length: int
  rows: int
  experts: int
  arrived: int
  room: Room | None
  cpu: bool

  @property
  def tokens(self) -> int:
    return self.sequences * self.length


def itemsize(runtime: config.Runtime) -> int:
  """Bytes of a number in the compute dtype."""
  return 2 if runtime.compute_dtype == "bfloat16" else 4


def operands(runtime: config.Runtime) -> config.FP8:
  """The recipe's operands as texts, overrides applied (`fp8/recipes.merged`)."""
  return _operands(runtime.recipe, runtime.fp8)


@functools.cache
def _operands(recipe: str, fp8: config.FP8) -> config.FP8:
  return recipes.merged(config.Runtime(recipe=recipe, fp8=fp8))


def quantizes(runtime: config.Runtime) -> bool:
  """Whether linear layers run under a recipe at all (`fp8/recipe.resolve`)."""
  plain = {"compute", {"float32": "fp32", "bfloat16": "bf16"}[runtime.compute_dtype]}
  texts = {v for v in vars(operands(runtime)).values() if isinstance(v, str)}
  return runtime.recipe != "none" and not texts <= plain


def block_rows(pairs: int, experts: int) -> int:
  """As `model.moe.block_rows` where no FP8 kernel has a block of its own."""
  share = max(pairs // (4 * experts), 1)
  return min(max(2 ** int(math.log2(share)), 8), 64)


@functools.cache
def shape(cfg: config.Config, cpu: bool = True) -> Shape:
  """Sizes of a layer on one device. Without `cpu` FP8 kernels run, whose blocks have 128 rows."""
  mesh, m = cfg.runtime.mesh, cfg.model.moe
  micro = cfg.data.micro_batch
  B, T = micro // mesh.batch_shards, cfg.data.sequence_length
  pairs, devices = B * T * m.active, mesh.node * mesh.gpu
  local = m.experts // devices
  block = block_rows(pairs, local) if cpu or not quantizes(cfg.runtime) else 128
  if devices == 1:
    return Shape(B, T, (pairs // block + min(local, pairs)) * block, local, B * T, None, cpu)
  space = communication.room_of(m, cfg.runtime, B * T)
  rows = (space.pairs // block + min(local, space.pairs)) * block
  senders = mesh.gpu if len(space.slots) == 2 else devices
  arrived = senders * space.slots[-1] if space.slots[-1] else devices * B * T
  return Shape(B, T, rows, local, arrived, space, cpu)


def policy(runtime: config.Runtime, depth: int) -> str:
  """The remat policy that has an effect on a stack of so many layers; see the module docstring."""
  return runtime.remat if runtime.schedule != "none" or looped(runtime, depth) else "none"


def looped(runtime: config.Runtime, depth: int) -> bool:
  """Whether a stack of so many layers is looped over, where there is no pipeline."""
  return depth > 1 and 0 < runtime.layer_unroll < depth


@functools.cache
def widens() -> bool:
  """Whether the installed XLA for CPUs keeps bf16 residuals in fp32: before jaxlib 0.11."""
  try:
    version = importlib.metadata.version("jaxlib")
  except importlib.metadata.PackageNotFoundError:
    return False
  return tuple(int(n) for n in version.split(".")[:2]) < (0, 11)


class _Layer(NamedTuple):
  """What the lists below read.

  Attributes:
    texts: the recipe's operands; None without a recipe, and where operands are kept dequantized.
    item: bytes of a residual; wide: of a linear layer's input.
    place, remat: see the module docstring.
  """

  cfg: config.Config
  shape: Shape
  texts: config.FP8 | None
  item: int
  wide: int
  place: str
  remat: str


def layer(cfg: config.Config, s: Shape, moe: bool, remat: str, place: str = "loop"
          ) -> dict[str, int]:
  """Bytes that one layer keeps for one micro-batch, by what they are, without weights."""
  item = FP32 if s.cpu and place == "loop" and widens() else itemsize(cfg.runtime)
  if remat == "layer":
    return {"block input": s.tokens * cfg.model.dim * item}
  texts = operands(cfg.runtime) if quantizes(cfg.runtime) else None
  wide = item
  if s.cpu and place == "straight":
    texts, wide, item = None, FP32 if widens() else item, FP32 if texts else item
  of = _Layer(cfg, s, texts, item, wide, place, remat)
  if moe:
    return _attention(of) | _moe(of)
  return _attention(of) | _swiglu(of, cfg.model.dense_ffn_dim, 2, "feed-forward")


def norm(item: int, place: str) -> int:
  """Bytes a value of RMSNorm's input that are kept.

  It and two products, of which one is twice the input, which XLA makes again outside of a loop; in
  bf16 also its fp32 copy.
  """
  if item == FP32:
    return 8 if place == "straight" else 12
  return 10


def _attention(of: _Layer) -> dict[str, int]:
  a, D, item, texts = of.cfg.model.attention, of.cfg.model.dim, of.item, of.texts
  P = of.shape.tokens
  H, K, U, Q, C = a.heads, a.qk_dim, a.v_dim, a.q_rank, a.kv_rank
  gqa = a.kind == "gqa"
  joined = texts is not None and texts.output_cache.startswith("e5m6")
  output = operand(texts.output_cache, P, H * U, item) if joined else P * H * U * item
  found = {"attention output": output, "attention log-sum-exp": P * H * FP32}
  if of.remat == "report":
    latents = 0 if gqa else (Q + C + a.rope_dim)
    return found | {"block input": P * D * item, "latents": P * latents * item,
                    "residual after attention": P * D * item}
  inputs = [(D, 3 if gqa else 2)] + ([] if gqa else [(Q, 1), (C, 1)])
  if texts is None:
    found["linear inputs"] = P * of.wide * (sum(n * times for n, times in inputs) + H * U)
  else:  # quantized once for all that read it; the projection after attention has a copy of its own
    found["linear inputs"] = sum(operand(texts.fprop_x, P, n, item) for n, _ in inputs if n) + (
        0 if joined else operand(texts.output_cache, P, H * U, item))
  found["norms"] = P * norm(item, of.place) * (2 * D + (0 if gqa else Q + C))
  found["queries, keys, values"] = P * item * H * (2 * K + U)  # of every head, repeated in gqa
  return found


def _swiglu(of: _Layer, F: int, inputs: int, name: str) -> dict[str, int]:
  """A feed-forward that is not routed; `inputs`: copies of its input that are kept."""
  P, D, texts = of.shape.tokens, of.cfg.model.dim, of.texts
  if texts is not None:
    kept = 2 * operand(texts.swiglu_cache, P, F, of.item)
    return {name: kept + (operand(texts.fprop_x, P, D, of.item) if of.remat == "none" else 0)}
  if of.remat == "report":
    return {name: P * of.item * 2 * F}
  return {name: P * of.item * F * (5 if of.place == "straight" else 6) + P * of.wide * inputs * D}


def _moe(of: _Layer) -> dict[str, int]:
  m, D, s, item, texts = of.cfg.model.moe, of.cfg.model.dim, of.shape, of.item, of.texts
  F, M, P, Z = m.ffn_dim, s.rows, s.tokens, s.arrived
  found = _swiglu(of, m.shared * F, 1, "shared expert") if m.shared else {}
  if texts is not None:
    found["dispatched rows"] = operand(texts.dispatch_x, Z, D, item)
    found["routed experts"] = 2 * operand(texts.swiglu_cache, M, F, item)
  else:
    rows = Z if s.room is not None and of.remat == "report" else M
    found["dispatched rows"] = rows * D * item
    arrays_F = 2 if of.remat == "report" else 6 if of.place == "straight" else 7
    found["routed experts"] = M * item * F * arrays_F
  if of.remat == "none":
    found["router"] = P * FP32 * (2 * m.experts + (D if itemsize(of.cfg.runtime) < FP32 else 0))
  # Integers and gates: which pair stands in which row, and the reverse.
  plan = FP32 * M
  if s.room is not None or of.remat == "none":
    plan += FP32 * (2 * M + Z * 4 * m.active)
  return found | {"plan": plan}


def copied(array: arrays.Array, cfg: config.Config, remat: str) -> bool:
  """Whether a weight is kept for the backward pass as it is multiplied, and not as it lies.

  Without remat those that are cast, and those of attention and of the experts' joint projection,
  which are rearranged.
  """
  if not array.linear or remat != "none":
    return False
  return quantizes(cfg.runtime) or itemsize(cfg.runtime) < FP32 or array.letters not in (
      "DF", "FD", "EFD", "DD")


def tiles(cfg: config.Config, length: int) -> tuple[int, int]:
  """Rows of a tile of blockwise attention, and number of tiles on and below the diagonal."""
  size = min(cfg.runtime.attention_block or attention_block(length), length)
  blocks = -(-length // size)
  return size, blocks * (blocks + 1) // 2


def scores(cfg: config.Config, s: Shape) -> int:
  """Bytes that attention keeps in a layer outside a loop, on a CPU, besides its inputs.

  Score tiles and blocks of q, k and v where tiles are unrolled; else transposed q, k and v, and
  zeros where its loop adds up their gradients.
  """
  a, item = cfg.model.attention, itemsize(cfg.runtime)
  size, count = tiles(cfg, s.length)
  heads = s.tokens * a.heads * (2 * a.qk_dim + a.v_dim)
  if count > UNROLL:
    return heads * (item + FP32)
  tile = s.sequences * a.heads * size * size * (FP32 if item == 4 else FP32 + 2)
  return count * tile + heads * item


def attention_block(length: int) -> int:
  """As `pallas_kernels.xla.attention.default_block`."""
  if length <= 512:
    return min(max(length // 4 // 64 * 64, 64), 128)
  return min(max(length // 16 // 128 * 128, 128), 512)
