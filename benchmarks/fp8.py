"""FP8 on the CPU: what a recipe costs a training step, what it saves, and how fast arrays quantize.

    step       the trainer's compiled step at the shapes of benchmarks.train_step, recipe v3 against
               none (fp32); target: at most 2.5 times the time
    saved      bytes that one MoE layer keeps for its backward pass, v3 against none with the same
               remat policy, bf16 activations; shapes alone, nothing runs; target: at most 0.55
    quantize   a 4096x7168 fp32 array to E4M3 in 1x128 tiles against a copy of it (both read all of
               it; the copy writes four times as much); target: at most 3 times the time

    python -m benchmarks.fp8 --save
    python -m benchmarks.fp8 --only step --shape a
"""

import os
import statistics
from collections.abc import Callable

from benchmarks import common, train_step

STEP_TARGET, SAVED_TARGET, QUANTIZE_TARGET = 2.5, 0.55, 3.0


def saved_bytes(model, runtime, tokens: int = 1024, feed_forward: bool = False) -> float:
  """Bytes a token that one MoE layer keeps for its backward pass.

  The arrays that `jax.vjp` holds on to, each once; weights are left out by taking the difference of
  two numbers of tokens.

  Args:
    model: `config.Model`.
    runtime: `config.Runtime`; its recipe, compute dtype and remat policy count.
    tokens: of the shorter sequence.
    feed_forward: the router and the experts alone, without attention and residuals.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx

  from dsv3_jax.fp8 import recipe as recipe_lib
  from dsv3_jax.fp8 import weights
  from dsv3_jax.model import remat, rope
  from dsv3_jax.model.block import Block, BlockCall
  from dsv3_jax.model.moe import MoECall
  from dsv3_jax.model.routing import RouterBias

  recipe = recipe_lib.resolve(runtime)
  block = nnx.eval_shape(lambda: Block(model, moe=True, rngs=nnx.Rngs(0)))
  graphdef, params, buffers = nnx.split(block, nnx.Param, RouterBias)
  params, buffers = nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)

  def pullback(params, buffers, x_BTD):
    prepared = weights.prepare(params, recipe)
    positions_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    cos, sin = rope.rope_table(model.attention, positions_BT)
    call = BlockCall(cos, sin, None, MoECall(recipe=recipe), runtime)

    def step(layer, x_BTD, _):
      return layer.ffn(x_BTD, call.moe) if feed_forward else layer(x_BTD, call)

    def run(params, x_BTD):
      if recipe is not None:
        params = weights.with_masters(prepared, params)
      return remat.wrap_step(step, runtime.remat)(nnx.merge(graphdef, params, buffers), x_BTD,
                                                  None)[0]

    return jax.vjp(run, params, x_BTD)[1]

  def held(length: int) -> int:
    x_BTD = jax.ShapeDtypeStruct((1, length, model.dim), jnp.dtype(runtime.compute_dtype))
    outputs = jax.make_jaxpr(pullback)(params, buffers, x_BTD).jaxpr.outvars
    unique = {id(v): v.aval for v in outputs}.values()
    return sum(int(np.prod(a.shape)) * np.dtype(a.dtype).itemsize for a in unique)

  return (held(2 * tokens) - held(tokens)) / tokens


def saved() -> list[common.Line]:
  """Saved bytes of one MoE layer for two shapes and two policies."""
  from dsv3_jax import config
  shapes = {"dim 256": train_step.model_config("a"),
            "671B": config.replace(config.preset("v3_671b"), vocab_size=1024)}
  lines = []
  for name, model in shapes.items():
    for part, alone in (("layer", False), ("its experts", True)):
      for remat in ("none", "report"):
        found = {recipe: saved_bytes(model, config.Runtime(
            recipe=recipe, compute_dtype="bfloat16", remat=remat, attention="xla"),
            feed_forward=alone) for recipe in ("none", "v3")}
        ratio = found["v3"] / found["none"]
        target = part == "layer" and remat == "report"
        lines.append(common.Line(
            f"saved bytes a token, MoE {part}, {name}, remat {remat}", f"{found['none']:,.0f} B",
            f"{found['v3']:,.0f} B", ratio, f"<= {SAVED_TARGET}x" if target else "",
            ratio <= SAVED_TARGET if target else None, found))
  return lines


def steps(shapes: tuple[str, ...], rounds: int) -> list[common.Line]:
  """Training steps under v3 and in fp32, in turns."""
  lines = []
  for shape in shapes:
    sides = {recipe: train_step.ours(shape, recipe=recipe)[0] for recipe in ("none", "v3")}
    losses = [run() for run in sides.values()]
    assert max(losses) - min(losses) < 0.1, f"losses do not look alike: {losses}"
    times = common.alternate(sides, rounds, warmup=2)
    ratio = common.paired(times["v3"], times["none"])
    lines.append(common.Line(
        f"train step ({shape}), v3 against fp32", common.times_text(times["none"]),
        common.times_text(times["v3"]), ratio, f"<= {STEP_TARGET}x", ratio <= STEP_TARGET,
        {name: common.summary(found) for name, found in times.items()}))
  return lines


def quantizing(rounds: int) -> list[common.Line]:
  """Quantizers of a 4096x7168 array against a copy by numpy into memory that is there."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from dsv3_jax.fp8 import formats, quantize

  x = np.random.default_rng(0).standard_normal((4096, 7168), np.float32)
  x_MK, target = jnp.asarray(x), np.empty_like(x)

  def side(*args, **kwargs) -> Callable[[], object]:
    run = jax.jit(lambda x: quantize.quantize(x, *args, **kwargs))
    return lambda: jax.block_until_ready(run(x_MK))

  sides = {
      "copy": lambda: np.copyto(target, x),
      "e4m3 1x128": side(formats.E4M3, (1, 128)),
      "e4m3 1x128 pow2": side(formats.E4M3, (1, 128), scale="pow2"),
      "e4m3 128x1": side(formats.E4M3, (128, 1)),
      "e4m3 128x128": side(formats.E4M3, (128, 128)),
      "e4m3 tensor": side(formats.E4M3, None),
      "e5m6 1x128 pow2": side(formats.E5M6, (1, 128), scale="pow2"),
  }
  times = common.alternate(sides, rounds, warmup=2)
  lines = []
  for name in [n for n in sides if n != "copy"]:
    ratio = common.paired(times[name], times["copy"])
    target_of = name == "e4m3 1x128"
    rate = x.nbytes / statistics.median(times[name]) / 1e9
    lines.append(common.Line(
        f"quantize 4096x7168 to {name}, {rate:.2g} GB/s read", common.times_text(times["copy"]),
        common.times_text(times[name]), ratio, f"<= {QUANTIZE_TARGET:.0f}x" if target_of else "",
        ratio <= QUANTIZE_TARGET if target_of else None, common.summary(times[name])))
  return lines


def main(argv: list[str] | None = None) -> None:
  parser = common.parser(__doc__, rounds=10)
  parser.add_argument("--only", choices=("step", "saved", "quantize"))
  parser.add_argument("--shape", choices=(*train_step.SHAPES, "both"), default="both")
  args = parser.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from dsv3_jax import host
  host.keep_memory()
  lines = []
  if args.only in (None, "step"):
    lines += steps(tuple(train_step.SHAPES) if args.shape == "both" else (args.shape,), args.rounds)
  if args.only in (None, "saved"):
    lines += saved()
  if args.only in (None, "quantize"):
    lines += quantizing(args.rounds)
  common.report("fp8", lines, args.save)


if __name__ == "__main__":
  main()
