"""Do all-to-alls hide behind matmuls?  Asked of the compiler, for eight H100s, without a GPU.

    make overlap                                    installs the compiler, checks every case
    python -m benchmarks.overlap --only pair --keep out

Compiles the real training step of a small MoE model in bf16, as `dsv3 train` would run it, and
prints in which order each branch of the pipeline's executor issues matmuls and all-to-alls
(`dsv3_jax/analysis/overlap.py` explains the signs). The status is 1 where an op FB, the forward of
one micro-batch and the backward of another, leaves an all-to-all without a matmul to hide behind;
0 otherwise, also where the compiler is absent, which is said. F and B alone, and the step without a
schedule, are there to compare: their all-to-alls have little to hide behind.
"""

import argparse
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.analysis import hlo, overlap
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
    schedule: of the pipeline, or none.
    changes: to the configuration.
  """

  name: str
  mesh: config.Mesh
  schedule: str
  changes: dict[str, Any] = {}


CASES = (
    Case("pair", config.Mesh(node=2, gpu=4), "dualpipe_v"),
    Case("dualpipe_v", config.Mesh(pipe=2, node=2, gpu=2), "dualpipe_v"),
    Case("dualpipe", config.Mesh(pipe=2, node=2, gpu=2), "dualpipe"),
    Case("step", config.Mesh(node=2, gpu=4), "none"),
)


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
    text = lowered(case, devices).compile(topology.OPTIONS).as_text()
    if args.keep:
      (args.keep / f"{case.name}.txt").write_text(text)
    print(f"\n== {case.name}: schedule {case.schedule}, {case.mesh.describe()} "
          f"(compiled in {time.perf_counter() - start:.0f} s)")
    said, good = overlap.report(overlap.orders(hlo.parse(text)))
    print(said, flush=True)
    status |= not good
  return int(status)


if __name__ == "__main__":
  sys.exit(main())
