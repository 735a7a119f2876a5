"""Expert parallelism: what crosses between nodes, and what dispatch and combine cost.

    python -m benchmarks.dispatch

Crossings are counted at the report's scale, 8 nodes of 8 devices with 256 experts, 8 a token on at
most 4 nodes: rows from routings of the real router, bytes from the traced program (its all-to-alls
between nodes, forward and backward; buffers hold 1.25 times the mean share). Both stand next to
what probability predicts. The last lines run one MoE layer, forward and backward, on 8 virtual
devices of this machine: dispatch and combine alone against the whole layer.
"""

import functools
import math
import os

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


def layer_sides(shape: tuple[int, int], factor: float, form: str, tokens: int = 256):
  """(the MoE layer, dispatch and combine alone), each forward and backward on 8 devices."""
  import jax
  import numpy as np
  from flax import nnx
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from dsv3_jax import config
  from dsv3_jax.model import moe, routing
  from dsv3_jax.parallel import dispatch, rounds, sharding

  cfg = config.Model()
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 2)
  cut, whole = PartitionSpec(AXES), PartitionSpec()
  settings = dispatch.Settings(AXES, form, factor=factor)
  layer = moe.MoELayer(cfg, rngs=nnx.Rngs(0))
  graphdef, params, buffers = nnx.split(layer, nnx.Param, routing.RouterBias)
  specs = jax.tree_util.tree_map_with_path(
      lambda path, x: cut if x.ndim == 3 and x.shape[0] == cfg.moe.experts else whole, params)
  rng = np.random.default_rng(0)
  x_BTD = rng.standard_normal((shape[0] * shape[1], tokens, cfg.dim), np.float32)

  def put(tree, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

  params, x_BTD = put(params, specs), put(x_BTD, cut)

  def mapped(f, out):
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(specs, cut), out_specs=out))

  def whole_layer(params, x_BTD):
    params = sharding.varying(params, AXES)  # gradients of whole parameters stay apart, unsummed

    def forward(params, x_BTD):
      y_BTD, _ = nnx.merge(graphdef, params, buffers)(x_BTD, moe.MoECall(expert=settings))
      return y_BTD

    y_BTD, pull = jax.vjp(forward, params, x_BTD)
    dparams, dx_BTD = pull(y_BTD)
    return jax.tree.map(lambda g: g if g.ndim == 3 else g[None], dparams), dx_BTD

  def body(x_PD, gate_ZK, route):
    x_ZD = dispatch.dispatch(x_PD, route)
    return dispatch.combine(x_ZD * gate_ZK.sum(1, keepdims=True), route)

  def routed(params, x_BTD):
    x_PD = x_BTD.reshape(-1, cfg.dim)
    return routing.route(x_PD, params["w_router_DE"][...], buffers["bias_E"][...], cfg.moe)

  def moves(made, x_BTD):
    def forward(x_PD, gate_PA):
      return rounds.run(body, x_PD, made.expert_PA, gate_PA, cfg.moe.experts, 8, settings)[0]

    y_PD, pull = jax.vjp(forward, x_BTD.reshape(-1, cfg.dim), made.gate_PA)
    return pull(y_PD)

  made = mapped(routed, cut)(params, x_BTD)
  alone = jax.jit(jax.shard_map(moves, mesh=mesh, in_specs=cut, out_specs=cut))
  step = mapped(whole_layer, cut)
  return (lambda: jax.block_until_ready(step(params, x_BTD)),
          lambda: jax.block_until_ready(alone(made, x_BTD)))


def layer_lines(rounds: int) -> list[common.Line]:
  lines = []
  for shape, factor, form in (((2, 4), 1.5, "two_hop"), ((2, 4), 1.5, "flat"),
                              ((2, 4), 0.0, "two_hop")):
    step, alone = layer_sides(shape, factor, form)
    times = common.alternate({"layer": step, "alone": alone}, rounds, warmup=2, least=0.2)
    share = common.paired(times["alone"], times["layer"])
    room = f"factor {factor}" if factor else "worst case"
    lines.append(common.Line(
        f"MoE layer {shape[0]}x{shape[1]}, {form}, {room}: whole, moves", *(
            common.times_text(times[side]) for side in ("layer", "alone")), share,
        "<= 0.15 of the layer" if factor else "-", share <= 0.15 if factor else None,
        {side: common.summary(t) for side, t in times.items()}))
  return lines


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=7)
  p.add_argument("--count-only", action="store_true", help="leave out what is timed")
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  devices = "--xla_force_host_platform_device_count=8"
  if devices not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
  lines = crossing_lines()
  if not args.count_only:
    lines += layer_lines(args.rounds)
  common.report("dispatch", lines, args.save)


if __name__ == "__main__":
  main()
