"""Do all-to-alls hide behind matmuls?  Asked of the compiler, for eight H100s, without a GPU.

    make overlap                                    installs the compiler, checks every case
    python -m benchmarks.overlap --only pair --keep out

Compiles the real training step of a small MoE model in bf16, as `dsv3 train` would run it, and
prints in which order each branch of the pipeline's executor issues matmuls and all-to-alls
(`dsv3_jax/analysis/overlap.py` explains the signs). The status is 1 where an op FB, the forward of
one micro-batch and the backward of another, leaves an all-to-all without a matmul to hide behind;
0 otherwise, also where the compiler is absent, which is said. F and B alone, and the step without a
schedule, are there to compare: their all-to-alls have little to hide behind.

Serving too: a chunk of a prompt (`prefill`) and a step of decoding of 16 rows a device, as two
micro-batches (`--halves` of `dsv3 serve`) and as one.
"""

import argparse
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config
from dsv3_jax.analysis import hlo, overlap
from dsv3_jax.infer import cache as cache_lib
from dsv3_jax.infer import decode, parameters, sampler, slots, spmd
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import sharding
from dsv3_jax.train import optim, state, step
from pallas_kernels.aot import toolchain, topology

MODEL = config.Model(
    vocab_size=4096, dim=1024, layers=3, dense_layers=1, dense_ffn_dim=2048, mtp_depth=1,
    attention=config.Attention(heads=8, q_rank=256, kv_rank=128, nope_dim=128, rope_dim=64,
                               v_dim=128),
    moe=config.MoE(experts=16, active=4, shared=1, ffn_dim=512, groups=4, active_groups=2))
LENGTH = 1024


class Case(NamedTuple):
  """A program.

  Attributes:
    name: to choose by.
    mesh: sizes of its axes.
    schedule: of the pipeline, or none; "prefill", "decode": serving.
    changes: to the configuration; when serving, `halves`.
  """

  name: str
  mesh: config.Mesh
  schedule: str
  changes: dict[str, Any] = {}

  @property
  def serves(self) -> bool:
    return self.schedule in ("prefill", "decode")


CASES = (
    Case("pair", config.Mesh(node=2, gpu=4), "dualpipe_v"),
    Case("dualpipe_v", config.Mesh(pipe=2, node=2, gpu=2), "dualpipe_v"),
    Case("dualpipe", config.Mesh(pipe=2, node=2, gpu=2), "dualpipe"),
    Case("step", config.Mesh(node=2, gpu=4), "none"),
    Case("prefill_halves", config.Mesh(node=2, gpu=4), "prefill", {"halves": True}),
    Case("prefill", config.Mesh(node=2, gpu=4), "prefill", {"halves": False}),
    Case("decode_halves", config.Mesh(node=2, gpu=4), "decode", {"halves": True}),
    Case("decode", config.Mesh(node=2, gpu=4), "decode", {"halves": False}),
)
ROWS, CHUNK, PAGES, PAGE = 16, 512, 64, 64  # of a device that serves


def lowered(case: Case, devices: list[jax.Device]) -> jax.stages.Lowered:
  """The training step of a case for `devices`."""
  micros = 2 * case.mesh.pipe
  batch_size = micros * case.mesh.batch_shards
  cfg = config.replace(config.Config(model=MODEL), **{
      "runtime.mesh": case.mesh, "runtime.pipeline.schedule": case.schedule,
      "runtime.compute_dtype": "bfloat16", "runtime.gemm": "ragged_dot",
      "runtime.attention": "xla", "data.sequence_length": LENGTH,
      "data.batch_size": batch_size, "data.microbatch": case.mesh.batch_shards, **case.changes})
  mesh = mesh_lib.make_mesh(case.mesh, devices)
  optimizer = optim.make_optimizer(cfg.optim)
  graphdef, abstract, _ = state.initializer(
      lambda: state.build_model(cfg.model, 0), optimizer, mesh, cfg.runtime)
  tokens = jax.ShapeDtypeStruct((micros, case.mesh.batch_shards, LENGTH + 1), jnp.int32,
                                sharding=sharding.batch_sharding(mesh))
  rep = sharding.replicated(mesh)
  hyper = state.Hyper(*[jax.ShapeDtypeStruct((), jnp.float32, sharding=rep)] * 3)
  train_step = step.make_train_step(graphdef, cfg, optimizer, mesh)
  return train_step.trace(abstract, {"tokens": tokens}, hyper).lower(lowering_platforms=("cuda",))


def serving(case: Case, devices: list[jax.Device]) -> jax.stages.Lowered:
  """A step of serving for `devices`, experts in as many slots as there are experts."""
  cfg = config.replace(MODEL, mtp_depth=0)
  runtime = config.Runtime(mesh=case.mesh, compute_dtype="bfloat16", gemm="ragged_dot",
                           attention="xla")
  mesh = mesh_lib.make_mesh(case.mesh, devices)
  _, params, buffers = jax.eval_shape(lambda: state.split(state.build_model(cfg, 0)))
  weights = jax.eval_shape(
      lambda p, b: slots.in_slots(parameters.prepare(p, b, cfg, "bfloat16"), _in_order(cfg)),
      params, buffers)
  on = lambda tree, spec: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=jax.NamedSharding(mesh, s)), tree, spec)
  rows_of = lambda tree: on(tree, jax.tree.map(lambda _: spmd.ROWS, tree))
  same = lambda tree: on(tree, jax.tree.map(lambda _: jax.P(), tree))
  wide, count = case.mesh.batch_shards, 1 if case.schedule == "prefill" else ROWS
  B = wide * count
  cache = rows_of(jax.eval_shape(lambda: cache_lib.make_paged(
      cfg, B, wide * PAGES, PAGE, PAGES // count, "bfloat16")))
  r = rows_of(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, sampler.rows([sampler.GREEDY] * B))))
  column = rows_of(jax.ShapeDtypeStruct((B,), jnp.int32))
  made = spmd.functions(mesh, slots.specs(weights), case.changes["halves"])
  weights = on(weights, slots.specs(weights))
  how = dict(drafts=0, cfg=cfg, runtime=runtime, tops=0)
  number, stop = (same(jax.ShapeDtypeStruct(shape, jnp.int32)) for shape in ((), (1,)))
  if case.schedule == "prefill":
    tokens = rows_of(jax.ShapeDtypeStruct((B, CHUNK), jnp.int32))
    traced = made.prefill.trace(weights, cache, tokens, column, number, None, r, None, stop,
                                fresh=False, **how)
  else:
    load = same(jax.ShapeDtypeStruct((cfg.moe_layers, cfg.moe.experts), jnp.float32))
    alive = rows_of(jax.ShapeDtypeStruct((B,), bool))
    traced = made.run.trace(weights, decode.State(cache, column, column, None, None, load), alive,
                            r, None, stop, number, most=1, **how)
  return traced.lower(lowering_platforms=("cuda",))


def _in_order(cfg: config.Model) -> np.ndarray:
  return np.tile(np.arange(cfg.moe.experts), (cfg.moe_layers, 1))


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--only", nargs="+", default=[], metavar="NAME", choices=[c.name for c in CASES],
                 help="of " + ", ".join(c.name for c in CASES))
  p.add_argument("--keep", type=pathlib.Path, metavar="FOLDER", help="keep the compiled programs")
  p.add_argument("--tools", type=pathlib.Path, metavar="FOLDER",
                 help="where the wheel was installed (pip install --target)")
  args = p.parse_args(argv)
  jax.config.update("jax_platforms", "cpu")  # a plugin without its device would only complain
  try:
    devices = topology.h100s(args.tools)
  except toolchain.MissingError as error:
    print(f"overlap: skipped: {error}")
    return 0
  if args.keep:
    args.keep.mkdir(parents=True, exist_ok=True)
  status = 0
  for case in CASES:
    if args.only and case.name not in args.only:
      continue
    start = time.perf_counter()
    made = serving(case, devices) if case.serves else lowered(case, devices)
    text = made.compile(topology.OPTIONS).as_text()
    if args.keep:
      (args.keep / f"{case.name}.txt").write_text(text)
    kind = case.schedule if case.serves else f"schedule {case.schedule}"
    print(f"\n== {case.name}: {kind}, {case.mesh.describe()} "
          f"(compiled in {time.perf_counter() - start:.0f} s)")
    said, good = overlap.report(overlap.orders(hlo.parse(text)))
    print(said, flush=True)
    status |= not good
  return int(status)


if __name__ == "__main__":
  sys.exit(main())
