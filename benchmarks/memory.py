"""The memory model against XLA's own analysis of the compiled training step.

    python -m benchmarks.memory
    python -m benchmarks.memory --only remat     those whose name has that in it
    python -m benchmarks.memory --known --save   the model anew against what XLA said before

Each line compiles the training step of one config for this machine's CPU, on as many virtual
devices as its mesh has, and compares `cost.memory.estimate` with what XLA has assigned on each
device: arguments + results - those that share a buffer + temporaries. Nothing is run. Code
generation is told not to optimise, which changes no buffer but crumbs (two configs were compiled
both ways: 22.955 and 22.956 MiB of temporaries, and 601.77 both times).

No number of the model was fitted. Which arrays XLA keeps that jax does not ask for was read from
its dumps of five of these configs (default, bfloat16, recipe v3, both remats, 1,024 tokens); the
others came after.
"""

import json
import os
import sys

from benchmarks import common

LIMIT = 0.10
DEVICES = 8
_QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
_PIPE = {"runtime.mesh.pipe": 2, "data.batch_size": 16, "data.microbatch": 2}
_EXPERTS = {"runtime.mesh.node": 2, "runtime.mesh.gpu": 4, "data.batch_size": 32}
_LONG = {"data.sequence_length": 1024, "data.batch_size": 4}

# Changes to the preset tiny with 8 sequences of 256 tokens.
CONFIGS = {
    "default": {},
    "remat=report": {"runtime.remat": "report"},
    "remat=layer": {"runtime.remat": "layer"},
    "bfloat16": {"runtime.compute_dtype": "bfloat16"},
    "recipe v3": {"runtime.recipe": "v3"},
    "recipe v3, bfloat16, remat=report": {
        "runtime.recipe": "v3", "runtime.compute_dtype": "bfloat16", "runtime.remat": "report"},
    "4 micro-batches": {"data.microbatch": 2},
    "1,024 tokens, remat=report": _LONG | {"runtime.remat": "report"},
    "experts on 2 x 4": _EXPERTS,
    "dualpipe_v on 2": _PIPE,
    "all layers unrolled": {"runtime.layer_unroll": 0},
    "32 sequences": {"data.batch_size": 32},
    "2 MTP modules, remat=report": {"model.mtp_depth": 2, "runtime.remat": "report"},
    "dense layers alone": {"model.dense_layers": 4, "model.mtp_depth": 0},
    "float8 moments": {"optim.mu_dtype": "float8", "optim.nu_dtype": "float8"},
    "experts on 2 x 4, buffers of 1.5": _EXPERTS | {"runtime.dispatch.factor": 1.5},
    "experts on 2 x 4, gathered, remat=report": _EXPERTS | {
        "runtime.dispatch.form": "gather", "runtime.remat": "report", "data.batch_size": 16},
    "data parallel on 4, ZeRO-1": {
        "runtime.mesh.data": 4, "runtime.zero": 1, "data.batch_size": 32},
    "2 x 2, ZeRO-1, 4 micro-batches": {
        "runtime.mesh.data": 2, "runtime.mesh.gpu": 2, "runtime.zero": 1, "data.batch_size": 16,
        "data.microbatch": 4},
    "recipe v3, experts and words on 4": {
        "runtime.mesh.gpu": 4, "data.batch_size": 16, "runtime.recipe": "v3",
        "runtime.shard_vocab": True},
    "recipe per_tensor_delayed, remat=report": {
        "runtime.recipe": "per_tensor_delayed", "runtime.remat": "report", "data.batch_size": 4},
    "grouped-query attention": {"model.attention.kind": "gqa", "model.attention.kv_heads": 2},
    "another width and depth": {
        "model.dim": 384, "model.vocab_size": 2048, "model.layers": 6, "data.batch_size": 4},
    "1f1b on 2, remat=report": _PIPE | {
        "runtime.pipeline.schedule": "1f1b", "runtime.remat": "report"},
    "zb1p on 4 x 2, 8 layers, remat=layer": _PIPE | {
        "runtime.mesh.pipe": 4, "runtime.mesh.gpu": 2, "runtime.pipeline.schedule": "zb1p",
        "runtime.remat": "layer", "model.layers": 8},
}


def assigned(cfg) -> dict[str, int]:
  """XLA's analysis of the compiled step, bytes on each device."""
  import jax
  import jax.numpy as jnp

  from dsv3_jax.parallel import mesh as mesh_lib
  from dsv3_jax.parallel import sharding
  from dsv3_jax.train import optim, state, step

  optimizer = optim.make_optimizer(cfg.optim)
  several = cfg.runtime.mesh.devices > 1 or cfg.runtime.schedule != "none"
  mesh = mesh_lib.make_mesh(cfg.runtime.mesh) if several else None
  graphdef, abstract, _ = state.initializer(
      lambda: state.build_model(cfg.model, 0), optimizer, mesh, cfg.runtime)
  micro = cfg.data.microbatch or cfg.data.batch_size
  shape = cfg.data.batch_size // micro, micro, cfg.data.sequence_length + 1
  tokens = jax.ShapeDtypeStruct(shape, jnp.int32,
                                sharding=mesh and sharding.batch_sharding(mesh))
  hyper = state.Hyper(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)
  train_step = step.make_train_step(graphdef, cfg, optimizer, mesh)
  m = train_step.lower(abstract, {"tokens": tokens}, hyper).compile(
      compiler_options=_QUICK).memory_analysis()
  found = {"arguments": m.argument_size_in_bytes, "results": m.output_size_in_bytes,
           "shared": m.alias_size_in_bytes, "temporaries": m.temp_size_in_bytes}
  return found | {"total": found["arguments"] + found["results"] - found["shared"]
                  + found["temporaries"]}


def saved() -> dict[str, dict[str, int]]:
  """XLA's analyses in the saved results, by the configs' changes."""
  path = common.RESULTS / "memory.json"
  lines = json.loads(path.read_text())["lines"] if path.exists() else []
  return {_key(line["details"]["config"]): line["details"]["xla"] for line in lines}


def _key(changes: dict) -> str:
  return json.dumps(changes, sort_keys=True)


def compare(name: str, changes: dict, known: dict[str, dict[str, int]]) -> common.Line:
  """One config's line; XLA's part of it from `known` where that has it."""
  from dsv3_jax import config
  from dsv3_jax.cost import memory

  cfg = config.replace(config.Config(), **{
      "data.sequence_length": 256, "data.batch_size": 8} | changes)
  predicted = memory.estimate(cfg)
  found = known.get(_key(changes)) or assigned(cfg)
  ratio = predicted.total / found["total"]
  temporaries = (predicted.total - found["arguments"]) / found["temporaries"]
  return common.Line(
      name, f"{found['total'] / 2**20:.1f} MiB", f"{predicted.total / 2**20:.1f} MiB", ratio,
      "within 10 %", abs(ratio - 1) < LIMIT,
      {"config": changes, "xla": found, "predicted": dict(predicted.worst.parts),
       "moment": predicted.worst.moment, "ratio_of_temporaries": temporaries})


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=1)
  p.add_argument("--only", default="", metavar="TEXT", help="configs whose name has TEXT in it")
  p.add_argument("--known", action="store_true",
                 help="compile only what the saved results have no analysis of")
  args = p.parse_args(argv)
  known = saved() if args.known else {}
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                             + f" --xla_force_host_platform_device_count={DEVICES}")
  lines = []
  for name, changes in CONFIGS.items():
    if args.only in name:
      lines.append(compare(name, changes, known))
      print(f"{len(lines)}: {lines[-1]}", file=sys.stderr, flush=True)
      if args.save:  # an interruption costs one config
        common.save("memory", lines)
  common.report("memory", lines, args.save)


if __name__ == "__main__":
  main()
