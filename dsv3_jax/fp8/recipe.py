"""Recipes: which operand of which matmul is held in which format (report 3.3, figure 6).

A linear layer is three matmuls, each of two operands:

    Fprop   y  = x  w        x tiles along its channels         weights in blocks
    Dgrad   dx = dy w^T      dy tiles along its channels        the same blocks, transposed
    Wgrad   dw = x^T dy      both in tiles along the tokens, because those are summed over

A recipe is one `config.FP8` with every field filled in; `runtime.recipe` names it and each field of
`runtime.fp8` that is not None replaces one of its fields. It never changes a parameter's name,
shape or dtype: masters are fp32 under all of them.

    none                nothing: all matmuls in runtime.compute_dtype
    fp32, bf16          operands in that dtype, whatever the compute dtype
    v3                  the report's: E4M3 everywhere, online scales, 1x128 and 128x1 tiles, 128x128
                        weight blocks; power-of-two scales where the report says so
    v3_pow2             the same with power-of-two scales everywhere
    per_tensor_current  one scale a tensor, of its own amax
    per_tensor_delayed  the same, of the largest amax of the last `history` steps for activations
                        and gradients, as most FP8 frameworks do
    hybrid_e5m2         v3 with E5M2 gradients
    block_gradients     v3 with 128x128 blocks for gradients, so that Wgrad's operand is Dgrad's
                        transposed; the report saw this diverge (appendix B.2)
    no_promotion        v3 on a tensor core of 14 bits that never promotes to fp32

`floor` is the released quantizer's clamp of the amax. Gradients have their own, far smaller one:
their size follows from how the loss is normalised, which no quantizer should see.
"""

import dataclasses

from dsv3_jax import config
from dsv3_jax.fp8 import formats, recipes
from dsv3_jax.fp8.recipes import RECIPES

__all__ = ["RECIPES", "Operand", "Recipe", "parse", "resolve"]


@dataclasses.dataclass(frozen=True)
class Operand:
  """How one operand is held.

  Attributes:
    format: quantized format, or None.
    dtype: where it is not quantized, "bfloat16" or "float32", or None for the compute dtype.
    tile: rows x columns of a scale; (0, 0): the whole tensor.
    scale: "fp32" or "pow2".
    delayed: the amax comes from the history.
    impl: of the quantizer; see `ops.fp8_quantize`.
  """

  format: formats.Format | None = None
  dtype: str | None = None
  tile: tuple[int, int] = (0, 0)
  scale: str = "fp32"
  delayed: bool = False
  impl: str = "auto"


def parse(text: str, impl: str = "auto") -> Operand:
  """An operand as configs write it; `config.FP8` has checked the text."""
  if text == "compute":
    return Operand()
  if text in ("bf16", "fp32"):
    return Operand(dtype={"bf16": "bfloat16", "fp32": "float32"}[text])
  name, tile, scale, *delayed = text.split()
  sizes = (0, 0) if tile == "tensor" else tuple(int(n) for n in tile.split("x"))
  return Operand(formats.get(name), None, sizes, scale, bool(delayed), impl)


@dataclasses.dataclass(frozen=True)
class Recipe:
  """`config.FP8` with operands parsed; see there for what each field means.

  `impl` is `runtime.fp8_impl`, of quantizers and matmuls.
  """

  fprop_x: Operand
  fprop_w: Operand
  dgrad_dy: Operand
  dgrad_w: Operand
  wgrad_x: Operand
  wgrad_dy: Operand
  output_x: Operand
  output_cache: Operand
  dispatch_x: Operand
  dispatch_dy: Operand
  swiglu_cache: Operand
  interval: int
  bits: int
  floor: float
  gradient_floor: float
  history: int
  impl: str = "auto"

  @property
  def quantized(self) -> bool:
    """Whether any operand of the three matmuls is."""
    return any(getattr(self, f.name).format for f in dataclasses.fields(self)
               if f.type == "Operand" or f.type is Operand)

  @property
  def delayed(self) -> bool:
    """Whether a history of amax has to be kept."""
    return any(getattr(self, f.name).delayed for f in dataclasses.fields(self)
               if f.type == "Operand" or f.type is Operand)


def resolve(runtime: config.Runtime, held: bool = False) -> Recipe | None:
  """The recipe of a run, overrides applied; None where linear layers run in the compute dtype.

  `held`: the weights are FP8 as they were loaded. Then there is always a recipe, for they are
  multiplied as they are; runtime.recipe=none leaves the activations alone in the compute dtype.
  """
  if runtime.recipe == "none" and not held:
    return None
  merged = dataclasses.asdict(recipes.merged(runtime))
  recipe = Recipe(**{k: parse(v, runtime.fp8_impl) if isinstance(v, str) else v
                     for k, v in merged.items()}, impl=runtime.fp8_impl)
  plain = (None, runtime.compute_dtype)
  operands = [v for v in vars(recipe).values() if isinstance(v, Operand)]
  if not held and all(o.format is None and o.dtype in plain for o in operands):
    return None
  return recipe
