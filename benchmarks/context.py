"""Sequences cut over devices: what travels, and what each device holds.

    python -m benchmarks.context
    python -m benchmarks.context --quick     without the training steps and the timing

Latents travel in ours (`dsv3_jax/parallel/context.py`). The peer sends keys and values of all heads
instead and is the same program otherwise: gathered in the forward and the backward pass, their
gradients reduced and scattered.

Bytes are those that a device receives, read off the collectives of the compiled program (forward
and backward pass of two attention layers of the 671B model's widths in a loop, as the model has
them), a layer and token that it gets from elsewhere; beside them the formula's. Peak temporary
memory is the compiler's own figure (`compiled.memory_analysis()`) for one device of the mesh, of
these layers and of a whole training step, with remat=report. Nothing of these is run, and
everything is fp32, since a CPU would keep copies of bf16.

Times are of all virtual devices on this machine's cores, so they compare work, not speed: 4 devices
expand each latent on as many devices as see it.
"""

import functools
import os

from benchmarks import common

DEVICES, LAYERS = 4, 2
LAYER_TOKENS, STEP_TOKENS, TIMED_TOKENS = 32768, 8192, 2048


def layers(arm: str, devices: int, tokens: int, cfg):
  """Forward and backward pass of two attention layers in a loop, and abstract arguments.

  Args:
    arm: "latents" or "heads": what travels.
    devices: along context.
    tokens: of the one sequence.
    cfg: `config.Model`.
  """
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from dsv3_jax import config
  from dsv3_jax.model import attention, block, mla, remat, rope
  from dsv3_jax.parallel import context, sharding

  runtime = config.Runtime(attention="xla")
  graphdef, params = nnx.split(nnx.eval_shape(
      lambda: block.stack(lambda rngs: mla.MLA(cfg, rngs=rngs), LAYERS, nnx.Rngs(0))))

  def heads(m, x_BTD, cos, sin, cut):
    first, z_BTZ = m.down(x_BTD)
    whole = mla.expand(m.w_ukv_CHW[...], m.latents(z_BTZ, cos, sin), cfg.attention.nope_dim)
    o_BTHU = context.attend(
        m.queries(first, cos, sin), whole, lambda params, fixed, kept: kept, (), None, cut,
        scale=rope.softmax_scale(cfg.attention))
    return attention.output(o_BTHU, m.w_o_HUD[...], None)

  def local(params, x_BTD, dy_BTD):
    cut = context.cut(tokens, ("context",)) if devices > 1 else None
    positions_BT = jnp.arange(tokens, dtype=jnp.int32)[None]
    positions_BT = positions_BT if cut is None else cut.own(positions_BT)
    cos, sin = rope.rope_table(cfg.attention, positions_BT)

    def forward(params, x_BTD):
      def step(m, x_BTD, _):
        y_BTD = (heads(m, x_BTD, cos, sin, cut) if arm == "heads" and cut is not None else
                 m(x_BTD, cos, sin, None, runtime, cut))
        return x_BTD + y_BTD, None

      return block.scan(nnx.merge(graphdef, params), remat.wrap_step(step, "report"), x_BTD,
                        unroll=1)[0]

    params = sharding.varying(params, ("context",) if cut else ())
    y_BTD, pull = jax.vjp(forward, params, x_BTD)
    dparams, dx_BTD = pull(dy_BTD)
    return y_BTD, dx_BTD, jax.tree.map(lambda d: d[None], dparams)  # each device's, unsummed

  x_BTD = jax.ShapeDtypeStruct((1, tokens, cfg.dim), jnp.float32)
  if devices == 1:
    return jax.jit(local), (params, x_BTD, x_BTD)
  mesh = jax.make_mesh((devices,), ("context",), axis_types=(AxisType.Auto,),
                       devices=jax.devices()[:devices])
  rep, cut = PartitionSpec(), PartitionSpec(None, "context")
  spread = jax.shard_map(local, mesh=mesh, in_specs=(rep, cut, cut),
                         out_specs=(cut, cut, PartitionSpec("context")))
  place = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype,
                                               sharding=NamedSharding(mesh, spec))
  x_BTD = place(x_BTD, cut)
  return jax.jit(spread), (jax.tree.map(lambda p: place(p, rep), params), x_BTD, x_BTD)


def received(compiled) -> dict[str, int]:
  """Bytes that a device receives by each kind of collective, a turn of the loops."""
  from dsv3_jax.analysis import hlo

  program, found = hlo.parse(compiled.as_text()), {}
  for computation in program.computations.values():
    for i in computation:
      if i.opcode not in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all",
                          "collective-permute"):
        continue
      n, size = len(hlo.groups(i)[0]), hlo.size(i.result)
      share = {"all-gather": (n - 1) / n, "reduce-scatter": n - 1}[i.opcode]  # there are no others
      found[i.opcode] = found.get(i.opcode, 0) + int(size * share)
  return found


def bytes_line(latents, heads, a, tokens: int) -> common.Line:
  """What travels, counted and by formula."""
  ours, peer = received(latents), received(heads)
  away = tokens * (DEVICES - 1) / DEVICES  # tokens that are elsewhere
  numbers = {"latents": a.kv_rank + a.rope_dim, "heads": a.heads * (a.qk_dim + a.v_dim)}
  formula = {name: 3 * 4 * n for name, n in numbers.items()}  # two gathers, a reduce-scatter; fp32
  each = {"latents": sum(ours.values()) / away, "heads": sum(peer.values()) / away}
  exact = all(abs(each[name] / formula[name] - 1) < 0.001 for name in formula)
  return common.Line(
      f"bytes a token and layer ({numbers['heads']:,} / {numbers['latents']} numbers, 3 times)",
      f"{each['heads']:,.0f}", f"{each['latents']:,.0f}", each["heads"] / each["latents"],
      f"the formula's: {formula['heads']:,} and {formula['latents']:,}", exact,
      {"ours": ours, "peer": peer, "tokens_elsewhere": away, "formula": formula})


def temporary(compiled) -> int:
  return compiled.memory_analysis().temp_size_in_bytes


def step_memory(devices: int) -> dict[str, int]:
  """XLA's analysis of a training step of the tiny model on one long sequence."""
  from benchmarks import memory
  from dsv3_jax import config

  cfg = config.replace(config.Config(), **{
      "data.sequence_length": STEP_TOKENS, "data.batch_size": 1, "runtime.mesh.context": devices,
      "runtime.remat": "report"})
  return memory.assigned(cfg)


def timing(rounds: int) -> common.Line:
  """The layers at width 256 on 1 and on 4 virtual devices of the same cores."""
  import jax
  import jax.numpy as jnp

  from dsv3_jax import config

  sides = {}
  for devices in (DEVICES, 1):
    f, args = layers("latents", devices, TIMED_TOKENS, config.Model())
    draw = lambda s: jax.device_put(
        jax.random.normal(jax.random.key(0), s.shape, jnp.float32), s.sharding)
    arguments = jax.tree.map(draw, args)
    sides[devices] = functools.partial(lambda f, a: jax.block_until_ready(f(*a)), f, arguments)
  times = common.alternate(sides, rounds)
  ratio = common.paired(times[1], times[DEVICES])
  return common.Line(
      f"tiny layers, {TIMED_TOKENS:,} tokens: 1 device against {DEVICES} on the same cores",
      common.times_text(times[1]), common.times_text(times[DEVICES]), ratio, "none", None,
      {"peer": common.summary(times[1]), "ours": common.summary(times[DEVICES])})


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=5)
  p.add_argument("--quick", action="store_true", help="no training steps, no timing")
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "")
                             + f" --xla_force_host_platform_device_count={DEVICES}")
  from dsv3_jax import config

  model = config.preset("v3_671b")
  made = {}
  for devices in (1, 2, DEVICES):
    for arm in ("latents", "heads")[:1 if devices == 1 else 2]:
      f, arguments = layers(arm, devices, LAYER_TOKENS, model)
      made[arm, devices] = f.lower(*arguments).compile()
  lines = [bytes_line(made["latents", DEVICES], made["heads", DEVICES], model.attention,
                      LAYER_TOKENS)]
  alone = temporary(made["latents", 1])
  for devices in (2, DEVICES):
    ours, peer = (temporary(made[arm, devices]) for arm in ("latents", "heads"))
    lines.append(common.Line(
        f"671B, {LAYERS} layers, {LAYER_TOKENS:,} tokens on {devices}: temporary memory a device",
        f"{peer / 2**30:.2f} GiB", f"{ours / 2**30:.2f} GiB", peer / ours,
        f"on one device {alone / 2**30:.2f} GiB", None,
        {"peer_bytes": peer, "ours_bytes": ours, "one_device_bytes": alone}))
  if not args.quick:
    one = step_memory(1)
    for devices in (2, DEVICES):
      found = step_memory(devices)
      lines.append(common.Line(
          f"tiny step, {STEP_TOKENS:,} tokens on {devices}: temporary memory a device",
          f"{one['temporaries'] / 2**20:.0f} MiB on one",
          f"{found['temporaries'] / 2**20:.0f} MiB",
          one["temporaries"] / found["temporaries"], f"{devices}x would be all of it", None,
          {"peer": one, "ours": found}))
    lines.append(timing(args.rounds))
  common.report("context", lines, args.save)


if __name__ == "__main__":
  main()
