"""Experiment files: each imported, its sweep expanded, every config built and shape-checked."""

import dataclasses
import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import cli, config, counts
from dsv3_jax.cli import configs
from dsv3_jax.config import ConfigError
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import rope
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.sweep import arm as arm_lib
from dsv3_jax.train import schedules
from experiments import extend_tiny

FOLDER = Path(__file__).parents[1] / "experiments"
FILES = sorted(path.stem for path in FOLDER.glob("*.py"))
ABLATIONS = [name for name in FILES if name.startswith("ablate_")]
SCALES = ("cpu", "gpu", "real")


def spec(name, arg=None):
  return f"{FOLDER / name}.py" + (f":{arg}" if arg else "")


@functools.cache
def shapes(model):
  """Shapes of a model's variables; nothing is allocated."""
  return nnx.eval_shape(lambda: Transformer(model, rngs=nnx.Rngs(0)))


@functools.cache
def traced(model, runtime, loss, length):
  """Shape of the loss of one sequence."""
  graphdef, params, buffers = nnx.split(shapes(model), nnx.Param, ...)
  batch = {"tokens": jax.ShapeDtypeStruct((1, length + 1), jnp.int32)}
  return jax.eval_shape(lambda p, b, batch: loss_lib.loss_fn(
      nnx.merge(graphdef, p, b), batch, loss=loss, mtp_weight=0.3, runtime=runtime,
      denominator=1.0)[0], params, buffers, batch)


def check(cfg):
  """Oracle: the closed forms of dsv3_jax/counts.py."""
  held = sum(x.size for x in jax.tree.leaves(nnx.state(shapes(cfg.model))))
  assert held == sum(counts.parameters(cfg.model).values())


@pytest.mark.parametrize("name", FILES)
def test_builds(name):
  """Law: the file's own config is valid, survives JSON, and its model has the counted size."""
  cfg = cli.load_config(spec(name))
  assert config.from_json(config.to_json(cfg)) == cfg
  check(cfg)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ABLATIONS)
def test_sweep(name, scale):
  """Law: three seeds of every arm, each a config of its own, the first one the parent's."""
  sweep = configs.load_sweep(spec(name, scale))
  names = list(dict.fromkeys(arm.name for arm in sweep.arms))
  assert len(names) >= 3
  assert sorted((a.name, a.seed) for a in sweep.arms) == sorted((n, s) for n in names
                                                               for s in range(3))
  for arm in sweep.arms:
    check(arm.config)
    assert config.fingerprint(arm.config) == arm.id
  # A wrong combination shows itself when the loss is traced; layers in a loop trace once.
  for arm in sweep.arms[:len(names)]:
    runtime = config.replace(arm.config.runtime, layer_unroll=1)
    if scale == "cpu":
      assert traced(arm.config.model, runtime, arm.config.loss, 32).shape == ()


@pytest.mark.parametrize("name", ABLATIONS)
def test_docstring(name):
  """Law: beside what every experiment says, an ablation names its parent and its result's place."""
  text = configs.load_sweep(spec(name)).text
  assert "\nParent:" in text and "\nResult:   experiments/RESULTS.md" in text


def test_equal_sizes():
  """Law: arms that claim equal parameters have them, to a few percent of what they vary."""
  for name, without in (("ablate_attention", "mqa, as many heads"), ("ablate_experts", "dense")):
    for scale in SCALES:
      sweep = configs.load_sweep(spec(name, scale))
      sizes = {a.name: counts.parameters(a.config.model)["main"] for a in sweep.arms
               if a.name != without}
      base = sizes[sweep.baseline]
      for arm, size in sizes.items():
        assert abs(size / base - 1) < 0.02, (name, scale, arm)


def write(tmp_path, body):
  path = tmp_path / "x.py"
  path.write_text("from dsv3_jax.config import Config\n"
                  "def get_config(arg=None):\n  return Config()\n" + body)
  return str(path)


@pytest.mark.parametrize("body, words", [
    ("", "defines no function sweep"),
    ("def sweep(arg=None):\n  return []\n", "yields no arms"),
    ("def sweep(arg=None):\n  yield {'optim.lrr': 1}\n", "arm 'lrr=1'.*optim.lr"),
    ("def sweep(arg=None):\n  yield {}\n  yield {'optim.lr': 2.2e-4}\n", "have one config"),
    ("def sweep(arg=None):\n  yield {'arm': 'a'}\n  yield {'arm': 'a', 'optim.lr': 1.0}\n",
     "two configs are called 'a'"),
    ("def sweep(arg=None):\n  yield 3\n", "dictionaries"),
])
def test_errors(tmp_path, body, words):
  """Law: a sweep that cannot be run says which arm and why."""
  with pytest.raises(ConfigError, match=words):
    configs.load_sweep(write(tmp_path, body))


def test_seeds_are_an_axis(tmp_path):
  """Printed example: names without seeds, sections as values, overrides under the arm's own."""
  path = write(tmp_path, "from dsv3_jax.sweep import arm\nfrom dsv3_jax import config\n"
               "def sweep(arg=None):\n  return arm.seeds({'a': {}, 'b': {'model.moe': "
               "config.MoE(experts=8), 'optim.lr': 3.0}}, (4, 7))\n")
  arms = configs.load_sweep(path, [("optim.lr", "2"), ("data.batch_size", "4")]).arms
  assert [(a.name, a.seed, a.config.optim.lr, a.config.model.moe.experts) for a in arms] == [
      ("a", 4, 2.0, 16), ("b", 4, 3.0, 8), ("a", 7, 2.0, 16), ("b", 7, 3.0, 8)]
  assert all(a.config.data.batch_size == 4 for a in arms)
  assert arm_lib.label({"optim.lr": 3.0, "train.seed": 1}) == "lr=3.0"


def test_extension():
  """Oracle: the report (4.3): 8 and 32 times the length, equal tokens, a batch that shrinks
  as the length grows, one rate, YaRN in both phases and not before; shares of its pairs."""
  load = lambda arg: [s[2] for s in configs.load_stages(spec("extend_tiny", arg), (), Path("x"))]
  first, one, two = load(None)
  T = first.data.sequence_length
  assert [c.data.sequence_length for c in (one, two)] == [8 * T, 32 * T]
  assert one.data.batch_size == 4 * two.data.batch_size and one.train.tokens == two.train.tokens
  assert one.optim.lr == two.optim.lr and one.optim.lr_constant_until == 1
  yarn = one.model.attention.yarn
  assert first.model.attention.yarn == config.Yarn() and two.model.attention.yarn == yarn
  assert (yarn.factor, yarn.beta_slow, yarn.original_length) == (40, 1, T)
  ours, theirs = (rope.inverse_frequencies(c) / rope.inverse_frequencies(
      dataclasses.replace(c, yarn=config.Yarn())) for c in (one.model.attention, config.Attention(
          rope_dim=64, yarn=config.Yarn(factor=40))))
  for scale in (1, 1 / 40):  # left alone, and slowed in full
    share, other = (np.isclose(x, scale).mean() for x in (ours, theirs))
    assert abs(share - other) < 0.1
  plain, bare = load("no_yarn"), load("untrained")
  assert all(c.model.attention.yarn.factor == 1 for c in plain)
  assert [c.data for c in plain] == [c.data for c in (first, one, two)]
  assert len(bare) == 2 and bare[1].optim.lr == 0 and bare[1].model == two.model
  with pytest.raises(ConfigError, match="no_yarn or untrained"):
    load("other")
  texts = list(itertools.islice(extend_tiny.documents("0"), 50))
  for text in texts:  # what was told is asked for once, with its value
    facts = [line for line in text.splitlines() if len(line.split()) == 2]
    assert facts and all(facts.count(f) == 2 for f in facts)
    assert len({f.split()[0] for f in facts}) == len(set(facts))


def test_stages_of_the_report():
  """Oracle: the report: 4.3's two phases, 5.1's fine-tuning, about 62.9B tokens a phase."""
  found = configs.load_stages(spec("v3_671b_stages"), (), Path("x"))
  first, one, two, tuned = (stage[2] for stage in found)
  assert first == cli.load_config(spec("v3_671b"))
  shape = lambda c: (c.data.sequence_length, c.data.batch_size, c.data.batch_start)
  assert [shape(c) for c in (one, two)] == [(32768, 1920, 0), (131072, 480, 0)]
  rate = lambda c, at: schedules.learning_rate(c.optim, c.train.tokens)(at * c.train.tokens, 10**6)
  for c in (one, two):
    assert c.train.tokens == 1000 * 32768 * 1920
    assert [rate(c, x) for x in (0.0, 0.5, 1.0)] == [pytest.approx(7.3e-6)] * 3
  assert [rate(tuned, x) for x in (0.0, 0.5)] == [pytest.approx(x) for x in (5e-6, 3e-6)]
  assert rate(tuned, 1.0) == pytest.approx(1e-6) and tuned.sft.epochs == 2 and tuned.data.isolate
  assert {c.model.attention.yarn for c in (one, two, tuned)} == {config.Yarn(factor=40)}
  assert [c.train.init for c in (one, two, tuned)] == [stage[1] for stage in found[:3]]
