"""What one device does to one micro-batch in one layer: a list of kernels with FLOPs and bytes.

Three kinds. A *matmul* is limited by the matrix units and then by its results' way to memory. An
*attention* kernel by the matrix units. A *stream* reads and writes memory and computes next to
nothing: norms, casts, transposes, the expansion of rows into expert order. They belong to phases:
forward (F), backward for the input (I), backward for the weights (W).

The list follows the authors' training trace (profile-data), which shows what their kernels fuse:
casts and transposes are kernels of their own, SwiGLU casts its output, routing weights go into
SwiGLU. Recomputed are what `runtime.remat` says: with "report" the norms, MLA's up-projections,
RoPE and SwiGLU; with "layer" the whole forward pass.

FLOPs are two a multiply-add. Those of phases F, I and W together are
`counts.flops_per_token`, which tests hold this list to; recomputation is marked and left out.
"""

import dataclasses
import math
from collections.abc import Iterator

from dsv3_jax import config
from dsv3_jax.fp8 import recipes

SIZES = {"float32": 4, "bfloat16": 2}
FORMATS = ("e4m3", "e5m2", "e5m6")
TILE = 128  # values of K between promotions


@dataclasses.dataclass(frozen=True)
class Kernel:
  """Attributes:
    phase: "F", "I" or "W".
    kind: "matmul", "attention_forward", "attention_backward", "stream" or "cast".
    component: mla, attention, dense, shared, routed, router, mtp, head or other.
    flops: of the multiply-adds; 0 for streams.
    read, written: bytes from and to memory.
    precision: of a matmul's operands: fp8, bf16 or fp32.
    recomputed: a repetition of forward work, which counts as no useful FLOP.
    cast: of a stream that only converts: "row" (what a cast fused with loads would save) or
      "column" (what transposed reads would).
  """

  phase: str
  kind: str
  component: str
  flops: float = 0.0
  read: float = 0.0
  written: float = 0.0
  precision: str = "bf16"
  recomputed: bool = False
  cast: str = ""


@dataclasses.dataclass(frozen=True)
class Numerics:
  """Attributes:
    activation: bytes of an activation.
    operand: bytes of a linear layer's operand.
    plain: precision of matmuls that are not quantized.
    quantized: linear layers run in FP8.
    dispatch, gradient: bytes a value of rows sent to experts, and of gradients sent to them,
      scales included.
    combine: bytes a value on the way back.
    remat: as runtime.remat.
  """

  activation: float
  operand: float
  plain: str
  quantized: bool
  dispatch: float
  gradient: float
  combine: float
  remat: str


def numerics(runtime: config.Runtime) -> Numerics:
  """What a run's dtypes and recipe come to in bytes."""
  size = SIZES[runtime.compute_dtype]
  operands = recipes.merged(runtime)
  sent = runtime.dispatch
  quantized = operands.fprop_x.startswith("e")
  width = lambda text: operand_bytes(text, size)
  return Numerics(
      activation=size, operand=1.0 if quantized else width(operands.fprop_x),
      plain={4: "fp32", 2: "bf16"}[size], quantized=quantized,
      dispatch=width(sent.activations or operands.dispatch_x),
      gradient=width(sent.gradients or operands.dispatch_dy),
      combine=SIZES[sent.combine] if sent.combine else size, remat=runtime.remat)


def operand(text: str, rows: int, columns: int, item: int) -> int:
  """Bytes of an array [rows, columns] held as a recipe's text says; `item`: of "compute"."""
  words = text.split()
  if words[0] not in FORMATS:
    return rows * columns * {"compute": item, "bf16": 2, "fp32": 4}[words[0]]
  codes = rows * columns if words[0] != "e5m6" else rows * 3 * -(-columns // 2)
  tile = (rows, columns) if words[1] == "tensor" else tuple(map(int, words[1].split("x")))
  scales = math.prod(-(-n // t) for n, t in zip((rows, columns), tile, strict=True))
  return codes + scales * (1 if words[2] == "pow2" else 4)


def operand_bytes(text: str, compute: int) -> float:
  """Bytes a value of a large operand, its scales included."""
  side = 2**14
  return operand(text, side, side, compute) / side**2


@dataclasses.dataclass(frozen=True)
class _Linear:
  """x [rows, k] times w [k, n], `held` such weights on this device.

  `cast`: its input is cast by a kernel of its own. `again`: remat="report" repeats it.
  """

  component: str
  rows: float
  k: int
  n: int
  held: float = 1.0
  quantized: bool = True
  cast: bool = True
  again: bool = False


def _linears(cfg: config.Model, tokens: float, moe: bool, experts: float) -> Iterator[_Linear]:
  """The linear layers of a block; `experts` routed ones lie on this device."""
  a, m, D = cfg.attention, cfg.moe, cfg.dim
  up = lambda *args, **kwargs: _Linear("mla", tokens, *args, **kwargs)
  if a.kind == "gqa":
    yield up(D, a.heads * a.qk_dim)
    yield up(D, a.cached, cast=False)  # the same input
  else:
    if a.q_rank:
      yield up(D, a.q_rank)
      yield up(a.q_rank, a.heads * a.qk_dim, again=True)
    else:
      yield up(D, a.heads * a.qk_dim)
    yield up(D, a.kv_rank + a.rope_dim)
    yield up(a.kv_rank, a.heads * (a.nope_dim + a.v_dim), again=True)
  yield up(a.heads * a.v_dim, D)
  if not moe:
    yield _Linear("dense", tokens, D, 2 * cfg.dense_ffn_dim)
    yield _Linear("dense", tokens, cfg.dense_ffn_dim, D, cast=False)  # SwiGLU casts
    return
  yield _Linear("router", tokens, D, m.experts, quantized=False)
  if m.shared:
    yield _Linear("shared", tokens, D, 2 * m.ffn_dim * m.shared)
    yield _Linear("shared", tokens, m.ffn_dim * m.shared, D, cast=False)
  rows = tokens * m.active
  yield _Linear("routed", rows, D, 2 * m.ffn_dim, experts, cast=False)  # cast before it was sent
  yield _Linear("routed", rows, m.ffn_dim, D, experts, cast=False)


def _linear(layer: _Linear, n: Numerics) -> Iterator[Kernel]:
  """Fprop, Dgrad, Wgrad and the casts that they need."""
  quantized = n.quantized and layer.quantized
  width = n.operand if quantized else n.activation
  precision = "fp8" if quantized else n.plain
  flops = 2.0 * layer.rows * layer.k * layer.n
  x, y, w = layer.rows * layer.k, layer.rows * layer.n, layer.held * layer.k * layer.n
  make = lambda phase, read, written: Kernel(
      phase, "matmul", layer.component, flops, read, written, precision)
  yield make("F", width * (x + w), n.activation * y)
  yield make("I", width * (y + w), n.activation * x)
  yield make("W", width * (x + y), 8.0 * w)  # fp32 sums over micro-batches: read and written
  if not quantized:
    return
  cast = lambda phase, kind, read, written: Kernel(
      phase, "cast", layer.component, read=read, written=written, cast=kind)
  if layer.cast:
    yield cast("F", "row", n.activation * x, x)
  routed = layer.component == "routed"
  if not routed:  # gradients of rows sent to experts arrive cast; those of SwiGLU leave it so
    yield cast("I", "row", n.activation * y, y)
  yield cast("I", "column", (1.0 if routed else n.activation) * y, y)  # for Wgrad
  yield cast("I", "column", x, x)


def block(cfg: config.Model, tokens: float, length: int, moe: bool, experts: float, n: Numerics,
          rows_in: float = 0.0, fused: bool = True) -> list[Kernel]:
  """The kernels of one layer.

  Args:
    cfg: the model.
    tokens: of a micro-batch on this device.
    length: T, of a sequence; a causal position attends (T + 1) / 2 keys on average.
    moe: an MoE layer; otherwise one of the dense ones.
    experts: routed experts of a layer on this device.
    n: dtypes and recipe.
    rows_in: distinct rows that a token becomes on other devices (odds.expected_units); 0: none
      travel.
    fused: scores stay on the chip.
  """
  linears = list(_linears(cfg, tokens, moe, experts))
  kernels = [k for layer in linears for k in _linear(layer, n)]
  kernels += _attention(cfg.attention, tokens, length, n, fused)
  kernels += _elementwise(cfg, tokens, moe, n, rows_in)
  return kernels + list(_again(kernels, linears, n))


def _attention(a: config.Attention, tokens: float, length: int, n: Numerics, fused: bool
               ) -> Iterator[Kernel]:
  keys = (length + 1) / 2 * tokens * a.heads
  K, U, s = a.qk_dim, a.v_dim, n.activation
  qkv, o = tokens * a.heads * (2 * K + U) * s, tokens * a.heads * U * s
  yield Kernel("F", "attention_forward", "attention", 2.0 * keys * (K + U), qkv, o, n.plain)
  # Four matmuls, twice those of F; scores that were not kept are a fifth.
  yield Kernel("I", "attention_backward", "attention", 4.0 * keys * (K + U), qkv + 2 * o, qkv,
               n.plain)
  if fused:
    yield Kernel("I", "attention_backward", "attention", 2.0 * keys * K, precision=n.plain,
                 recomputed=True)
  else:  # fp32 scores of all keys: written, softmax, read; and back
    scores = tokens * length * a.heads * 4.0
    yield Kernel("F", "stream", "attention", read=2 * scores, written=2 * scores)
    yield Kernel("I", "stream", "attention", read=4 * scores, written=3 * scores)


def _elementwise(cfg: config.Model, tokens: float, moe: bool, n: Numerics, rows_in: float
                 ) -> Iterator[Kernel]:
  """Norms with residuals, RoPE with the assembly of keys, SwiGLU, the router, permutation."""
  a, m, s, D = cfg.attention, cfg.moe, n.activation, cfg.dim
  out = 1.0 if n.quantized else s
  stream = lambda phase, component, read, written: Kernel(
      phase, "stream", component, read=tokens * read, written=tokens * written)
  latents = a.q_rank + a.kv_rank if a.kind == "mla" else 0
  # F: two norms, two residual additions (one fused with a norm). I: each norm's backward reads x
  # and dy, adds to the residual's gradient.
  yield stream("F", "other", s * (5 * D + latents), s * (4 * D + latents))
  yield stream("I", "other", s * (6 * D + 2 * latents), s * (2 * D + latents))
  if n.remat == "report":
    yield stream("I", "other", s * (2 * D + latents), s * (2 * D + latents))
  keys = a.heads if a.kind == "mla" else a.kv_heads or a.heads
  rotated = (a.heads + (1 if a.kind == "mla" else keys)) * a.rope_dim
  assembled = keys * a.qk_dim if a.kind == "mla" else 0
  for phase in "FI":
    yield stream(phase, "mla", s * (rotated + assembled), s * (rotated + assembled))
  width = (m.shared + m.active) * m.ffn_dim if moe else cfg.dense_ffn_dim
  component = "routed" if moe else "dense"
  kept = 2.0 * width if n.quantized else 0.0  # the FP8 copy of its inputs
  yield stream("F", component, s * 2 * width, out * width + kept)
  yield stream("I", component, (out * 2 + s) * width, (s * 2 + out) * width)
  if not moe:
    return
  for phase in "FI":
    yield stream(phase, "router", 5 * 4.0 * m.experts, 5 * 4.0 * m.experts)
  # Rows into expert order, and the sum of a device's copies on the way back.
  arrive = rows_in or m.active
  for phase, width in (("F", n.dispatch), ("I", n.gradient)):
    yield stream(phase, "routed", (width + s) * m.active * D,
                 width * m.active * D + s * arrive * D)


def _again(kernels: list[Kernel], linears: list[_Linear], n: Numerics) -> Iterator[Kernel]:
  """Forward work that the backward pass repeats."""
  if n.remat == "none":
    return
  if n.remat == "layer":
    for k in kernels:
      if k.phase == "F":
        yield dataclasses.replace(k, phase="I", recomputed=True)
    return
  for layer in linears:
    if layer.again:
      yield from (dataclasses.replace(k, phase="I", recomputed=True)
                  for k in _linear(layer, n) if k.phase == "F")


def head(cfg: config.Model, tokens: float, n: Numerics) -> list[Kernel]:
  """Final norm, head and cross-entropy; logits exist in fp32 for a chunk of tokens at a time."""
  layer = _Linear("head", tokens, cfg.dim, cfg.vocab_size, quantized=False)
  logits = tokens * cfg.vocab_size * 4.0
  width = tokens * cfg.dim * n.activation
  return [*_linear(layer, n),
          Kernel("F", "stream", "head", read=2 * logits + width, written=logits + width),
          Kernel("I", "stream", "head", read=logits + 2 * width, written=logits + width)]


def mtp_input(cfg: config.Model, tokens: float, n: Numerics) -> list[Kernel]:
  """What an MTP module has beyond a block and the head: two norms and the projection of 2D."""
  width = 2 * tokens * cfg.dim * n.activation
  return [*_linear(_Linear("mtp", tokens, 2 * cfg.dim, cfg.dim, quantized=False), n),
          Kernel("F", "stream", "mtp", read=width, written=width),
          Kernel("I", "stream", "mtp", read=2 * width, written=width)]
