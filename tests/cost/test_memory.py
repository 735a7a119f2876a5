"""The memory model against XLA, against the arrays that training has, and against sums by hand."""

import dataclasses

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest
from flax import nnx

from dsv3_jax import config, counts
from dsv3_jax.config import ConfigError
from dsv3_jax.cost import arrays, kept, memory, needed
from dsv3_jax.fp8 import recipe as recipe_lib
from dsv3_jax.fp8 import weights as weights_lib
from dsv3_jax.fp8.quantize import quantize
from dsv3_jax.model import block, moe
from dsv3_jax.model import remat as remat_lib
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import schedules, sharding
from dsv3_jax.train import optim, state, step
from pallas_kernels.xla import attention
from tests import quick

SMALL = config.Config(
    model=config.Model(
        vocab_size=1024, dim=128, layers=3, dense_layers=1, dense_ffn_dim=256,
        attention=config.Attention(heads=4, q_rank=64, kv_rank=32, nope_dim=16, rope_dim=8,
                                   v_dim=16),
        moe=config.MoE(experts=8, active=2, ffn_dim=64, groups=2, active_groups=1, group_top=1),
        mtp_depth=0),
    data=config.Data(sequence_length=128, batch_size=8))
V3 = config.Config(
    model=config.preset("v3_671b"),
    runtime=config.Runtime(
        compute_dtype="bfloat16", remat="report", recipe="v3", zero=1, shard_vocab=True,
        mesh=config.Mesh(pipe=16, data=2, node=8, gpu=8),
        pipeline=config.Pipeline("dualpipe"), dispatch=config.Dispatch(factor=1.5)),
    optim=config.Optim(mu_dtype="bfloat16", nu_dtype="bfloat16", ema_decay=0.999),
    data=config.Data(sequence_length=4096, batch_size=15360, microbatch=128))


def abstract_state(cfg):
  optimizer = optim.make_optimizer(cfg.optim)
  mesh = mesh_lib.make_mesh(cfg.runtime.mesh) if cfg.runtime.mesh.devices > 1 else None
  graphdef, abstract, _ = state.initializer(
      lambda: state.build_model(cfg.model, 0), optimizer, mesh, cfg.runtime)
  return graphdef, optimizer, mesh, abstract


def by_xla(cfg):
  """Arguments + results - shared + temporaries of the compiled step, and the temporaries."""
  graphdef, optimizer, mesh, abstract = abstract_state(cfg)
  micro = cfg.data.microbatch or cfg.data.batch_size
  tokens = jax.ShapeDtypeStruct(
      (cfg.data.batch_size // micro, micro, cfg.data.sequence_length + 1), jnp.int32,
      sharding=mesh and sharding.batch_sharding(mesh))
  hyper = state.Hyper(*[jax.ShapeDtypeStruct((), jnp.float32)] * 3)
  train_step = step.make_train_step(graphdef, cfg, optimizer, mesh)
  m = train_step.lower(abstract, {"tokens": tokens}, hyper).compile(
      compiler_options=quick.options()).memory_analysis()
  return (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
          + m.temp_size_in_bytes), m.temp_size_in_bytes


@pytest.mark.parametrize("changes", [
    {}, {"runtime.compute_dtype": "bfloat16", "runtime.remat": "report", "data.microbatch": 4}],
    ids=["plain", "bf16, report, micro-batches"])
def test_against_xla(changes):
  """Oracle: XLA's buffer assignment. benchmarks/memory.py compiles 25, meshes among them."""
  cfg = config.replace(SMALL, **changes)
  total, temporaries = by_xla(cfg)
  found = memory.estimate(cfg)
  assert found.total == pytest.approx(total, rel=0.1)
  state_part = sum(memory.state_bytes(cfg).values())
  assert found.total - state_part == pytest.approx(temporaries, rel=0.15)


@pytest.mark.parametrize("changes", [
    {}, {"optim.mu_dtype": "bfloat16", "model.attention.kind": "gqa"},
    {"optim.mu_dtype": "float8", "optim.nu_dtype": "float8"},
    {"runtime.recipe": "per_tensor_delayed"},
    {"runtime.mesh.node": 2, "runtime.mesh.gpu": 4},
    {"runtime.mesh.pipe": 2, "runtime.mesh.data": 4, "runtime.zero": 1},
    {"runtime.mesh.pipe": 2, "runtime.mesh.node": 2, "runtime.mesh.gpu": 2, "runtime.zero": 1,
     "runtime.shard_vocab": True}])
def test_state_is_exact(changes):
  """Oracle: the shards of the abstract training state."""
  cfg = config.replace(SMALL, **changes)
  if cfg.runtime.mesh.pipe > 1:
    cfg = config.replace(cfg, **{"data.batch_size": 16, "data.microbatch": 4})
  device = state.bytes_per_device(abstract_state(cfg)[3])["device"]
  found = memory.state_bytes(cfg)
  shards = cfg.runtime.mesh.batch_shards
  batch = 4 * cfg.data.batch_size // shards * (cfg.data.sequence_length + 1)
  assert sum(found.values()) - batch == pytest.approx(device, abs=64)


@pytest.mark.parametrize("name", config.PRESETS)
def test_parameters(name):
  """Oracle: the closed forms of counts.py."""
  model = config.preset(name)
  listed = sum(a.size for a in arrays.parameters(model)) + arrays.biases(model)
  assert listed == sum(counts.parameters(model).values())


def test_sizes_shared_with_the_code():
  """Oracle: the functions that the model calls, which import jax."""
  for pairs, experts in ((64, 8), (8192, 16), (4096 * 8, 4), (100, 64)):
    assert kept.block_rows(pairs, experts) == moe.block_rows(pairs, experts)
  for length in (8, 64, 200, 256, 512, 513, 1024, 4096, 16384):
    assert kept.attention_block(length) == attention.default_block(length)
  assert kept.UNROLL == attention._UNROLL
  x = jnp.ones((256, 384))
  for text in ("e4m3 1x128 fp32", "e4m3 1x128 pow2", "e4m3 tensor fp32", "e5m6 1x128 pow2",
               "e4m3 128x128 fp32", "e5m2 128x1 fp32"):
    o = recipe_lib.parse(text)
    held = jax.eval_shape(lambda o=o: quantize(x, o.format, o.tile, scale=o.scale, floor=1e-4))
    assert kept.operand(text, 256, 384, 4) == held.nbytes
  for name in config.RECIPES:
    for dtype in ("float32", "bfloat16"):
      runtime = config.Runtime(recipe=name, compute_dtype=dtype)
      assert kept.quantizes(runtime) == (recipe_lib.resolve(runtime) is not None)


@pytest.mark.parametrize("remat, recipe, moe_layer", [
    ("none", "none", True), ("none", "none", False), ("none", "v3", True), ("none", "v3", False),
    ("report", "none", True), ("report", "v3", True), ("report", "v3", False),
    ("layer", "none", True)])
def test_residuals(remat, recipe, moe_layer):
  """Oracle: what jax.vjp of one block returns for its backward pass, weights left out."""
  cfg = config.replace(SMALL, **{"runtime.remat": remat, "runtime.recipe": recipe})
  recipe = recipe_lib.resolve(cfg.runtime)
  made = nnx.eval_shape(lambda: block.Block(cfg.model, moe=moe_layer, rngs=nnx.Rngs(0)))
  graphdef, params, rest = nnx.split(made, nnx.Param, ...)
  params = nnx.to_pure_dict(params)
  prepared = jax.eval_shape(lambda p: weights_lib.prepare(p, recipe), params)

  def residuals(params, prepared, rest, x, cos, valid):
    call = block.BlockCall(cos, cos, None, moe.MoECall(valid, recipe=recipe), cfg.runtime)

    def run(params, x):
      if recipe is not None:
        params = weights_lib.with_masters(prepared, params)
      step = remat_lib.wrap_step(lambda b, x, _: b(x, call), cfg.runtime.remat)
      return step(nnx.merge(graphdef, params, rest), x, None)

    return jax.tree.leaves(jax.vjp(run, params, x, has_aux=True)[1])

  B, T = cfg.data.batch_size, cfg.data.sequence_length
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  x = f32(B, T, cfg.model.dim)
  traced = jax.make_jaxpr(residuals)(params, prepared, rest, x,
                                     f32(B, T, cfg.model.attention.rope_dim // 2), f32(B, T))
  leaves = dict.fromkeys(v for v in traced.jaxpr.outvars
                         if not isinstance(v, jax.extend.core.Literal))
  inputs = set(traced.jaxpr.invars)
  tokens = [v for v in leaves if v not in inputs or v.aval.shape == x.shape]
  # Weights, and rotary tables that all layers share, are counted elsewhere or are crumbs.
  sizes = [v.aval.size * v.aval.dtype.itemsize for v in tokens if v.aval.size >= B * T]
  held = sum(a.layer for a in map(lambda n: arrays.Array("", *n),
                                  arrays.block(cfg.model, moe_layer).items()))
  copies = 0 if remat != "none" else held * 4  # at most
  found = sum(kept.layer(cfg, kept.shape(cfg), moe_layer, remat).values())
  assert found * 0.97 <= sum(sizes) <= found * 1.03 + copies


def test_in_flight():
  """Oracle: the peak of the schedules' simulation, on a long batch."""
  for name, ranks, micros in (("1f1b", 4, 40), ("zb1p", 4, 40), ("gpipe", 4, 12),
                              ("dualpipe", 4, 40), ("dualpipe_v", 3, 41)):
    cfg = config.replace(SMALL, **{
        "model.layers": 8, "runtime.mesh.pipe": ranks, "runtime.pipeline.schedule": name,
        "data.batch_size": micros, "data.microbatch": 1})
    peak = max(schedules.make(name, ranks, micros).simulate().peak_activations)
    assert memory.estimate(cfg).in_flight == needed.estimate(cfg).in_flight == peak


def test_report_by_hand():
  """Oracle: sums by hand from the parameter table of the facts (1.2), for the report's plan."""
  found = needed.estimate(V3)
  assert len(found.ranks) == 16
  middle = found.ranks[7].parts  # two stages of 4 MoE layers: DualPipe holds each twice
  attention, expert, router = 187_107_328, 44_040_192, 1_835_264 - 256
  layer = attention + 2 * 7168 + 4 * expert + expert + router  # 256 / 64 routed, one shared
  assert middle["gradients"] == 4 * 8 * layer
  # ZeRO-1 over all; a little more, for 2,048 divides no axis of attention's arrays.
  even = 4 * (671_026_419_200 + 11_610_068_224) / 2048
  assert even < middle["master weights"] < 1.06 * even
  assert middle["moments"] == pytest.approx(middle["master weights"], rel=1e-9)  # bf16, twice
  assert found.host == 4 * (671_026_419_200 + 11_610_068_224 - 59 * 256)
  assert found.in_flight == 17
  assert found.total < 80e9 * 0.95  # and so it was trained


def test_without_zero_a_rank_has_its_own_state():
  """Oracle: sums by hand: twice 4 MoE layers of the report's plan, fp32 masters, two bf16 moments.
  """
  found = needed.estimate(config.replace(V3, **{"runtime.zero": 0}))
  middle, last = found.ranks[7].parts, found.ranks[0].parts
  assert middle["master weights"] == middle["gradients"] == middle["moments"]
  assert middle["master weights"] == needed.estimate(V3).ranks[7].parts["gradients"]
  assert last["master weights"] == last["gradients"]
  cfg = config.replace(V3, **{"runtime.zero": 0, "optim.nu_dtype": "float32"})
  assert needed.estimate(cfg).ranks[7].parts["moments"] == 1.5 * middle["moments"]
  # Without a pipeline there is one rank, which has all of it.
  whole = needed.estimate(SMALL).worst.parts
  assert whole["master weights"] == 4 * sum(a.size for a in arrays.parameters(SMALL.model))


@pytest.mark.parametrize("changes", [
    {}, {"data.microbatch": 2}, {"runtime.remat": "report", "runtime.compute_dtype": "bfloat16"},
    {"runtime.mesh.gpu": 4, "runtime.dispatch.factor": 1.5},
    {"runtime.mesh.gpu": 4, "runtime.mesh.data": 2, "runtime.zero": 1, "data.batch_size": 32,
     "data.microbatch": 8}])
def test_needed_without_a_pipeline(changes):
  """Law: a plan needs no more than the program for it holds, at any of its moments."""
  cfg = config.replace(SMALL, **changes)
  plan, program = needed.estimate(cfg), memory.estimate(cfg, "gpu")
  assert 0.3 * program.total < plan.total <= program.total


def test_cache():
  """Oracle: 70,272 bytes a token of the report's model in bf16; 61 layers of 512 + 64 numbers."""
  model = V3.model
  assert memory.cache_bytes(model, 1) == 70_272
  assert memory.cache_bytes(model, 4096, 128, "float32") == 61 * 576 * 4 * 4096 * 128
  gqa = dataclasses.replace(model, attention=dataclasses.replace(
      model.attention, kind="gqa", kv_heads=8))
  assert memory.cache_bytes(gqa, 1) == 61 * 8 * (192 + 128) * 2
  with pytest.raises(ConfigError, match="must be one of float32, bfloat16, float8"):
    memory.cache_bytes(model, 1, dtype="int4")


def test_components():
  """Law: parts add up; remat and sharding leave less, more tokens and no ZeRO more."""
  of = lambda **changes: memory.estimate(config.replace(
      SMALL, **{k.replace("__", "."): v for k, v in changes.items()}))
  base = of()
  assert tuple(base.worst.parts) == memory.COMPONENTS
  assert base.total == sum(base.worst.parts.values()) == base.to_dict()["total"]
  held = [of(runtime__remat=r).worst.parts["activations"] for r in ("none", "report", "layer")]
  assert held == sorted(held, reverse=True)
  assert of(data__batch_size=16).total > base.total
  data = dict(runtime__mesh__data=2)
  assert of(**data, runtime__zero=1).worst.parts["moments"] < of(**data).worst.parts["moments"]
  assert of(optim__ema_decay=0.9).host == 4 * sum(a.size for a in arrays.parameters(SMALL.model))
  whole = memory.estimate(V3, "gpu")
  assert all(r.filled <= r.total for r in whole.ranks)
  assert needed.estimate(V3).total < whole.total
