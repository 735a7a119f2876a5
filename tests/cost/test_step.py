"""Kernels and the step they make."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax import config, counts
from dsv3_jax.config import Config, ConfigError, Data, Mesh, Model, Pipeline, Runtime
from dsv3_jax.cost import cluster, estimate, operations, step, timing
from dsv3_jax.cost.hardware import HARDWARE
from dsv3_jax.parallel import schedules
from dsv3_jax.parallel.schedules import simulate
from tests.parallel.flops import flops

H800 = HARDWARE["h800"]
EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
# No time for sending, for results or for idling beside others: what is left is FLOPs.
SMALL = Config(
    model=Model(layers=4, dense_layers=4, mtp_depth=0, dim=64, vocab_size=128, dense_ffn_dim=96),
    runtime=Runtime(compute_dtype="bfloat16", mesh=Mesh(pipe=4), pipeline=Pipeline("1f1b")),
    data=Data(sequence_length=32, batch_size=8, microbatch=1))


def experiment(name):
  spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.parametrize("preset", ["tiny", "moe_16b", "v3_671b"])
@pytest.mark.parametrize("kind", ["mla", "gqa"])
@pytest.mark.parametrize("recipe", ["none", "v3"])
def test_flops_of_the_kernels(preset, kind, recipe):
  """Oracle: counts.flops_per_token, a closed form; useful FLOPs do not depend on the recipe."""
  model = dataclasses.replace(config.preset(preset), attention=dataclasses.replace(
      config.preset(preset).attention, kind=kind))
  n = operations.numerics(Runtime(recipe=recipe, remat="report"))
  parts = [(model.dense_layers, operations.block(model, 512, 512, False, 0, n)),
           (model.moe_layers + model.mtp_depth, operations.block(model, 512, 512, True, 4, n)),
           (1 + model.mtp_depth, operations.head(model, 512, n)),
           (model.mtp_depth, operations.mtp_input(model, 512, n))]
  total = sum(times * sum(timing.flops(kernels).values()) for times, kernels in parts)
  assert total / 512 == pytest.approx(counts.flops_per_token(model, 512), rel=1e-12)


def test_flops_of_a_traced_step():
  """Oracle: the matmuls of jax's own gradient of a tiny dense model; attention apart, whose tiles
  above the diagonal jax counts or leaves out as its implementation likes.
  """
  from flax import nnx

  from dsv3_jax.model import loss as loss_lib
  from dsv3_jax.train import state

  model = dataclasses.replace(SMALL.model, layers=2, dense_layers=2)
  graphdef, params, buffers = state.split(nnx.eval_shape(lambda: state.build_model(model, seed=0)))

  def run(params, tokens_BS):
    return loss_lib.loss_fn(nnx.merge(graphdef, params, buffers), {"tokens": tokens_BS},
                            loss=config.Loss(), mtp_weight=0.0, runtime=Runtime(),
                            denominator=64.0)[0]

  def counted(length):
    tokens = jax.ShapeDtypeStruct((64 // length, length + 1), jnp.int32)
    return flops(jax.make_jaxpr(jax.grad(run))(params, tokens))

  # Attention's part is what grows with the length at equally many tokens.
  apart = counted(16) - (counted(32) - counted(16))
  n = operations.numerics(Runtime())
  kernels = [*operations.block(model, 64, 32, False, 0, n) * 2, *operations.head(model, 64, n)]
  parts = timing.flops(kernels)
  expected = sum(parts.values()) - parts["attention"]
  assert apart == pytest.approx(expected, rel=0.01)


def test_recomputation():
  """Oracle: by hand: the up-projections once more, or all of the forward pass."""
  model, tokens = config.preset("v3_671b"), 128
  a = model.attention

  def again(remat):
    n = operations.numerics(Runtime(compute_dtype="bfloat16", remat=remat, recipe="v3"))
    return sum(timing.flops(operations.block(model, tokens, 128, True, 4, n), True).values())

  scores = 2 * tokens * (129 / 2) * a.heads * a.qk_dim  # of attention's backward, always
  ups = 2 * tokens * a.heads * (a.q_rank * a.qk_dim + a.kv_rank * (a.nope_dim + a.v_dim))
  n = operations.numerics(Runtime(compute_dtype="bfloat16", recipe="v3"))
  block = operations.block(model, tokens, 128, True, 4, n)
  forward = sum(k.flops for k in block if k.phase == "F")
  assert again("none") == pytest.approx(scores)
  assert again("report") == pytest.approx(scores + ups)
  assert again("layer") == pytest.approx(scores + forward)


def test_operands_in_bytes():
  """Oracle: by hand, scales included."""
  for text, size in (("compute", 2), ("fp32", 4), ("e4m3 1x128 pow2", 1 + 1 / 128),
                     ("e4m3 1x128 fp32", 1 + 4 / 128), ("e5m6 1x128 pow2", 1.5 + 1 / 128),
                     ("e4m3 128x128 fp32", 1 + 4 / 128**2), ("e4m3 tensor fp32 delayed", 1)):
    assert operations.operand_bytes(text, 2) == pytest.approx(size, rel=1e-6)


def test_unequal_stages():
  """Oracle: the critical path by hand: one micro-batch passes all stages there and back."""
  plan = schedules.make("1f1b", 3, 1)
  stages = [step.Stage(f, 10 * f, 0.5 * f, 0.0, 0.0) for f in (1.0, 3.0, 2.0)]
  found = simulate.run(plan, lambda op: step._seconds(tuple(stages), H800, op), comm=0.25)
  assert found.makespan == pytest.approx(6 + 60 + 3 + 4 * 0.25)
  assert found.bubble[1] == pytest.approx(found.makespan - 3 - 30 - 1.5)


def test_pairs():
  """Oracle: the longer of computing and sending, over the share that the trace is busy."""
  share = H800.shares.overlap
  ahead, back = step.Stage(1, 2, 3, 4, 5), step.Stage(10, 20, 30, 40, 45)
  assert step.pair(ahead, back, H800) == pytest.approx((1 + 20 + 30) / share)
  far = dataclasses.replace(back, send_backward=500.0)
  assert step.pair(ahead, far, H800) == pytest.approx(504 / share)
  assert [back.seconds(k) for k in "FIWB"] == [50, 65, 30, 95]


def test_a_step_adds_up():
  """Law: the breakdown is the whole step: makespan and optimizer; every rank works or idles."""
  found = estimate(SMALL, H800)
  plan = schedules.make("1f1b", 4, 8)
  sim = simulate.run(plan, lambda op: step._seconds(found.stages, H800, op), _hop(SMALL))
  assert found.step == pytest.approx(sim.makespan + sum(found.optimizer.values()))
  assert found.microbatches == 8 and found.tokens == 256
  assert found.tokens_per_second == pytest.approx(256 / found.step / 4)


def _hop(cfg):
  return 32 * cfg.model.dim * 2 / (H800.fast * H800.shares.fast)  # four lie in a node


def test_dimensions():
  """Law: a machine twice as fast in everything takes half the time; links alone change sending."""
  twice = dataclasses.replace(H800, **{name: 2 * getattr(H800, name) for name in (
      "bf16", "fp8", "fp32", "vector", "bandwidth", "fast", "slow")})
  cfg = cluster.reported()
  whole, half = estimate(cfg, H800), estimate(cfg, twice)
  assert half.step == pytest.approx(whole.step / 2)
  assert half.mfu() == pytest.approx(whole.mfu())
  links = estimate(cfg, dataclasses.replace(H800, fast=2 * H800.fast, slow=2 * H800.slow))
  for a, b in zip(whole.stages, links.stages, strict=True):
    assert (a.send_forward, a.send_backward) == pytest.approx(
        (2 * b.send_forward, 2 * b.send_backward))
    assert (a.forward, a.inputs, a.weights) == (b.forward, b.inputs, b.weights)
  assert links.optimizer["reduce"] == pytest.approx(whole.optimizer["reduce"] / 2)
  assert links.optimizer["update"] == whole.optimizer["update"]


def test_recomputed_layers_dispatch_again():
  """Oracle: by hand: with remat="layer" the rows of each MoE layer are sent once more."""
  cfg = cluster.reported()
  kept, again = (estimate(config.replace(cfg, **{"runtime.remat": r}), H800)
                 for r in ("report", "layer"))
  assert again.stages[1].send_forward == kept.stages[1].send_forward
  assert again.stages[1].send_backward - kept.stages[1].send_backward == pytest.approx(
      4 * kept.exchange["dispatch"].seconds)


def test_groups_follow_the_fast_domain():
  """Oracle: ring by hand: what lies within one fast domain of 8 sends nothing over slow links."""
  slow = dataclasses.replace(H800, slow=1e3)  # whatever crosses takes days
  cfg = config.replace(SMALL, **{
      "runtime.mesh": Mesh(data=8), "runtime.pipeline": Pipeline(), "data.batch_size": 64,
      "data.microbatch": 8, "model.dense_layers": 2, "model.moe.experts": 8, "model.moe.groups": 1,
      "model.moe.active_groups": 1, "model.moe.active": 2, "model.moe.ffn_dim": 32})
  words = {"runtime.shard_vocab": True}
  for mesh, more in ((Mesh(data=8), {}), (Mesh(data=4, gpu=2), {}), (Mesh(data=4, gpu=2), words),
                     (Mesh(node=2, gpu=4), words)):
    found = estimate(config.replace(cfg, **{"runtime.mesh": mesh}, **more), slow)
    assert sum(found.optimizer.values()) < 1 and found.stages[0].send_forward < 1, mesh
  # Two domains of 8 along gpu: the words' gather crosses, and so do the sums.
  wide = config.replace(cfg, **{"runtime.mesh": Mesh(gpu=16), "model.moe.experts": 16, **words,
                                "model.dense_layers": 4, "data.microbatch": 16})
  found = estimate(wide, slow)
  gathered = 15 / 16 * 16 * 32 * 64 * 2 / 8 / (1e3 * 0.8)
  assert found.stages[0].send_forward == pytest.approx(gathered)
  assert found.optimizer["reduce"] > 1


def test_equal_stages_idle_as_schedules_say():
  """Oracle: Schedule.simulate with one duration a kind, where stages are equal and sending takes no
  time; and table 2's formula where it is exact.
  """
  cfg = config.replace(SMALL, **{
      "model.vocab_size": 1, "model.dim": 512, "data.sequence_length": 4096,
      "data.batch_size": 16, "model.layers": 32, "model.dense_layers": 32})
  instant = dataclasses.replace(H800, slow=1e30, fast=1e30)
  for name in ("gpipe", "1f1b", "zb1p", "dualpipe", "dualpipe_v"):
    found = estimate(config.replace(cfg, **{"runtime.pipeline.schedule": name}), instant)
    one = found.stages[0]
    sim = schedules.make(name, 4, 16).simulate(
        one.forward, one.inputs, one.weights, step.pair(one, one, instant))
    # The last stage alone has the head, of one word.
    bubble = sum(sim.bubble) / 4
    assert found.breakdown["bubble"] == pytest.approx(bubble, rel=0.05), name
    if not name.startswith("dual"):
      assert found.formula_bubble == pytest.approx(bubble, rel=0.05), name


def test_devices():
  """Law: twice the data-parallel parts, half the micro-batches, as many tokens."""
  cfg = experiment("v3_671b")
  more = cluster.on(cfg, 2048)
  assert more.runtime.mesh == dataclasses.replace(cfg.runtime.mesh, data=2)
  assert (more.data.microbatch, more.data.batch_size, more.data.batch_start) == (128, 15360, 3072)
  a, b = estimate(cfg, H800), estimate(more, H800)
  assert (a.microbatches, b.microbatches, a.tokens) == (240, 120, b.tokens)
  assert a.step / 2 < b.step < a.step
  assert cluster.on(cfg, 1024) == cfg
  tiny = experiment("tiny")
  assert cluster.on(tiny, 8).data.microbatch == 8 and cluster.on(tiny, 8).runtime.mesh.data == 8
  assert not cluster.notes(cfg, more)
  # 5 data-parallel parts: 320 sequences a micro-batch; the ramp begins with 10 of them, not 9.6.
  odd = cluster.on(cfg, 5120)
  assert (odd.data.microbatch, odd.data.batch_start) == (320, 3200)
  assert "begin at 3200 sequences, not at 3072" in " ".join(cluster.notes(cfg, odd))
  # A device keeps its 8 sequences, whatever the ramp; where the batch does not allow, the most.
  wide = config.replace(cfg, **{"data.microbatch": 512})
  assert cluster.on(wide, 5120).data == dataclasses.replace(
      wide.data, microbatch=2560, batch_start=5120)
  fewer = cluster.on(config.replace(cfg, **{"data.microbatch": 1024}), 2048)
  assert fewer.data.microbatch == 15 * 128
  assert "15 sequence(s) of a micro-batch on a device, not 16" in cluster.notes(
      config.replace(cfg, **{"data.microbatch": 1024}), fewer)[0]
  for devices, message in ((1000, "no multiple of the 1024"), (0, "no multiple")):
    with pytest.raises(ConfigError, match=message):
      cluster.on(cfg, devices)
  with pytest.raises(ConfigError, match="batch_size=8"):
    cluster.on(tiny, 16)


@pytest.mark.parametrize("file", sorted(
    p.stem for p in EXPERIMENTS.glob("*.py") if not p.stem.startswith(("ablate", "_"))))
def test_every_experiment_has_a_cost(file):
  """Law: a positive step whose useful FLOPs do not exceed the peak, on each of the devices."""
  cfg = experiment(file)
  for name, hw in HARDWARE.items():
    found = estimate(cfg, hw)
    assert found.step > 0 and 0 < found.mfu(mtp=True) < 1, name
