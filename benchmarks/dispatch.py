"""Expert parallelism: what crosses between nodes, and what dispatch and combine cost.

    python -m benchmarks.dispatch
    python -m benchmarks.dispatch --profile    where the time of dispatch and combine goes

Crossings are counted at the report's scale, 8 nodes of 8 devices with 256 experts, 8 a token on at
most 4 nodes: rows from routings of the real router, bytes from the traced program (its all-to-alls
between nodes, forward and backward; buffers hold 1.25 times the mean share). Both stand next to
what probability predicts. The last lines run on 8 virtual devices of this machine, forward and
backward: dispatch and combine alone against an MoE layer (attention and feed-forward) and against
its feed-forward.
"""

import collections
import functools
import math
import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import common

NODES, GPUS, EXPERTS, ACTIVE, GROUPS, KEPT, WIDTH = 8, 8, 256, 8, 8, 4, 7168
TOKENS, FACTOR = 4096, 1.25
AXES = ("node", "gpu")


def counted(routed: bool, tokens: int = 8192) -> list[float]:
  """Rows a token sends to other nodes: two hops, flat, once an expert.

  `routed`: by the router, from random affinities; else groups and experts are drawn at random. The
  router prefers groups whose best experts are good, so that fewer groups stay unused.
  """
  import jax
  import jax.numpy as jnp

  from dsv3_jax import config
  from dsv3_jax.model import routing
  from dsv3_jax.parallel import crossings

  cfg = config.MoE(experts=EXPERTS, active=ACTIVE, groups=GROUPS, active_groups=KEPT, group_top=2)

  @jax.jit
  def run(key):
    keys = jax.random.split(key)
    affinity_PE = jax.random.uniform(keys[0], (tokens, EXPERTS))
    if routed:
      expert_PA = routing.select(affinity_PE, jnp.zeros(EXPERTS), cfg)
    else:
      group_PG = jax.random.uniform(keys[1], (tokens, GROUPS))
      kept_PG = group_PG >= jax.lax.top_k(group_PG, KEPT)[0][:, -1:]
      kept_PE = jnp.repeat(kept_PG, EXPERTS // GROUPS, axis=1)
      expert_PA = jax.lax.top_k(jnp.where(kept_PE, affinity_PE, -1), ACTIVE)[1]
    return crossings.count(expert_PA, EXPERTS, NODES, GPUS, 0)

  return [int(n) / tokens for n in run(jax.random.key(0))]


def crossing_bytes(jaxpr, nodes: int = NODES) -> float:
  """Bytes that one device sends to other nodes in a traced program's all-to-alls.

  Loops count as nothing: they hold the rounds after the first.
  """
  total = 0.0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    if name == "while":
      continue
    if name == "all_to_all":
      axes = eqn.params["axis_name"]
      if "node" in (axes if isinstance(axes, tuple) else (axes,)):
        aval = eqn.invars[0].aval
        total += aval.size * aval.dtype.itemsize * (1 - 1 / nodes)
    for value in eqn.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += crossing_bytes(inner, nodes)
  return total


def traced(form: str, fp8: bool) -> float:
  """Bytes a token that dispatch and combine, forward and backward, send to other nodes."""
  import jax
  import jax.numpy as jnp
  from jax.sharding import AbstractMesh, AxisType, PartitionSpec

  from dsv3_jax.fp8.qtensor import QTensor
  from dsv3_jax.fp8.quantize import quantize
  from dsv3_jax.parallel import dispatch, payload, rounds

  codec = payload.Codec(functools.partial(quantize, scale="pow2"), QTensor.dequantize)
  wire = payload.Wire(codec, codec, "bfloat16") if fp8 else payload.Wire()
  settings = dispatch.Settings(AXES, form, factor=FACTOR, limit=KEPT, wire=wire)

  def body(x_PD, gate_ZK, route):
    x_ZD = dispatch.dispatch(x_PD, route)
    return dispatch.combine(x_ZD * gate_ZK.sum(1, keepdims=True).astype(x_ZD.dtype), route)

  def run(x_PD, gate_PA, expert_PA):
    def forward(x_PD, gate_PA):
      return rounds.run(body, x_PD, expert_PA, gate_PA, EXPERTS, 128, settings)[0]

    y_PD, pull = jax.vjp(forward, x_PD, gate_PA)
    return pull(y_PD)

  cut, W = PartitionSpec(AXES), NODES * GPUS
  mesh = AbstractMesh((NODES, GPUS), AXES, axis_types=(AxisType.Auto,) * 2)
  shapes = [jax.ShapeDtypeStruct((W * TOKENS, n), dtype) for n, dtype in (
      (WIDTH, jnp.bfloat16), (ACTIVE, jnp.float32), (ACTIVE, jnp.int32))]
  jaxpr = jax.make_jaxpr(jax.shard_map(run, mesh=mesh, in_specs=cut, out_specs=cut))(*shapes)
  return crossing_bytes(jaxpr.jaxpr) / TOKENS


def crossing_lines() -> list[common.Line]:
  from dsv3_jax.parallel import crossings

  names = ("two_hop", "flat", "naive")
  expected = crossings.expected(EXPERTS, ACTIVE, GROUPS, KEPT, NODES, GPUS)
  lines = []
  for routed, how in ((False, "random experts"), (True, "router")):
    rows = counted(routed)
    details = {name: {"counted": n, "random": e} for name, n, e in zip(
        names, rows, expected, strict=True)}
    for i, form in ((1, "once a device"), (2, "once an expert")):
      ratio, predicted = rows[i] / rows[0], expected[i] / expected[0]
      target, met = f"{predicted:.3f}x for random experts", None
      if not routed:
        target, met = f"{predicted:.3f}x, within 1 %", math.isclose(ratio, predicted, rel_tol=0.01)
      lines.append(common.Line(f"rows to other nodes, {how}: {form}, two hops", f"{rows[i]:.3f}",
                               f"{rows[0]:.3f}", ratio, target, met, details))
  flat, two = traced("flat", False), traced("two_hop", False)
  most = ACTIVE / KEPT  # what the buffers are sized for
  lines.append(common.Line("all-to-alls between nodes, bytes a token: flat, two hops",
                           f"{flat / 1e3:.1f} kB", f"{two / 1e3:.1f} kB", flat / two,
                           f">= {most:.2f}x: devices over nodes", flat / two >= most * 0.99))
  small = traced("two_hop", True)
  lines.append(common.Line("the same, two hops: bf16, FP8 dispatched",
                           f"{two / 1e3:.1f} kB", f"{small / 1e3:.1f} kB", two / small,
                           ">= 1.3x: combines stay bf16", two / small >= 1.3))
  whole, code = 2 * WIDTH, WIDTH + -(-WIDTH // 128)
  lines.append(common.Line("bytes of a dispatched row: bf16, FP8 with its scales", str(whole),
                           str(code), whole / code, ">= 1.9x", whole / code >= 1.9))
  return lines


class Sides(NamedTuple):
  """Functions that run forward and backward on 8 devices and wait for the end."""

  block: Callable[[], Any]  # attention and MoE feed-forward
  ffn: Callable[[], Any]  # the MoE feed-forward
  moves: Callable[[], Any]  # its dispatch and combine, and a product between that separates them
  narrow: Callable[[], Any]  # the same with rows of 8 numbers: plans, messages, meetings
  hlo: Callable[[], str]  # of `moves`


def layer_sides(shape: tuple[int, int], factor: float, form: str, tokens: int = 256) -> Sides:
  """One MoE layer of the tiny model, `tokens` tokens a device on a mesh of `shape`."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from dsv3_jax import config
  from dsv3_jax.model import block, moe, rope, routing
  from dsv3_jax.parallel import dispatch, rounds, sharding

  cfg = config.Model()
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)
  cut, whole = PartitionSpec(AXES), PartitionSpec()
  settings = dispatch.Settings(AXES, form, factor=factor)
  call = moe.MoECall(expert=settings)
  x_BTD = np.random.default_rng(0).standard_normal((math.prod(shape), tokens, cfg.dim), np.float32)
  x_BTD = jax.device_put(x_BTD, NamedSharding(mesh, cut))

  def split(module):
    graphdef, params, buffers = nnx.split(module, nnx.Param, routing.RouterBias)
    specs = jax.tree_util.tree_map(
        lambda x: cut if x.ndim == 3 and x.shape[0] == cfg.moe.experts else whole, params)
    params = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), params, specs)
    return graphdef, params, buffers, specs

  def mapped(f, *specs):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=cut))

  def step(module, run):
    """`run(module, x_BTD)` forward and backward."""
    graphdef, params, buffers, specs = split(module)

    def both(params, x_BTD):
      params = sharding.varying(params, AXES)  # gradients of whole parameters stay apart, unsummed
      y_BTD, pull = jax.vjp(lambda p, x: run(nnx.merge(graphdef, p, buffers), x), params, x_BTD)
      dparams, dx_BTD = pull(y_BTD)
      return jax.tree.map(lambda g: g if g.ndim == 3 else g[None], dparams), dx_BTD

    compiled = mapped(both, specs, cut)
    return lambda: jax.block_until_ready(compiled(params, x_BTD))

  def whole_block(layer, x_BTD):
    cos, sin = rope.rope_table(cfg.attention, jnp.arange(tokens)[None])
    return layer(x_BTD, block.BlockCall(cos, sin, None, call, config.Runtime()))[0]

  def body(x_PD, gate_ZK, route):
    x_ZD = dispatch.dispatch(x_PD, route)
    return dispatch.combine(x_ZD * gate_ZK.sum(1, keepdims=True), route)

  def moves(made, x_BTD):
    def forward(x_PD, gate_PA):
      return rounds.run(body, x_PD, made.expert_PA, gate_PA, cfg.moe.experts, 8, settings)[0]

    y_PD, pull = jax.vjp(forward, x_BTD.reshape(-1, x_BTD.shape[-1]), made.gate_PA)
    return pull(y_PD)

  ffn = moe.MoELayer(cfg, rngs=nnx.Rngs(0))
  made = mapped(lambda x_BTD: routing.route(
      x_BTD.reshape(-1, cfg.dim), ffn.w_router_DE[...], ffn.bias_E[...], cfg.moe), cut)(x_BTD)
  alone, narrow_BTD = mapped(moves, cut, cut), x_BTD[..., :8]
  return Sides(step(block.Block(cfg, moe=True, rngs=nnx.Rngs(0)), whole_block),
               step(ffn, lambda layer, x_BTD: layer(x_BTD, call)[0]),
               lambda: jax.block_until_ready(alone(made, x_BTD)),
               lambda: jax.block_until_ready(alone(made, narrow_BTD)),
               lambda: alone.lower(made, x_BTD).compile().as_text())


LAYERS = (((2, 4), 1.5, "two_hop"), ((2, 4), 1.5, "flat"), ((2, 4), 0.0, "two_hop"))


def layer_name(shape, factor, form) -> str:
  return f"{shape[0]}x{shape[1]}, {form}, {f'factor {factor}' if factor else 'worst case'}"


def layer_lines(rounds: int) -> list[common.Line]:
  lines = []
  for case in LAYERS:
    sides = layer_sides(*case)
    times = common.alternate({name: getattr(sides, name) for name in ("block", "ffn", "moves")},
                             rounds, warmup=2, least=0.2)
    details = {side: common.summary(t) for side, t in times.items()}
    for name, of in (("block", "MoE layer"), ("ffn", "its feed-forward")):
      share, factor = common.paired(times["moves"], times[name]), case[1]
      lines.append(common.Line(
          f"{of}, {layer_name(*case)}: whole, moves", *(
              common.times_text(times[side]) for side in (name, "moves")), share,
          f"<= 0.15 of the {'layer' if name == 'block' else 'feed-forward'}" if factor else "-",
          share <= 0.15 if factor else None, details))
  return lines


def profile(steps: int = 20) -> None:
  """Prints where the wall-clock time of dispatch and combine alone goes.

  An operation belongs to the scope that `parallel.hops` or `rows` names, forward and backward
  together. One that waits in an all-to-all for devices that still work costs nothing by itself, so
  collectives have only the time in which nothing else is active: copies, waiting for threads.
  """
  from benchmarks import trace

  for case in LAYERS:
    sides = layer_sides(*case)
    times = common.alternate({"moves": sides.moves, "narrow": sides.narrow}, 5, warmup=2, least=0.1)
    with trace.capture() as found:
      for _ in range(steps):
        sides.moves()
    known = trace.instructions(sides.hlo())
    part_of = {name: _part(opcode, op_name) for name, (_, opcode, op_name) in known.items()}
    waiting = {name for name, part in part_of.items() if not part}
    time_of, runs, rest = trace.shares(found.events(), waiting.__contains__)
    parts, count = collections.Counter(), collections.Counter()
    for name, ns in time_of.items():
      parts[part_of.get(name, "other")] += ns
      count[part_of.get(name, "other")] += runs[name]
    parts["collectives alone (copies, waiting), or nothing active"] = rest
    total = sum(parts.values())
    print(f"dispatch and combine alone, {layer_name(*case)}: {total / steps / 1e6:.1f} ms a step "
          f"traced; rows of 8 numbers take {common.paired(times['narrow'], times['moves']):.0%}")
    for part, ns in parts.most_common():
      print(f"  {ns / total:6.1%}  {count[part] / steps:4.0f} operations  {part}")


def _part(opcode: str, op_name: str) -> str:
  """What an operation is for; "" for those that wait."""
  if opcode in ("all-to-all", "all-reduce", "while", "call", "conditional"):
    return ""
  scope = re.search(r"\b(plan|gather|sums|rows)[/)]", op_name)
  return scope[1] if scope else "copies for all-to-alls" if "all_to_all" in op_name else "other"


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=7)
  p.add_argument("--count-only", action="store_true", help="leave out what is timed")
  p.add_argument("--profile", action="store_true",
                 help="only where the time of dispatch and combine goes, by operation")
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  devices = "--xla_force_host_platform_device_count=8"
  if devices not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
  if args.profile:
    profile()
    return
  lines = crossing_lines()
  if not args.count_only:
    lines += layer_lines(args.rounds)
  common.report("dispatch", lines, args.save)


if __name__ == "__main__":
  main()
