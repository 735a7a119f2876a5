"""Configuration: round trips, and every mistake named before an array exists."""

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax import config as config_lib
from dsv3_jax.config import Config, ConfigError, from_dict, from_json, replace, to_dict, to_json


@st.composite
def configs(draw) -> Config:
  """Valid configurations, drawn so that no combination is impossible."""
  groups = draw(st.sampled_from([1, 2, 4, 8]))
  per_group = draw(st.integers(2, 8))
  active_groups = draw(st.integers(1, groups))
  layers = draw(st.integers(1, 64))
  micro = draw(st.integers(1, 8))
  share = sorted(draw(st.lists(st.floats(0, 1), min_size=3, max_size=3)))
  sources = draw(st.lists(st.text(max_size=12), min_size=1, max_size=3))
  return Config(
      model=config_lib.Model(
          layers=layers, dense_layers=draw(st.integers(0, layers)),
          mtp_depth=draw(st.integers(0, 3)),
          attention=config_lib.Attention(q_rank=draw(st.integers(0, 64))),
          moe=config_lib.MoE(
              experts=groups * per_group, groups=groups, active_groups=active_groups,
              active=draw(st.integers(1, active_groups * per_group)),
              gate=draw(st.sampled_from(["sigmoid", "softmax"])))),
      optim=config_lib.Optim(lr=draw(st.floats(0, 1)), lr_constant_until=share[0],
                             lr_cosine_until=share[1], lr_last_from=share[2],
                             decay_vectors=draw(st.booleans())),
      data=config_lib.Data(
          sources=tuple(sources), microbatch=micro, batch_size=micro * draw(st.integers(1, 9)),
          weights=tuple(draw(st.floats(1e-3, 10)) for _ in sources)
          if draw(st.booleans()) else ()))


@settings(max_examples=80, deadline=None)
@given(configs())
def test_round_trips(config):
  """Law: from_dict(to_dict(c)) == c == from_json(to_json(c)), hash and text included."""
  assert from_dict(to_dict(config)) == config
  again = from_json(to_json(config))
  assert again == config
  assert hash(again) == hash(config)
  assert to_json(again) == to_json(config)


def test_every_leaf_survives_json():
  """Oracle: the standard library's json, leaf by leaf, tuples as lists."""
  config = replace(Config(), **{"data.sources": ("a", "b"), "data.weights": (1, 2.5)})
  plain = json.loads(to_json(config))
  assert plain["data"]["weights"] == [1.0, 2.5]
  assert from_dict(plain).data.sources == ("a", "b")


@pytest.mark.parametrize("path", config_lib._leaves(Config))
def test_misspelt_leaf_names_the_nearest(path):
  """Oracle: the key itself, with a letter doubled or a short name suffixed, is proposed back."""
  *sections, name = path.split(".")
  wrong = path + name[-1]
  with pytest.raises(ConfigError) as error:
    config_lib.field_type(wrong)
  assert repr(wrong) in str(error.value)
  assert f"did you mean {path!r}" in str(error.value)
  values: dict = {name + name[-1]: 1}
  for part in reversed(sections):
    values = {part: values}
  with pytest.raises(ConfigError) as error:
    from_dict(values)
  assert f"did you mean {path!r}" in str(error.value)


@pytest.mark.parametrize("path", ["optim.lr", "model.moe.experts", "model.attention.yarn.factor"])
def test_misspelt_section_keeps_the_rest(path):
  """Oracle: the whole key is proposed back, not its section alone."""
  section, _, rest = path.partition(".")
  with pytest.raises(ConfigError, match=f"did you mean {path!r}"):
    config_lib.field_type(f"{section[:-2]}{section[-1]}.{rest}")


@pytest.mark.parametrize("wrong, near", [
    ("lr", "'optim.lr'"), ("model.experts", "'model.moe.experts'"), ("modle.dim", "'model.dim'"),
    ("model.attention.yarn.facter", "'model.attention.yarn.factor'"),
    ("optim.zzz", "valid keys of optim: lr,"), ("model.dim.x", "'model.dim' is a value")])
def test_misplaced_key_names_where_it_belongs(wrong, near):
  """Oracle: the section that has a key of that name."""
  with pytest.raises(ConfigError) as error:
    config_lib.field_type(wrong)
  assert near in str(error.value)


@pytest.mark.parametrize("values, key", [
    ({"optim": {"lr": "3e-4"}}, "optim.lr"), ({"optim": {"lr": True}}, "optim.lr"),
    ({"optim": {"lr": None}}, "optim.lr"), ({"optim": {"lr": float("nan")}}, "optim.lr"),
    ({"model": {"dim": 2.5}}, "model.dim"), ({"model": {"dim": True}}, "model.dim"),
    ({"model": {"moe": {"normalize": 1}}}, "model.moe.normalize"),
    ({"model": {"moe": 3}}, "model.moe"), ({"data": {"sources": "stdlib"}}, "data.sources"),
    ({"data": {"sources": [1]}}, "data.sources[0]"), ({"train": []}, "train"),
    ({"data": {"weights": ["a"]}}, "data.weights[0]")])
def test_wrong_type_names_key_and_value(values, key):
  """Oracle: the dotted key is in the message."""
  with pytest.raises(ConfigError) as error:
    from_dict(values)
  assert str(error.value).startswith(key)


def test_numbers_convert_only_without_loss():
  """Law: an integer is a float, a whole float is an integer, nothing else converts."""
  assert from_dict({"train": {"tokens": 10}}).train.tokens == 10.0
  assert isinstance(from_dict({"train": {"tokens": 10}}).train.tokens, float)
  assert from_dict({"model": {"dim": 128.0}}).model.dim == 128
  assert isinstance(from_dict({"model": {"dim": 128.0}}).model.dim, int)


# (changes, what the message must name)
IMPOSSIBLE = [
    ({"model.attention.yarn.factor": 0.5}, ["model.attention.yarn.factor=0.5", "at least 1"]),
    ({"model.attention.yarn.original_length": 0}, ["yarn.original_length=0", "positive"]),
    ({"model.attention.yarn.mscale_all_dim": -1.0}, ["yarn.mscale_all_dim=-1.0", "negative"]),
    ({"model.attention.yarn.factor": 2.0, "model.attention.rope_theta": 1.0},
     ["model.attention.rope_theta=1.0", "must exceed 1"]),
    ({"model.attention.rope_dim": 15}, ["model.attention.rope_dim=15", "even"]),
    ({"model.attention.heads": 0}, ["model.attention.heads=0", "positive"]),
    ({"model.attention.q_rank": -1}, ["model.attention.q_rank=-1", "negative"]),
    ({"model.moe.experts": 15}, ["model.moe.groups=4", "model.moe.experts=15"]),
    ({"model.moe.active_groups": 5}, ["model.moe.active_groups=5", "model.moe.groups=4"]),
    ({"model.moe.active": 9}, ["model.moe.active=9", "lower it to 8"]),
    ({"model.moe.group_top": 5}, ["model.moe.group_top=5", "4 experts"]),
    ({"model.moe.gate": "sigmod"}, ["model.moe.gate='sigmod'", "did you mean 'sigmoid'"]),
    ({"model.dense_layers": 5}, ["model.dense_layers=5", "model.layers=4"]),
    ({"model.mtp_depth": -1}, ["model.mtp_depth=-1"]),
    ({"model.mtp_input": "norm"}, ["model.mtp_input='norm'", "normed"]),
    ({"runtime.compute_dtype": "bfloat61"}, ["runtime.compute_dtype", "did you mean 'bfloat16'"]),
    ({"runtime.mesh.data": 0}, ["runtime.mesh.data=0"]),
    ({"runtime.mesh.data": 3}, ["runtime.mesh.data=3", "8 sequences"]),
    ({"runtime.mesh.context": 3}, ["runtime.mesh.context=3", "6 must divide",
                                   "data.sequence_length=256"]),
    ({"runtime.mesh.context": 2, "runtime.mesh.pipe": 2}, ["context=2", "runtime.mesh.pipe=1"]),
    ({"runtime.mesh.context": 2, "runtime.recipe": "per_tensor_delayed"},
     ["context=2", "runtime.recipe='per_tensor_delayed'", "another"]),
    ({"runtime.mesh.context": 2, "runtime.attention": "cudnn"}, ["attention='auto'", "'cudnn'"]),
    ({"runtime.mesh.context": 2, "model.attention.kind": "gqa"}, ["context=2", "kind='gqa'"]),
    ({"runtime.head_chunk": 0}, ["runtime.head_chunk=0"]),
    ({"optim.lr_constant_until": 0.99}, ["lr_constant_until=0.99", "must not decrease"]),
    ({"optim.lr_last_from": 1.5}, ["optim.lr_last_from=1.5", "between 0 and 1"]),
    ({"optim.beta2": 1.0}, ["optim.beta2=1.0", "[0, 1)"]),
    ({"optim.nu_dtype": "float16"}, ["optim.nu_dtype='float16'", "bfloat16"]),
    ({"loss.bias_speed": -0.1}, ["loss.bias_speed=-0.1"]),
    ({"data.sources": ()}, ["data.sources", "at least one"]),
    ({"data.weights": (1.0, 2.0)}, ["data.weights", "1 data.sources"]),
    ({"data.weights": (0.0,)}, ["data.weights", "positive"]),
    ({"data.sequence_length": 4}, ["data.sequence_length=4", "at least 8"]),
    ({"data.microbatch": 3}, ["data.batch_size=8", "data.microbatch=3"]),
    ({"data.batch_start": 16}, ["data.batch_start=16", "data.batch_size=8"]),
    ({"data.fim_rate": 1.1}, ["data.fim_rate=1.1"]),
    ({"train.tokens": 0}, ["train.tokens=0"]),
    ({"train.seed": -1}, ["train.seed=-1"]),
    ({"model.mtp_depth": 7, "data.sequence_length": 8},
     ["data.sequence_length=8", "model.mtp_depth=7", "at least 9"]),
    ({"model.attention.yarn.factor": 2.0, "model.attention.yarn.original_length": 64},
     ["data.sequence_length=256", "128 positions"]),
]


@pytest.mark.parametrize("changes, named", IMPOSSIBLE,
                         ids=[",".join(changes) for changes, _ in IMPOSSIBLE])
def test_impossible_combination_names_key_and_fix(changes, named):
  """Oracle: the words that a reader needs to mend it."""
  with pytest.raises(ConfigError) as error:
    replace(Config(), **changes)
  for words in named:
    assert words in str(error.value)


def test_changes_are_judged_together():
  """Law: two changes that are only valid together are accepted in either order."""
  for order in (1, -1):
    changes = dict([("model.moe.experts", 6), ("model.moe.groups", 3)][::order])
    changes["model.moe.active_groups"] = 3
    assert replace(Config(), **changes).model.moe.groups == 3


def test_configs_are_frozen_and_hashable():
  """Law: a config can be a static argument of jit, and nothing changes it."""
  assert hash(Config()) == hash(Config())
  with pytest.raises(dataclasses.FrozenInstanceError):
    Config().model.dim = 3


def test_presets():
  """Oracle: the report's size table (facts 1.1) and the balancing paper's test beds."""
  v3 = config_lib.preset("v3_671b")
  assert (v3.layers, v3.dim, v3.dense_layers, v3.vocab_size) == (61, 7168, 3, 129280)
  assert (v3.attention.heads, v3.attention.q_rank, v3.attention.kv_rank) == (128, 1536, 512)
  assert (v3.moe.experts, v3.moe.active, v3.moe.groups, v3.moe.active_groups) == (256, 8, 8, 4)
  assert v3.init_std == 0.006
  with pytest.raises(ConfigError, match="did you mean 'moe_16b'"):
    config_lib.preset("moe_16")


def test_imports_the_standard_library_only():
  """Oracle: the modules that a fresh interpreter holds after the import."""
  code = ("import sys; import dsv3_jax.config; "
          "sys.exit(bool({'jax', 'numpy', 'flax', 'ml_collections'} & set(sys.modules)))")
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
