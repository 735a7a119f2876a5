"""Configuration: frozen dataclasses, validated on construction, one default each.

`Model` fixes the parameter tree, so a checkpoint depends on it and on nothing else here. `Runtime`
says how that model is computed (dtypes, implementations, remat, mesh) and never changes a
parameter's name or shape. `Optim`, `Loss`, `Data` and `Train` describe one training run.

Flow: `experiments/x.py:get_config()` returns a `Config`; the command line turns it into a locked
ConfigDict (`to_dict`), applies `--config.key=value` overrides and comes back through `from_dict`,
which rejects unknown keys and wrong types before any array exists. This file imports the standard
library only.

Fractions: schedule milestones (`lr_constant_until`, ...) are fractions of `train.tokens`, so that a
run shortened tenfold keeps the shape of its schedules. The defaults are the report's milestones
(section 4.2: 10T, 14.3T, 14.633T of 14.8T tokens).
"""

import dataclasses
import difflib
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

REPORT_TOKENS = 14.8e12  # pre-training tokens of the report; milestones below are shares of it


class ConfigError(ValueError):
  """A configuration that cannot run; the message names the key, its value and the fix."""


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise ConfigError(message)


def _positive(section: str, obj: Any, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    _require(value > 0, f"{section}.{name}={value} must be positive")


def _not_negative(section: str, obj: Any, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    _require(value >= 0, f"{section}.{name}={value} must not be negative")


def _one_of(section: str, obj: Any, name: str, allowed: tuple[str, ...]) -> None:
  value = getattr(obj, name)
  if value not in allowed:
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"{section}.{name}={value!r} must be one of {', '.join(allowed)}{hint}")


def _share(section: str, obj: Any, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    _require(0 <= value <= 1, f"{section}.{name}={value} must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN context extension (report 4.3); `factor=1` switches it off."""

  factor: float = 1.0  # s: the context grows from original_length to factor * original_length
  original_length: int = 4096
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  mscale: float = 1.0
  mscale_all_dim: float = 1.0

  def __post_init__(self):
    _require(self.factor >= 1, f"model.attention.yarn.factor={self.factor} must be at least 1")
    _positive("model.attention.yarn", self, "original_length", "beta_fast", "beta_slow")
    _not_negative("model.attention.yarn", self, "mscale_all_dim")


@dataclasses.dataclass(frozen=True)
class Attention:
  """Multi-head latent attention (report 2.1.1). Letters: H, Q, C, N, R, U; J key-value heads.

  Kind "gqa" is what it is compared with: J full keys and values a token,
  multi-head attention where J = H, multi-query where J = 1. It has no use for the ranks and
  latent_norm_eps.
  """

  kind: str = "mla"  # or gqa
  heads: int = 8
  kv_heads: int = 0  # J, of gqa; 0: as many as heads
  q_rank: int = 128  # Q; 0 projects queries directly from the model width
  kv_rank: int = 64  # C
  nope_dim: int = 32  # N, per head; gqa also takes 0, which rotates the whole head
  rope_dim: int = 16  # R, per head for queries, shared by the heads for the key
  v_dim: int = 32  # U, per head
  latent_norm_eps: float = 1e-6  # of the norms on the two latents; released code fixes it
  rope_theta: float = 10_000.0
  yarn: Yarn = Yarn()

  def __post_init__(self):
    s = "model.attention"
    _one_of(s, self, "kind", ("mla", "gqa"))
    _positive(s, self, "heads", "kv_rank", "rope_dim", "v_dim", "rope_theta", "latent_norm_eps")
    _not_negative(s, self, "q_rank", "nope_dim", "kv_heads")
    _require(self.kind == "gqa" or self.nope_dim > 0, f"{s}.nope_dim=0 is for {s}.kind='gqa'")
    _require(self.kind == "gqa" or self.kv_heads == 0,
             f"{s}.kv_heads={self.kv_heads} is for {s}.kind='gqa'; mla has one latent, leave it 0")
    _require(self.heads % (self.kv_heads or 1) == 0,
             f"{s}.kv_heads={self.kv_heads} must divide {s}.heads={self.heads}")
    _require(self.rope_dim % 2 == 0, f"model.attention.rope_dim={self.rope_dim} must be even")
    _require(self.yarn.factor == 1 or self.rope_theta > 1,
             f"model.attention.rope_theta={self.rope_theta} must exceed 1 under YaRN "
             "(model.attention.yarn.factor)")

  @property
  def qk_dim(self) -> int:
    """K = N + R, the width of a query or key head."""
    return self.nope_dim + self.rope_dim

  @property
  def cached(self) -> int:
    """Numbers a token and layer that decoding has to keep: Z = C + R, or J keys and values."""
    if self.kind == "mla":
      return self.kv_rank + self.rope_dim
    return (self.kv_heads or self.heads) * (self.qk_dim + self.v_dim)


@dataclasses.dataclass(frozen=True)
class MoE:
  """DeepSeekMoE feed-forward (report 2.1.2). Letters: E, A, G, F."""

  experts: int = 16  # E, routed
  active: int = 4  # A, routed experts a token
  shared: int = 1
  ffn_dim: int = 128  # F of one expert
  groups: int = 4  # G; one group is the experts of one node
  active_groups: int = 2  # M of the report: a token visits at most this many groups
  group_top: int = 2  # a group's score sums its this many largest biased affinities (A / M)
  gate: str = "sigmoid"  # affinity: sigmoid, or softmax as in V2
  normalize: bool = True  # gates divided by the sum over the selected experts
  scale: float = 2.5  # routed scaling factor, on the gates

  def __post_init__(self):
    s = "model.moe"
    _positive(s, self, "experts", "active", "ffn_dim", "groups", "active_groups", "group_top")
    _not_negative(s, self, "shared")
    _one_of(s, self, "gate", ("sigmoid", "softmax"))
    _require(self.experts % self.groups == 0,
             f"{s}.groups={self.groups} must divide {s}.experts={self.experts}")
    _require(self.active_groups <= self.groups,
             f"{s}.active_groups={self.active_groups} exceeds {s}.groups={self.groups}")
    per_group = self.experts // self.groups
    _require(self.active <= self.active_groups * per_group,
             f"{s}.active={self.active} exceeds what {self.active_groups} groups of {per_group} "
             f"experts hold; lower it to {self.active_groups * per_group} or raise "
             f"{s}.active_groups")
    _require(self.groups == self.active_groups or self.group_top <= per_group,
             f"{s}.group_top={self.group_top} exceeds the {per_group} experts of a group")


@dataclasses.dataclass(frozen=True)
class Model:
  """Everything that fixes the parameter tree. Letters: V, D, L."""

  vocab_size: int = 8192  # V
  dim: int = 256  # D
  layers: int = 4
  dense_layers: int = 1  # the first layers carry a dense feed-forward instead of the MoE
  dense_ffn_dim: int = 768
  attention: Attention = Attention()
  moe: MoE = MoE()
  mtp_depth: int = 1  # multi-token prediction modules (report 2.2)
  mtp_input: str = "normed"  # h^0 fed to MTP: after ("normed") or before ("raw") the final norm
  norm_eps: float = 1e-6
  init_std: float = 0.006

  def __post_init__(self):
    s = "model"
    _positive(s, self, "vocab_size", "dim", "layers", "dense_ffn_dim", "norm_eps", "init_std")
    _not_negative(s, self, "dense_layers", "mtp_depth")
    _one_of(s, self, "mtp_input", ("normed", "raw"))
    _require(self.dense_layers <= self.layers,
             f"{s}.dense_layers={self.dense_layers} exceeds {s}.layers={self.layers}")

  @property
  def moe_layers(self) -> int:
    return self.layers - self.dense_layers


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Device mesh: devices along each axis; the product must not exceed the devices present.

  A micro-batch's sequences are cut over data, node and gpu, their tokens over context, routed
  experts over node and gpu, layers over pipe.
  """

  pipe: int = 1
  data: int = 1
  node: int = 1  # joined by slow links
  gpu: int = 1  # within a node
  context: int = 1  # parts of each sequence; see parallel/context.py

  def __post_init__(self):
    _positive("runtime.mesh", self, "pipe", "data", "node", "gpu", "context")

  @property
  def batch_shards(self) -> int:
    """Devices among which the sequences of a micro-batch are divided."""
    return self.data * self.node * self.gpu

  @property
  def devices(self) -> int:
    return self.pipe * self.context * self.batch_shards

  def describe(self, *axes: str) -> str:
    """For messages: those of the axes (all of them by default) that exceed 1, as a product."""
    sizes = {a: getattr(self, a) for a in axes or ("pipe", "data", "context", "node", "gpu")}
    return (" * ".join(f"runtime.mesh.{a}={n}" for a, n in sizes.items() if n > 1)
            or "runtime.mesh of one device")


SCHEDULES = ("auto", "none", "gpipe", "1f1b", "zb1p", "dualpipe", "dualpipe_v")


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """In which order micro-batches pass the stages (report 3.2.1); see parallel/schedules.

  auto is dualpipe_v where runtime.mesh.pipe exceeds 1, and none on a pipe of 1. There dualpipe_v
  can be asked for too: it runs the forward of one micro-batch beside the backward of another.
  """

  schedule: str = "auto"
  layers: tuple[int, ...] = ()  # of each stage; empty: evenly

  def __post_init__(self):
    _one_of("runtime.pipeline", self, "schedule", SCHEDULES)
    _require(all(n >= 0 for n in self.layers),
             f"runtime.pipeline.layers={self.layers} must not be negative")


@dataclasses.dataclass(frozen=True)
class Dispatch:
  """How tokens reach experts that lie on other devices (report 3.2.2); see parallel/dispatch.py.

  Formats of what is sent are for runs without a recipe, which says itself how rows travel
  (runtime.fp8.dispatch_x, dispatch_dy).
  """

  form: str = "two_hop"  # two_hop: once to each node, then within it; flat; gather: all to all
  transport: str = "dense"  # dense: whole buffers; ragged: their filled part (not on a CPU)
  factor: float = 0.0  # room in buffers over the mean share; 0: for the worst case
  overflow: str = "rounds"  # what finds no room goes in further rounds, or is dropped and counted
  activations: str = ""  # forward, such as "e4m3 1x128 pow2"; empty: as they are
  gradients: str = ""  # backward
  combine: str = ""  # dtype of sums on their way back: bfloat16, float32; empty: as it is

  def __post_init__(self):
    s = "runtime.dispatch"
    _one_of(s, self, "form", ("two_hop", "flat", "gather"))
    _one_of(s, self, "transport", ("dense", "ragged"))
    _one_of(s, self, "overflow", ("rounds", "drop"))
    _one_of(s, self, "combine", ("", "bfloat16", "float32"))
    _not_negative(s, self, "factor")
    _require(self.form != "gather" or self.transport == "dense",
             f"{s}.transport={self.transport!r}: form='gather' sends whole arrays; use 'dense'")
    for name in ("activations", "gradients"):
      value = getattr(self, name)
      _require(not value or re.fullmatch(r"(e4m3|e5m2) 1x[1-9]\d* (fp32|pow2)", value) is not None,
               f"{s}.{name}={value!r} must be empty or 'FORMAT 1xCOLUMNS SCALES' such as "
               "'e4m3 1x128 pow2'")


RECIPES = ("none", "fp32", "bf16", "v3", "v3_pow2", "per_tensor_current", "per_tensor_delayed",
           "hybrid_e5m2", "block_gradients", "no_promotion")
_OPERAND = r"compute|bf16|fp32|(e4m3|e5m2|e5m6) (tensor|[1-9]\d*x[1-9]\d*) (fp32|pow2)( delayed)?"


@dataclasses.dataclass(frozen=True)
class FP8:
  """How the linear layers' three matmuls are quantized (report 3.3); see dsv3_jax/fp8/recipe.py.

  None means: as `runtime.recipe` says. An operand is written "format tile scales", such as
  "e4m3 1x128 pow2": format e4m3, e5m2 or (caches only) e5m6; tile rows x columns of one scale, or
  "tensor"; scales fp32 or pow2; a fourth word "delayed" takes a tensor's amax from its history.
  Rows are tokens and columns channels; rows of a weight are its inputs. "compute", "bf16" and
  "fp32" are operands that are not quantized.
  """

  fprop_x: str | None = None  # y = x w
  fprop_w: str | None = None
  dgrad_dy: str | None = None  # dx = dy w^T
  dgrad_w: str | None = None  # of w as it lies, not of its transpose
  wgrad_x: str | None = None  # dw = x^T dy
  wgrad_dy: str | None = None
  output_x: str | None = None  # fprop_x of the projection after attention
  output_cache: str | None = None  # what that projection keeps of its input
  dispatch_x: str | None = None  # fprop_x of the routed experts: rows are sent like this
  dispatch_dy: str | None = None  # gradient that enters the routed experts' down-projections
  swiglu_cache: str | None = None  # what a SwiGLU keeps of its two inputs
  interval: int | None = None  # values of k between promotions to fp32; 0: none. Needs bits
  bits: int | None = None  # of the emulated tensor core's accumulation, 14 on Hopper; 0: fp32
  floor: float | None = None  # least amax of activations and weights
  gradient_floor: float | None = None  # least amax of gradients
  history: int | None = None  # steps that a delayed amax looks back

  def __post_init__(self):
    s = "runtime.fp8"
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type == "str | None" or field.type == str | None:
        _require(value is None or re.fullmatch(_OPERAND, value) is not None,
                 f"{s}.{field.name}={value!r} must be compute, bf16, fp32 or "
                 "'FORMAT TILE SCALES' such as 'e4m3 1x128 pow2' or 'e4m3 tensor fp32 delayed'")
        _require(value is None or "e5m6" not in value or field.name.endswith("_cache"),
                 f"{s}.{field.name}={value!r}: e5m6 is for caches (output_cache, swiglu_cache); a "
                 "matmul takes e4m3 or e5m2")
        _require(value is None or "delayed" not in value or
                 ("tensor" in value and field.name in ("fprop_x", "dgrad_dy", "output_x",
                                                       "dispatch_x", "dispatch_dy")),
                 f"{s}.{field.name}={value!r}: delayed scaling is for 'tensor' tiles of fprop_x, "
                 "output_x, dispatch_x, dgrad_dy and dispatch_dy; the others are requantized, or "
                 "quantized once a step")
    for name in ("floor", "gradient_floor"):
      value = getattr(self, name)
      _require(value is None or value >= 1e-30, f"{s}.{name}={value} must be at least 1e-30")
    _require(self.interval is None or (self.interval >= 0 and self.interval % 32 == 0),
             f"{s}.interval={self.interval} must be a multiple of 32, or 0 for no promotion")
    _require(self.bits is None or self.bits == 0 or 4 <= self.bits <= 36,
             f"{s}.bits={self.bits} must be 0 (fp32 sums) or from 4 to 36")
    _require(self.history is None or self.history > 0,
             f"{s}.history={self.history} must be positive")


@dataclasses.dataclass(frozen=True)
class Runtime:
  """How the model is computed; free to change between runs of one checkpoint."""

  compute_dtype: str = "float32"
  remat: str = "none"  # see dsv3_jax/model/remat.py
  attention: str = "auto"  # dsv3_jax.ops.attention implementation
  attention_block: int = 0  # query and key rows of a tile of the blockwise form; 0: by length
  gemm: str = "auto"  # dsv3_jax.ops.grouped_gemm implementation
  recipe: str = "none"  # of the linear layers' matmuls; none: in compute_dtype
  fp8: FP8 = FP8()  # changes to the recipe
  fp8_impl: str = "auto"  # of FP8 quantizers and matmuls: auto, pallas (kernels), xla, reference
  layer_unroll: int = 1  # layers unrolled per iteration of the scan; 0 unrolls all
  head_chunk: int = 1024  # tokens whose logits exist at once in the loss
  mesh: Mesh = Mesh()
  pipeline: Pipeline = Pipeline()
  dispatch: Dispatch = Dispatch()
  shard_vocab: bool = False  # cut embedding and head over runtime.mesh's node and gpu
  zero: int = 0  # ZeRO stage: 1 cuts moments and master weights over all devices

  @property
  def schedule(self) -> str:
    """The pipeline's schedule, auto resolved; "none" without a pipeline."""
    if self.pipeline.schedule == "auto":
      return "dualpipe_v" if self.mesh.pipe > 1 else "none"
    return self.pipeline.schedule

  def __post_init__(self):
    s = "runtime"
    _one_of(s, self, "compute_dtype", ("float32", "bfloat16"))
    _one_of(s, self, "remat", ("none", "report", "layer"))
    _one_of(s, self, "attention", ("auto", "xla", "cudnn", "reference"))
    _one_of(s, self, "gemm", ("auto", "xla", "ragged_dot", "reference"))
    _one_of(s, self, "recipe", RECIPES)
    _one_of(s, self, "fp8_impl", ("auto", "pallas", "xla", "reference"))
    _require(self.recipe != "none" or self.fp8 == FP8(),
             f"{s}.fp8 changes a recipe, but {s}.recipe=none; choose one of "
             f"{', '.join(RECIPES[1:])}")
    _positive(s, self, "head_chunk")
    _not_negative(s, self, "attention_block", "layer_unroll")
    _require(self.zero in (0, 1), f"{s}.zero={self.zero} must be 0 or 1")
    _require(self.schedule != "none" or self.mesh.pipe == 1,
             f"{s}.pipeline.schedule='none' leaves {s}.mesh.pipe={self.mesh.pipe} ranks without "
             f"work; choose one of {', '.join(SCHEDULES[2:])}")
    if self.mesh.context > 1:
      here = f"{s}.mesh.context={self.mesh.context}"
      _require(self.schedule == "none", f"{here} is not combined with a pipeline (runtime.pipeline."
               f"schedule={self.schedule}); set {s}.mesh.pipe=1 and schedule='none'")
      _require(self.attention in ("auto", "xla"), f"{here} has a blockwise attention of its own; "
               f"set {s}.attention='auto', not {self.attention!r}")
      delayed = [k for k, v in dataclasses.asdict(self.fp8).items() if "delayed" in str(v)]
      _require(self.recipe != "per_tensor_delayed" and not delayed,
               f"{here} is not combined with delayed scaling ({s}.recipe={self.recipe!r}"
               f"{', '.join(['', *delayed])}); use another recipe")
    sent = self.dispatch.activations or self.dispatch.gradients
    _require(not sent or self.recipe == "none",
             f"{s}.dispatch.activations and gradients are for {s}.recipe=none; under "
             f"{self.recipe!r} set {s}.fp8.dispatch_x and {s}.fp8.dispatch_dy")


@dataclasses.dataclass(frozen=True)
class Optim:
  """AdamW and its schedule (report 4.2); milestones are shares of train.tokens."""

  lr: float = 2.2e-4
  warmup_steps: int = 2000
  lr_constant_until: float = 10e12 / REPORT_TOKENS
  lr_cosine_until: float = 14.3e12 / REPORT_TOKENS
  lr_final: float = 2.2e-5  # end of the cosine
  lr_last_from: float = 14.633e12 / REPORT_TOKENS
  lr_last: float = 7.3e-6
  beta1: float = 0.9
  beta2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  decay_vectors: bool = False  # also decay norm gains (the report does not say)
  clip_norm: float = 1.0  # 0 switches clipping off
  mu_dtype: str = "float32"  # of the stored first moment: float32, bfloat16, float8 (block-wise)
  nu_dtype: str = "float32"  # of the second
  ema_decay: float = 0.0  # 0 switches the host-side EMA of the parameters off
  ema_every: int = 1  # steps between EMA updates; the decay is applied per step all the same

  def __post_init__(self):
    s = "optim"
    _not_negative(s, self, "lr", "lr_final", "lr_last", "warmup_steps", "weight_decay",
                  "clip_norm")
    _positive(s, self, "eps", "ema_every")
    _share(s, self, "lr_constant_until", "lr_cosine_until", "lr_last_from")
    _require(self.lr_constant_until <= self.lr_cosine_until <= self.lr_last_from,
             f"{s}: lr_constant_until={self.lr_constant_until}, lr_cosine_until="
             f"{self.lr_cosine_until}, lr_last_from={self.lr_last_from} must not decrease")
    for name in ("beta1", "beta2", "ema_decay"):
      value = getattr(self, name)
      _require(0 <= value < 1, f"{s}.{name}={value} must lie in [0, 1)")
    for name in ("mu_dtype", "nu_dtype"):
      _one_of(s, self, name, ("float32", "bfloat16", "float8"))


def sft_optim(**changes: Any) -> Optim:
  """AdamW of fine-tuning: a cosine from 5e-6 to 1e-6 (report 5.1; the rest it does not tell)."""
  return Optim(**{"lr": 5e-6, "warmup_steps": 0, "lr_constant_until": 0.0, "lr_cosine_until": 1.0,
                  "lr_final": 1e-6, "lr_last_from": 1.0, "lr_last": 1e-6} | changes)


@dataclasses.dataclass(frozen=True)
class Loss:
  """Loss weights and the bias-based balancing (report 2.1.2, 2.2, 4.2)."""

  mtp_weight: float = 0.3
  mtp_weight_late: float = 0.1
  mtp_late_from: float = 10e12 / REPORT_TOKENS
  sequence_balance: float = 1e-4  # alpha of eq. 17
  batch_balance: float = 0.0  # the same form with f and P over the whole micro-batch (4.5.3)
  expert_balance: float = 0.0  # V2's expert-level loss: counts of the experts really selected
  bias_speed: float = 1e-3  # gamma; 0 switches the bias update off
  bias_until: float = 14.3e12 / REPORT_TOKENS

  def __post_init__(self):
    s = "loss"
    _not_negative(s, self, "mtp_weight", "mtp_weight_late", "sequence_balance", "batch_balance",
                  "expert_balance", "bias_speed")
    _share(s, self, "mtp_late_from", "bias_until")


@dataclasses.dataclass(frozen=True)
class Data:
  """Corpus, tokenizer, packing and batches (report 4.1)."""

  sources: tuple[str, ...] = ("stdlib",)  # stdlib, a path, hf:NAME, ...; see data/sources.py
  weights: tuple[float, ...] = ()  # one a source, or empty for sampling in proportion to size
  text_key: str = "text"  # field of JSONL, Parquet and Hugging Face records
  tokenizer: str = ""  # a tokenizer.json; empty trains one on the sources
  sequence_length: int = 256  # T
  batch_size: int = 8  # sequences an optimizer step, all micro-batches and devices together
  batch_start: int = 0  # sequences a step at the beginning; 0: batch_size from the start
  batch_ramp_until: float = 469e9 / REPORT_TOKENS
  batch_ramp_stages: int = 5
  microbatch: int = 0  # sequences a micro-batch, all devices together; 0: no accumulation
  isolate: bool = False  # documents packed into one sequence cannot see each other
  fim_rate: float = 0.1
  split_rate: float = 0.1  # share of combined punctuation+newline tokens split (not disclosed)
  validation_fraction: float = 0.05  # of documents, by hash
  max_document_bytes: int = 64 * 2**20
  workers: int = 0  # background processes; 0 reads ahead in a thread of the training process
  prefetch: int = 4  # batches
  seed: int = 0

  def __post_init__(self):
    s = "data"
    _require(len(self.sources) > 0, f"{s}.sources is empty; name at least one source")
    _require(len(self.weights) in (0, len(self.sources)),
             f"{s}.weights={self.weights} has {len(self.weights)} entries for {len(self.sources)} "
             f"{s}.sources; give one a source, or none")
    _require(all(w > 0 for w in self.weights), f"{s}.weights={self.weights} must be positive")
    _positive(s, self, "batch_size", "batch_ramp_stages", "max_document_bytes")
    _not_negative(s, self, "batch_start", "microbatch", "workers", "prefetch")
    _require(self.sequence_length >= 8,
             f"{s}.sequence_length={self.sequence_length} is too short; use at least 8")
    _share(s, self, "fim_rate", "split_rate", "validation_fraction", "batch_ramp_until")
    micro = self.micro_batch
    for name in ("batch_size", "batch_start"):
      value = getattr(self, name)
      _require(value % micro == 0, f"{s}.{name}={value} is not a multiple of "
               f"{s}.microbatch={micro}")
    _require(self.batch_start <= self.batch_size,
             f"{s}.batch_start={self.batch_start} exceeds {s}.batch_size={self.batch_size}")

  @property
  def micro_batch(self) -> int:
    """Sequences of a micro-batch, all devices together: the whole batch without accumulation."""
    return self.microbatch or self.batch_size

  def ramp(self, train_tokens: float) -> list[tuple[int, int]]:
    """(tokens from which it holds, sequences a step) of each stage of the batch ramp.

    The report goes from 3,072 to 15,360 over the first 469B tokens without saying how; here it is
    `batch_ramp_stages` stages of equally many tokens, each a whole number of micro-batches. Tokens
    are whole, so the starts are rounded up and all that follows is exact.
    """
    start = self.batch_start or self.batch_size
    micro = self.micro_batch
    until = self.batch_ramp_until * train_tokens
    stages = [(0, start)]
    for i in range(1, self.batch_ramp_stages + 1):
      size = start + (self.batch_size - start) * i / self.batch_ramp_stages
      size = int(size / micro + 1e-9) * micro
      if size > stages[-1][1]:
        stages.append((math.ceil(until * i / self.batch_ramp_stages), size))
    return stages


@dataclasses.dataclass(frozen=True)
class Train:
  """One run: length, seeds, and how often it evaluates, logs and saves (in optimizer steps)."""

  tokens: float = 2e6  # training tokens of the whole run
  seed: int = 0
  init: str = ""  # workdir of a run whose newest parameters a new one begins with, and tokenizer
  log_every: int = 1
  eval_every: int = 200
  eval_batches: int = 8
  checkpoint_every: int = 200
  keep_last: int = 2
  keep_best: int = 1  # by validation loss
  max_bad_steps: int = 5  # skipped NaN/inf steps in a row before the run stops
  profile_from: int = 0  # first step of a jax.profiler capture; 0: none
  profile_steps: int = 3
  numerics_every: int = 0  # steps between statistics of FP8 numerics (train/numerics.py); 0: none
  sample_tokens: int = 96  # length of the completions in the report; 0: none

  def __post_init__(self):
    s = "train"
    _positive(s, self, "tokens", "log_every", "checkpoint_every", "max_bad_steps", "keep_last",
              "eval_batches", "profile_steps")
    _not_negative(s, self, "eval_every", "keep_best", "profile_from", "numerics_every",
                  "sample_tokens", "seed")


@dataclasses.dataclass(frozen=True)
class SFT:
  """Supervised fine-tuning (report 5.1): conversations, packed, answers alone.

  `data.sources` has no part in it; `data.validation_fraction` of the conversations are held out.
  The report's rates are `sft_optim()`: a model of another size wants others.
  """

  files: tuple[str, ...] = ()  # conversations as JSONL; see posttrain/messages.py
  problems: tuple[str, ...] = ()  # generated ones, with worked solutions: FAMILY:LEVEL:COUNT
  answers: tuple[str, ...] = ()  # generated ones, with the boxed answer alone
  epochs: float = 2.0  # train.tokens follows from it
  style: str = "short"  # of the worked solutions: short, long, or both

  def __post_init__(self):
    s = "sft"
    _positive(s, self, "epochs")
    _one_of(s, self, "style", ("short", "long", "both"))


@dataclasses.dataclass(frozen=True)
class GRPO:
  """Group relative policy optimization (report 5.3, eq. 26-28), whose settings it does not tell.

  Defaults are DeepSeekMath's KL, and what fits a tiny model.
  """

  files: tuple[str, ...] = ()  # problems as JSONL; see posttrain/problems.py
  problems: tuple[str, ...] = ()  # generated ones: FAMILY:LEVEL:COUNT
  rollouts: int = 50  # train.tokens follows from it
  prompts: int = 8  # problems of a rollout
  group: int = 8  # G, outputs of each
  new_tokens: int = 64  # most tokens of an output
  temperature: float = 1.0
  micro_steps: int = 1  # optimizer steps on a rollout's outputs: above 1 the last are off-policy
  clip_low: float = 0.2
  clip_high: float = 0.2  # above clip_low: room for unlikely tokens (arXiv 2503.14476)
  kl: float = 0.04  # beta
  ratio: str = "token"  # of probabilities: of each token, or of the whole output ("sequence")
  mean: str = "sequence"  # over the tokens of each output, then outputs; or over all tokens
  normalize: bool = True  # divide by the group's standard deviation
  cut_off: str = "zero"  # reward of outputs that reach new_tokens: zero, none (mask), as is (keep)
  reference_every: int = 0  # rollouts after which the reference becomes today's policy; 0: never
  ahead: bool = False  # the next rollout is drawn on a second device while this one is learned
  shuffle_rewards: bool = False  # a control: rewards of a rollout in random order

  def __post_init__(self):
    s = "grpo"
    _positive(s, self, "rollouts", "prompts", "group", "new_tokens", "temperature", "micro_steps")
    _not_negative(s, self, "clip_low", "clip_high", "kl", "reference_every")
    _require(self.group > 1, f"{s}.group={self.group}: a group of one has no advantage; use 2 or "
             "more")
    _require(self.clip_low < 1, f"{s}.clip_low={self.clip_low} must be below 1")
    _one_of(s, self, "ratio", ("token", "sequence"))
    _one_of(s, self, "mean", ("token", "sequence"))
    _one_of(s, self, "cut_off", ("zero", "mask", "keep"))
    _require(self.prompts % self.micro_steps == 0, f"{s}.micro_steps={self.micro_steps} must "
             f"divide {s}.prompts={self.prompts}: each step takes whole groups")


@dataclasses.dataclass(frozen=True)
class Reward:
  """A reward model (report 5.2): how one is trained, and which one judges GRPO's outputs.

  Trained on pairs of a better and a worse answer: form "score" gives a number, form "judge" writes
  a thought and a verdict. `data.validation_fraction` of the questions are held out.
  """

  files: tuple[str, ...] = ()  # preferences as JSONL; see posttrain/preferences.py
  problems: tuple[str, ...] = ()  # generated ones, FAMILY:LEVEL:COUNT, with worse answers made
  samples: int = 0  # answers of train.init's model to each problem, judged by rules; 0: corrupted
  form: str = "score"  # or judge
  epochs: float = 1.0  # train.tokens follows from it
  thought: bool = False  # a score is read after a thought about the answer
  text: float = 0.0  # weight of the cross-entropy of thoughts, or of better answers, beside scores
  centre: float = 0.01  # weight of (better + worse)^2: only differences are learned otherwise
  new_tokens: int = 64  # most tokens of a sampled answer, and of a thought
  temperature: float = 1.0  # of samples, and of votes
  model: str = ""  # workdir of what "preference", "judge" and "vote" ask in a problem's reward
  votes: int = 5  # judgements of an answer by "vote"
  names: tuple[str, ...] = ()  # NAME:WEIGHT, rewards in place of those that problems name

  def __post_init__(self):
    s = "reward"
    _positive(s, self, "epochs", "new_tokens", "temperature", "votes")
    _not_negative(s, self, "samples", "text", "centre")
    _one_of(s, self, "form", ("score", "judge"))
    _require(not self.thought or self.form == "judge" or self.text > 0,
             f"{s}.thought: a thought that is not learned is not written either; set {s}.text=1")


SAMPLES = ("short", "long", "absorbed")  # what is learnt of an expert's answer; see rejection.py


@dataclasses.dataclass(frozen=True)
class Distill:
  """Distillation of experts' answers (report 5.1), which are drawn, filtered, and then learnt.

  An expert is `WORKDIR=PROBLEMS`: the workdir of a run (in a chain also an earlier stage's name)
  and what it is asked, FAMILY:LEVEL:COUNT or a file of problems; several of one workdir add up.
  `sft.epochs` says how long is learnt; sft.files, sft.problems and
  sft.answers are the conversations that are mixed in (`share`).
  """

  experts: tuple[str, ...] = ()
  answers: int = 4  # drawn for each problem
  temperature: float = 1.0
  new_tokens: int = 128  # most tokens of an answer
  reflect: bool = True  # experts are asked to reflect and verify (messages.REFLECTION)
  longest: int = 0  # most tokens of an answer that is learnt; 0: new_tokens
  format: bool = True  # it must pass the reward "format", besides being right
  prefer: str = "shortest"  # of answers that pass: the shortest, or the first that were drawn
  keep: int = 1  # of them, for each problem
  samples: tuple[str, ...] = ("absorbed",)  # short, long, absorbed; see posttrain/rejection.py
  share: float = 0.0  # of all conversations that is mixed in
  mode: str = "answers"  # learnt are their words, or the experts' probabilities too: logits
  top: int = 16  # probabilities of a token that are kept
  alpha: float = 0.5  # weight of the words, beside 1 - alpha of the probabilities

  def __post_init__(self):
    s = "distill"
    _positive(s, self, "answers", "new_tokens", "keep", "top")
    _not_negative(s, self, "temperature", "longest")
    _share(s, self, "alpha")
    _one_of(s, self, "prefer", ("shortest", "first"))
    _one_of(s, self, "mode", ("answers", "logits"))
    _require(self.answers == 1 or self.temperature > 0, f"{s}.temperature=0 draws the same answer "
             f"{s}.answers={self.answers} times; raise it, or set {s}.answers=1")
    _require(bool(self.samples) and all(x in SAMPLES for x in self.samples),
             f"{s}.samples={self.samples} must be some of {', '.join(SAMPLES)}")
    _require(0 <= self.share < 1, f"{s}.share={self.share} must be at least 0 and below 1: the "
             "rest are the experts' answers")


@dataclasses.dataclass(frozen=True)
class Exam:
  """Generated problems that a finished run's model answers, held out from all training."""

  problems: tuple[str, ...] = ()  # FAMILY:LEVEL:COUNT, of the test split
  new_tokens: int = 64  # most tokens of an answer
  temperature: float = 0.0  # 0: greedy

  def __post_init__(self):
    _positive("exam", self, "new_tokens")
    _not_negative("exam", self, "temperature")


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. Cross-section checks live here."""

  model: Model = Model()
  runtime: Runtime = Runtime()
  optim: Optim = Optim()
  loss: Loss = Loss()
  data: Data = Data()
  train: Train = Train()
  sft: SFT = SFT()
  grpo: GRPO = GRPO()
  reward: Reward = Reward()
  distill: Distill = Distill()
  exam: Exam = Exam()
  kind: str = "pretrain"  # what it does: pretrain, sft, grpo, reward or distill

  def __post_init__(self):
    _one_of("config", self, "kind", ("pretrain", "sft", "grpo", "reward", "distill"))
    for kind in ("sft", "grpo", "reward"):
      own = getattr(self, kind)
      named = own.files or own.problems or (kind == "sft" and own.answers)
      _require(self.kind != kind or bool(named),
               f"kind={kind!r}: name what to learn from in {kind}.files or {kind}.problems"
               + " or sft.answers" * (kind == "sft"))
      _require(self.kind != kind or bool(self.train.init),
               f"kind={kind!r} begins with a trained model; name its workdir in train.init")
    if self.kind == "distill":
      self._check_distill()
    _require(self.kind == "pretrain" or not self.data.batch_start,
             f"kind={self.kind!r} has no batch ramp; set data.batch_start=0")
    fp8 = dataclasses.asdict(self.runtime.fp8).values()
    _require(self.kind != "grpo" or self.runtime.recipe != "per_tensor_delayed"
             and not any("delayed" in str(v) for v in fp8),
             f"kind='grpo' compares probabilities of one policy, which delayed scaling "
             f"(runtime.recipe={self.runtime.recipe!r}, runtime.fp8) makes depend on the steps "
             "before; choose another recipe")
    _require(self.kind != "reward" or not self.reward.samples or bool(self.reward.problems),
             f"reward.samples={self.reward.samples} answers are drawn to reward.problems, and none "
             "is named; name some, or set it to 0")
    micro, mesh = self.data.micro_batch, self.runtime.mesh
    _require(micro % mesh.batch_shards == 0,
             f"{mesh.describe('data', 'node', 'gpu')} must divide the micro-batch of {micro} "
             "sequences (data.microbatch, or data.batch_size where that is 0)")
    _require(not self.model.moe_layers + self.model.mtp_depth
             or self.model.moe.experts % (mesh.node * mesh.gpu) == 0,
             f"{mesh.describe('node', 'gpu')} must divide model.moe.experts="
             f"{self.model.moe.experts}")
    length = self.data.sequence_length
    _require(mesh.context == 1 or length % (2 * mesh.context) == 0,
             f"runtime.mesh.context={mesh.context} gives each device two parts of a sequence; "
             f"{2 * mesh.context} must divide data.sequence_length={length}")
    _require(mesh.context == 1 or self.model.attention.kind == "mla",
             f"runtime.mesh.context={mesh.context} sends latents, which "
             f"model.attention.kind={self.model.attention.kind!r} does not have; use 'mla'")
    _require(mesh.context == 1 or self.kind in ("pretrain", "sft"),
             f"runtime.mesh.context={mesh.context} is for kind='pretrain' and 'sft', not "
             f"{self.kind!r}")
    _require(mesh.context == 1 or self.train.numerics_every == 0,
             f"runtime.mesh.context={mesh.context}: the measurement of numerics "
             f"(train.numerics_every={self.train.numerics_every}) takes a whole sequence on one "
             "device; set it to 0")
    layers = self.runtime.pipeline.layers
    _require(not layers or (sum(layers) == self.model.layers and self.runtime.schedule != "none"),
             f"runtime.pipeline.layers={layers} must add up to model.layers={self.model.layers}, "
             f"and wants a schedule (runtime.pipeline.schedule={self.runtime.schedule})")
    _require(not self.runtime.shard_vocab or self.model.vocab_size % (mesh.node * mesh.gpu) == 0,
             f"runtime.shard_vocab: {mesh.describe('node', 'gpu')} must divide "
             f"model.vocab_size={self.model.vocab_size}")
    _require(self.runtime.zero == 0 or "float8" not in (self.optim.mu_dtype, self.optim.nu_dtype),
             "optim.mu_dtype and nu_dtype: float8 moments have tiles that runtime.zero=1 would "
             "cut; use bfloat16, or runtime.zero=0")
    _require(self.model.mtp_depth + 2 <= self.data.sequence_length,
             f"data.sequence_length={self.data.sequence_length} is too short for "
             f"model.mtp_depth={self.model.mtp_depth}; use at least {self.model.mtp_depth + 2}")
    yarn = self.model.attention.yarn
    longest = int(yarn.factor * yarn.original_length)
    _require(yarn.factor == 1 or self.data.sequence_length <= longest,
             f"data.sequence_length={self.data.sequence_length} exceeds the {longest} positions "
             "of model.attention.yarn (factor * original_length)")

  def _check_distill(self) -> None:
    d, mixed = self.distill, (*self.sft.files, *self.sft.problems, *self.sft.answers)
    _require(bool(d.experts), "kind='distill': name whom to learn from, and what they are asked, "
             "in distill.experts, such as ('runs/expert=add:0:1000',)")
    _require(bool(self.train.init), "kind='distill' begins with a trained model; name its workdir "
             "in train.init")
    _require(bool(mixed) == (d.share > 0), f"distill.share={d.share} of the conversations are "
             f"those of sft.files, sft.problems and sft.answers, which name {len(mixed)}; " + (
                 "set the share" if mixed else "name some, or set it to 0"))
    longest = d.longest or d.new_tokens
    _require(longest < self.data.sequence_length, f"answers of up to {longest} tokens "
             "(distill.longest, or new_tokens where that is 0) do not fit data.sequence_length="
             f"{self.data.sequence_length}; raise it, or lower distill.longest")
    _require(d.mode == "answers" or d.top <= self.model.vocab_size,
             f"distill.top={d.top} exceeds model.vocab_size={self.model.vocab_size}")
    _require(d.mode == "answers" or (self.runtime.mesh.devices == 1
                                     and self.runtime.schedule == "none"),
             "distill.mode='logits' learns on one device; leave runtime.mesh and "
             "runtime.pipeline.schedule as they are by default, or set mode='answers'")
    _require(d.mode == "answers" or set(d.samples) != {"short"},
             "distill.mode='logits' with distill.samples=('short',): short samples are the "
             "problems' own solutions, which no expert wrote; add 'long' or 'absorbed'")


# --- dictionaries -------------------------------------------------------------------------------


def to_dict(config: Any) -> dict[str, Any]:
  """A dataclass as nested plain dictionaries; tuples stay tuples. Inverse of `from_dict`."""
  return dataclasses.asdict(config)


def to_json(config: Any) -> str:
  """The config as JSON text with sorted keys: equal configs give equal text."""
  return json.dumps(to_dict(config), indent=2, sort_keys=True)


def differences(config: Any) -> dict[str, Any]:
  """Dotted keys whose values differ from the defaults, with these values, in the keys' order."""
  return dict(_differing(to_dict(config), to_dict(type(config)())))


def _differing(values: dict[str, Any], defaults: dict[str, Any], prefix: str = ""
               ) -> Iterator[tuple[str, Any]]:
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _differing(value, defaults[name], f"{prefix}{name}.")
    elif value != defaults[name]:
      yield prefix + name, value


def fingerprint(config: Any) -> str:
  """16 hex digits by which a config is known: a hash of what differs from the defaults.

  So a new key with a default changes no config's fingerprint, while a changed default changes what
  a fingerprint stands for: whoever finds a run by its fingerprint compares the whole configs too.
  """
  text = json.dumps(differences(config), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _type_name(hint: Any) -> str:
  return getattr(hint, "__name__", str(hint)) if not typing.get_origin(hint) else str(hint)


def _convert(hint: Any, value: Any, key: str) -> Any:
  """`value` as the type `hint`, or a ConfigError that names `key`."""
  if dataclasses.is_dataclass(hint):
    return from_dict(value, hint, key)
  if isinstance(hint, types.UnionType):  # `X | None`
    return None if value is None else _convert(optional(hint), value, key)
  wrong = ConfigError(f"{key}={value!r} has type {type(value).__name__}; "
                      f"{_type_name(hint)} is expected")
  if typing.get_origin(hint) is tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
      raise wrong
    element = typing.get_args(hint)[0]
    return tuple(_convert(element, v, f"{key}[{i}]") for i, v in enumerate(value))
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if hint is int and isinstance(value, float) and value.is_integer():
    return int(value)
  if isinstance(value, bool) != (hint is bool) or not isinstance(value, hint):
    raise wrong
  if hint is float and value != value:
    raise ConfigError(f"{key} is NaN")
  return value


def optional(hint: Any) -> Any:
  """X of a hint `X | None`, and any other hint as it is."""
  if isinstance(hint, types.UnionType):
    return next(t for t in typing.get_args(hint) if t is not types.NoneType)
  return hint


def field_type(path: str, cls: type = Config) -> Any:
  """The type of the field at a dotted path such as "optim.lr".

  Raises:
    ConfigError: there is no such field; the nearest one, of this section or of any, is named.
  """
  hint, section = cls, ""
  for name in path.split("."):
    if not dataclasses.is_dataclass(hint):
      raise ConfigError(f"unknown config key {path!r}; {section!r} is a value, not a section")
    hints = typing.get_type_hints(hint)
    if name not in hints:
      whole = difflib.get_close_matches(path, _leaves(cls), n=1, cutoff=0.8)
      near = (f"did you mean {whole[0]!r}?" if whole and not path.endswith(name)
              else _nearest(name, section, hints, cls))
      raise ConfigError(f"unknown config key {path!r}; {near}")
    hint, section = hints[name], f"{section}.{name}" if section else name
  return hint


def _nearest(name: str, section: str, hints: dict[str, Any], cls: type) -> str:
  """What to write instead of a `name` that `section` lacks: 'did you mean ...'."""
  prefix = f"{section}." if section else ""
  near = difflib.get_close_matches(name, hints, n=1, cutoff=0.6)
  if near:
    return f"did you mean {prefix + near[0]!r}?"
  leaves = {path.rpartition(".")[2]: path for path in reversed(_leaves(cls))}
  near = difflib.get_close_matches(name, leaves, n=1, cutoff=0.8)
  if near:
    return f"did you mean {leaves[near[0]]!r}?"
  return f"valid keys{f' of {section}' if section else ''}: {', '.join(hints)}"


def _leaves(cls: type, prefix: str = "") -> list[str]:
  """Dotted paths of all values below `cls`, in their order."""
  paths = []
  for name, hint in typing.get_type_hints(cls).items():
    below = _leaves(hint, f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else []
    paths += below or [prefix + name]
  return paths


def from_dict(values: Any, cls: type = Config, key: str = "") -> Any:
  """Nested mappings to nested frozen dataclasses, checked.

  Args:
    values: a mapping (dict, ConfigDict), or an instance of `cls`, which is returned as it is.
      Missing keys take their defaults.
    cls: the dataclass to build.
    key: path of this section, for messages.

  Raises:
    ConfigError: an unknown key (the nearest valid one is named), a wrong type, or a combination
      that cannot run.
  """
  if isinstance(values, cls):
    return values
  if not hasattr(values, "items"):
    raise ConfigError(f"{key or 'config'}={values!r} must be a mapping with keys "
                      f"{', '.join(f.name for f in dataclasses.fields(cls))}")
  hints = typing.get_type_hints(cls)
  kwargs = {}
  for name, value in values.items():
    path = f"{key}.{name}" if key else str(name)
    if name not in hints:
      hint = _nearest(str(name), key, hints, Config if key else cls)
      raise ConfigError(f"unknown config key {path!r}; {hint}")
    kwargs[name] = _convert(hints[name], value, path)
  return cls(**kwargs)


def from_json(text: str, cls: type = Config) -> Any:
  """Inverse of `to_json`."""
  return from_dict(json.loads(text), cls)


def replace(config: Any, **changes: Any) -> Any:
  """`dataclasses.replace` that also reaches into sections with dotted keys.

  Example: `replace(config, **{"model.moe.experts": 64, "train.tokens": 1e6})`. All changes are
  made together, so that only their combination has to be valid.
  """
  values = to_dict(config)
  for path, value in changes.items():
    field_type(path, type(config))
    *parents, last = path.split(".")
    node = values
    for parent in parents:
      node = node[parent]
    node[last] = to_dict(value) if dataclasses.is_dataclass(value) else value
  return from_dict(values, type(config))


# --- presets ------------------------------------------------------------------------------------


def _presets() -> dict[str, Model]:
  wide = dict(kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128)
  return {
      # A laptop's model: every mechanism on, about 10 million parameters.
      "tiny": Model(),
      # Test beds of the auxiliary-loss-free balancing paper (arXiv 2408.15664, table 1). It gives
      # d_ff / d_expert but not d_ff; with d_ff = 8/3 * dim the totals come out at its 1B and 3B.
      "balance_1b": Model(
          vocab_size=32064, dim=1024, layers=9, dense_layers=0, dense_ffn_dim=2736,
          attention=Attention(heads=8, q_rank=0, **wide),
          moe=MoE(experts=64, active=6, shared=2, ffn_dim=512, groups=1, active_groups=1,
                  scale=1.0),
          mtp_depth=0),
      "balance_3b": Model(
          vocab_size=32064, dim=1280, layers=11, dense_layers=0, dense_ffn_dim=3456,
          attention=Attention(heads=10, q_rank=0, **wide),
          moe=MoE(experts=64, active=6, shared=2, ffn_dim=896, groups=1, active_groups=1,
                  scale=1.0),
          mtp_depth=0),
      # DeepSeek-V2-Lite's shape with V3's gate: the report's small ablation model (15.7B / 2.4B).
      "moe_16b": Model(
          vocab_size=102400, dim=2048, layers=27, dense_layers=1, dense_ffn_dim=10944,
          attention=Attention(heads=16, q_rank=0, **wide),
          moe=MoE(experts=64, active=6, shared=2, ffn_dim=1408, groups=1, active_groups=1,
                  scale=1.0),
          mtp_depth=0),
      "v3_671b": Model(
          vocab_size=129280, dim=7168, layers=61, dense_layers=3, dense_ffn_dim=18432,
          attention=Attention(heads=128, q_rank=1536, **wide),
          moe=MoE(experts=256, active=8, shared=1, ffn_dim=2048, groups=8, active_groups=4),
          mtp_depth=1),
  }


PRESETS: types.MappingProxyType[str, Model] = types.MappingProxyType(_presets())


def preset(name: str) -> Model:
  """A named model shape; ConfigError names the nearest where there is none such."""
  if name not in PRESETS:
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"presets: {', '.join(PRESETS)}"
    raise ConfigError(f"no preset {name!r}; {hint}")
  return PRESETS[name]
