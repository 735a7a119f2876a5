"""The pipeline's program: its FLOPs, its copies, how long it takes to compile, what a step costs.

    python -m benchmarks.pipeline
    python -m benchmarks.pipeline --schedules zb1p --mesh 8 1     others, on other meshes

All is asked of the preset tiny (MoE layers, MTP) on virtual devices of this machine, 4 ranks of a
pipeline with 2 devices each, against the same gradients without a pipeline on one device. FLOPs are
those of the matmuls in the compiled programs, a loop's as often as it turns, a branch's as often as
the schedule's tables ask for its op. Compile times are CPU seconds from a Python function to a
program, and the clock's in the details; the side without a pipeline gives the scale.
"""

import collections
import math
import os
import re
import resource
import time
from typing import Any

from benchmarks import common

BATCH, LENGTH, MICROS, MORE = 2, 128, 8, 40
_DIMS = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_BRANCH = re.compile(r"\bbranch_(\d+)/")


def flops(program, name: str) -> collections.Counter:
  """Branch (None: outside of all) -> FLOPs of its matmuls, done once, on one device.

  A loop with a known number of turns is one of the model's, or goes over the ticks; one without is
  a branch, whose turns the tables know.
  """
  from dsv3_jax.analysis import hlo

  total = collections.Counter()
  shapes = {i.name: i.result for i in program.computations[name]}
  for i in program.computations[name]:
    if i.opcode == "dot":
      kind, dims = re.match(r"(\w+)\[([\d,]*)\]", shapes[i.operands[0]]).groups()
      sizes = [int(n) for n in dims.split(",") if n]
      inner = math.prod(sizes[int(k)] for k in _DIMS.search(i.text)[1].split(",") if k)
      total[None] += 2 * inner * hlo.size(i.result) // hlo.size(kind + "[]")
    trips = int(known[1]) if (known := _TRIPS.search(i.text)) else 1
    for called in i.calls:
      scopes = collections.Counter(m[1] for inside in program.computations[called]
                                   if (m := _BRANCH.search(inside.scope)))
      branch = None
      if i.opcode == "while" and not known and scopes:
        branch = int(scopes.most_common(1)[0][0])
      for key, n in flops(program, called).items():
        if key is None:
          total[branch] += n * trips
        else:
          total[key] += n
  return total


def copied(program) -> collections.Counter:
  """Computation -> bytes that its copies write."""
  from dsv3_jax.analysis import hlo

  return collections.Counter({
      name: sum(hlo.size(i.result) for i in instructions if i.opcode == "copy")
      for name, instructions in program.computations.items()})


def built(function, *args) -> tuple[Any, float, float]:
  """The compiled function; CPU seconds that took, of all threads; seconds by the clock."""
  def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime

  cpu, clock = used(), time.perf_counter()
  compiled = function.lower(*args).compile()
  return compiled, used() - cpu, time.perf_counter() - clock


class Sides:
  """Gradients with and without a pipeline, of the same parameters and batch."""

  def __init__(self, schedule: str, ranks: int, shards: int, micros: int, **runtime):
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dsv3_jax import config
    from dsv3_jax.model.transformer import Transformer
    from dsv3_jax.parallel import mesh as mesh_lib
    from dsv3_jax.parallel import placement
    from dsv3_jax.train import pipelined, state, step

    alone = config.replace(config.Config(), **{f"runtime.{k}": v for k, v in runtime.items()})
    cfg = config.replace(alone, **{
        "runtime.mesh": config.Mesh(pipe=ranks, data=shards), "data.batch_size": BATCH * micros,
        "data.microbatch": BATCH, "runtime.pipeline.schedule": schedule})
    mesh = mesh_lib.make_mesh(cfg.runtime.mesh)
    plan = pipelined.plan(cfg, micros)
    self.tables = plan.schedule.ticks(plan.unit).tables(plan.kinds)
    graphdef, params, buffers = state.split(nnx.eval_shape(
        lambda: Transformer(cfg.model, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    params, buffers = jax.tree.map(
        lambda a: jnp.asarray(draw.normal(size=a.shape) * 0.02, a.dtype), (params, buffers))
    batch = {"tokens": jnp.asarray(draw.integers(
        cfg.model.vocab_size, size=(micros, BATCH, LENGTH + 1)), jnp.int32)}
    hyper = state.Hyper(*map(jnp.float32, (1e-3, 1e-3, 0.3)))
    places = placement.shardings(placement.places(params, mesh, False), mesh)
    rep = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    self.args = {"peer": jax.device_put((params, buffers, batch), jax.devices()[0]),
                 "ours": (jax.device_put(params, places),
                          *jax.device_put((buffers, batch), rep))}
    self.functions = {
        "peer": jax.jit(lambda p, b, batch: step.gradients(graphdef, alone, p, b, batch, hyper)),
        "ours": jax.jit(lambda p, b, batch: pipelined.gradients(cfg, p, b, batch, hyper, mesh,
                                                                plan))}

  def build(self, side: str) -> tuple[Any, float, float]:
    return built(self.functions[side], *self.args[side])


def work(schedule: str, ranks: int, shards: int) -> list[common.Line]:
  """FLOPs of both sides, and those of the parts of a backward pass."""
  from dsv3_jax.analysis import hlo

  # The grouped matmul for CPUs turns as often as the routing asks for, this one has fixed sizes.
  sides = Sides(schedule, ranks, shards, MICROS, gemm="ragged_dot")
  counts = {}
  for side in ("peer", "ours"):
    program = hlo.parse(sides.build(side)[0].as_text())
    counts[side] = flops(program, program.entry)
  asked = collections.Counter(sides.tables.columns["op"].ravel().tolist())
  ours = shards * (counts["ours"][None] * ranks + sum(
      n * counts["ours"][k] for k, n in asked.items()))
  peer = counts["peer"][None]
  roles = {(o.kind, o.backward): counts["ours"][k] for k, o in enumerate(sides.tables.opcodes)}
  splits = [(roles["I", role] + roles["W", role]) / roles["B", role]
            for kind, role in roles if kind == "B" and ("I", role) in roles
            and ("W", role) in roles]
  name = f"{schedule} {ranks}x{shards}"
  lines = [common.Line(f"FLOPs of a step, {name}", f"{peer / 1e9:.2f} G", f"{ours / 1e9:.2f} G",
                       ours / peer, "under 1.03x", ours / peer < 1.03,
                       {"outside_of_branches": counts["ours"][None]})]
  if splits:
    worst = max(splits, key=lambda r: abs(r - 1))
    lines.append(common.Line(f"I + W over B, {name}", "-", f"{len(splits)} kinds of stages", worst,
                             "1x", abs(worst - 1) < 1e-3))
  return lines


def compilation(schedule: str, ranks: int, shards: int, rounds: int) -> list[common.Line]:
  """Compile time, its growth with the batch, copies, and what a step costs."""
  import jax

  from dsv3_jax.analysis import hlo

  few, many = (Sides(schedule, ranks, shards, m) for m in (MICROS, MORE))
  peer, peer_cpu, peer_clock = few.build("peer")
  ours, cpu, clock = few.build("ours")
  more, more_cpu, more_clock = many.build("ours")
  texts = [c.as_text() for c in (ours, more)]
  lengths = [text.count("\n") for text in texts]
  name = f"{schedule} {ranks}x{shards}"
  lines = [
      common.Line(f"compilation, {name}, M={MICROS}", f"{peer_cpu:.1f} CPU s",
                  f"{cpu:.1f} CPU s, {clock:.1f} s", cpu / peer_cpu, "under 30 s", clock < 30,
                  {"peer_s": peer_clock, "ours_s": clock, "opcodes": len(few.tables.opcodes)}),
      common.Line(f"compilation, {name}, M={MORE} over M={MICROS}", f"{lengths[0]} lines",
                  f"{lengths[1]} lines", lengths[1] / lengths[0], "1x",
                  abs(lengths[1] / lengths[0] - 1) < 0.01,
                  {"cpu_s": more_cpu, "clock_s": more_clock})]
  program = hlo.parse(texts[0])
  within = {name: n for name, n in copied(program).items() if name != program.entry}
  params = sum(a.nbytes for a in jax.tree.leaves(few.args["peer"][0]))
  lines.append(common.Line(f"most bytes copied in a computation, {name}",
                           f"{params / 1e6:.1f} MB of parameters",
                           f"{max(within.values()) / 1e6:.1f} MB", max(within.values()) / params,
                           "-", None, {}))
  turns = {"peer": lambda: jax.block_until_ready(peer(*few.args["peer"])),
           "ours": lambda: jax.block_until_ready(ours(*few.args["ours"]))}
  times = common.alternate(turns, rounds)
  lines.append(common.Line(f"a step, {name}", common.times_text(times["peer"]),
                           common.times_text(times["ours"]),
                           common.paired(times["ours"], times["peer"]), "-", None,
                           {side: common.summary(t) for side, t in times.items()}))
  return lines


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=5)
  p.add_argument("--schedules", nargs="+", default=["dualpipe"], metavar="NAME")
  p.add_argument("--mesh", nargs=2, type=int, default=(4, 2), metavar=("RANKS", "SHARDS"))
  p.add_argument("--only", choices=("work", "compilation"))
  args = p.parse_args(argv)
  ranks, shards = args.mesh
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                             + f" --xla_force_host_platform_device_count={ranks * shards}")
  lines = []
  for schedule in args.schedules:
    if args.only != "compilation":
      lines += work(schedule, ranks, shards)
    if args.only != "work":
      lines += compilation(schedule, ranks, shards, args.rounds)
  common.report("pipeline", lines, args.save)


if __name__ == "__main__":
  main()
