"""`dsv3 convert` and `dsv3 tokenize`, on files that they really find."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax import cli
from dsv3_jax import config as config_lib
from dsv3_jax.data import shards
from dsv3_jax.interop import huggingface
from dsv3_jax.train import checkpoint, optim, state

SMALL = config_lib.replace(config_lib.Config(), **{
    "model.vocab_size": 300, "model.dim": 16, "model.layers": 2, "model.dense_ffn_dim": 16,
    "model.attention.heads": 2, "model.attention.q_rank": 8, "model.attention.kv_rank": 8,
    "model.attention.nope_dim": 4, "model.attention.rope_dim": 4, "model.attention.v_dim": 4,
    "model.moe.ffn_dim": 8})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A workdir with two checkpoints of SMALL, the second with all parameters doubled."""
  folder = tmp_path_factory.mktemp("run")
  _, abstract, _ = state.initializer(lambda: state.build_model(SMALL.model, seed=3),
                                     optim.make_optimizer(SMALL.optim))
  rng = np.random.default_rng(0)  # compiling the initializer would take longer than the tests
  first = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract)
  saver = checkpoint.Checkpoints(str(folder))
  for step, scale in ((1, 1.0), (2, 2.0)):
    params = jax.tree.map(lambda x, scale=scale: x * scale, first.params)
    saver.save(state.TrainState(params, first.buffers, first.opt_state, first.step,
                                first.bad_steps, first.skipped),
               {"step": step, "tokens": 10 * step, "val_loss": None,
                "config": config_lib.to_dict(SMALL)})
  saver.close()
  return folder, first.params


def _params(model):
  return state.split(model)[1]


@pytest.mark.parametrize("words, scale", [([], 2.0), (["--step=1"], 1.0)])
def test_a_run_becomes_a_hugging_face_folder(workdir, tmp_path, words, scale, capsys):
  """Oracle: the parameters that were saved, bit for bit, read back from the folder."""
  folder, params = workdir
  assert cli.run(["convert", str(folder), str(tmp_path / "out"), *words]) == 0
  assert capsys.readouterr().out.strip() == str(tmp_path / "out")
  loaded = _params(huggingface.load(tmp_path / "out"))
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b * scale), loaded, params)


def test_a_folder_is_rewritten_in_another_dtype(workdir, tmp_path):
  """Oracle: the config's dtype, and values rounded to bf16 once."""
  folder, params = workdir
  full, half = str(tmp_path / "full"), str(tmp_path / "half")
  assert cli.run(["convert", str(folder), full, "--step=1"]) == 0
  assert cli.run(["convert", full, half, "--to=hf", "--dtype=bfloat16"]) == 0
  values = json.loads((tmp_path / "half" / "config.json").read_text())
  assert "bfloat16" in (values.get("dtype"), values.get("torch_dtype"))
  rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), params)
  chex.assert_trees_all_equal(_params(huggingface.load(half)), rounded)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rewritten_folder_keeps_dtype_and_token_ids(workdir, tmp_path, dtype):
  """Oracle: the files of the source, byte for byte, and its config.json."""
  source, again = tmp_path / "source", tmp_path / "again"
  assert cli.run(["convert", str(workdir[0]), str(source), f"--dtype={dtype}"]) == 0
  values = json.loads((source / "config.json").read_text())
  values |= {"bos_token_id": 3, "eos_token_id": [4, 5]}
  (source / "config.json").write_text(json.dumps(values))
  assert cli.run(["convert", str(source), str(again), "--to=hf"]) == 0
  assert json.loads((again / "config.json").read_text()) == values
  name = "model.safetensors"
  assert (again / name).read_bytes() == (source / name).read_bytes()


def test_a_folder_becomes_a_workdir_and_a_folder_again(workdir, tmp_path):
  """Law: there and back changes no bit; the rest of the config is the experiment's."""
  folder, params = workdir
  hf, run, again = (str(tmp_path / name) for name in ("hf", "run", "again"))
  (tmp_path / "experiment.py").write_text(
      "from dsv3_jax.config import Config, Optim\n"
      "def get_config(arg=None):\n  return Config(optim=Optim(lr=0.125))\n")
  assert cli.run(["convert", str(folder), hf, "--step=1"]) == 0
  assert cli.run(["convert", hf, run, f"--config={tmp_path / 'experiment.py'}"]) == 0
  assert cli.run(["convert", run, again]) == 0
  chex.assert_trees_all_equal(_params(huggingface.load(again)), params)
  config = cli.load_config(f"{run}/config.json")
  assert config.optim.lr == 0.125
  assert config.model.attention == SMALL.model.attention
  assert checkpoint.load_params(run)[2]["step"] == 0


def test_fp8_there_and_on_and_back(workdir, tmp_path):
  """Oracle: `save` of the same parameters; converting again changes no byte; back gives `load`."""
  folder, _ = workdir
  plain, one, two, back = (str(tmp_path / name) for name in ("plain", "one", "two", "back"))
  assert cli.run(["convert", str(folder), one, "--step=1", "--quantization=fp8"]) == 0
  assert cli.run(["convert", str(folder), plain, "--step=1"]) == 0
  huggingface.save(huggingface.load(plain), tmp_path / "expected", quantization="fp8")
  assert cli.run(["convert", one, two, "--to=hf", "--quantization=fp8"]) == 0
  files = [tmp_path / name / "model.safetensors" for name in ("expected", "one", "two")]
  assert len({file.read_bytes() for file in files}) == 1
  configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
  assert configs[0] == configs[1] and "quantization_config" in configs[0]
  assert cli.run(["convert", one, back, "--to=hf", "--dtype=float32"]) == 0
  chex.assert_trees_all_equal(_params(huggingface.load(back)),
               _params(huggingface.load(one)))


@pytest.mark.parametrize("words, named", [
    (["HF", "OUT", "--quantization=fp8"], "runtime.recipe"),
    (["RUN", "OUT", "--to=workdir"], "a workdir already"),
    (["RUN", "OUT", "--config=x.py"], "--config goes with --to=workdir"),
    (["HF", "OUT", "--step=1"], "--step and --ema choose a checkpoint"),
    (["HF", "OUT", "--dtype=bfloat16"], "float32"), (["HF", "HF"], "exists already"),
    (["HF", "HF", "--to=hf"], "exists already"), (["RUN", "HF"], "exists already")])
def test_impossible_conversions_are_refused(workdir, tmp_path, words, named, capsys):
  """Oracle: exit code 2, the reason, and nothing written."""
  hf = tmp_path / "hf"
  assert cli.run(["convert", str(workdir[0]), str(hf)]) == 0
  before = sorted(hf.iterdir())
  paths = {"RUN": str(workdir[0]), "HF": str(hf), "OUT": str(tmp_path / "out")}
  assert cli.run(["convert", *(paths.get(word, word) for word in words)]) == 2
  assert named in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
  assert sorted(hf.iterdir()) == before


@pytest.mark.parametrize("words, named", [
    (["--step=7"], "steps there: 1, 2"), (["--ema"], "holds no EMA")])
def test_missing_checkpoints_are_named(workdir, tmp_path, words, named, capsys):
  """Oracle: the steps that are there, and no folder left behind."""
  assert cli.run(["convert", str(workdir[0]), str(tmp_path / "out"), *words]) in (1, 2)
  assert named in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_tokenize_makes_shards_that_decode_to_the_text(tmp_path, capsys):
  """Oracle: the text itself."""
  texts = [f"line {i} of a text\n" * 200 for i in range(3)]
  for i, text in enumerate(texts):
    (tmp_path / f"{i}.txt").write_text(text)
  (tmp_path / "empty.txt").touch()
  (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
  out = str(tmp_path / "corpus")
  words = ["tokenize", f"--out={out}", "--vocab-size=300", str(tmp_path / "*.txt")]
  assert cli.run(words) == 0
  made = shards.Shards(out)
  tokenizer = made.tokenizer()
  assert sorted(tokenizer.decode(made.tokens(i)) for i in range(len(made))) == sorted(texts)
  total = sum(len(made.tokens(i)) for i in range(len(made)))
  stdout = capsys.readouterr().out
  assert f"3 documents, {total:,} tokens" in stdout
  assert "left out: 1 badly encoded, 1 empty" in stdout
  assert f"shards:{out}" in stdout


def test_tokenize_refuses_an_occupied_folder(tmp_path, capsys):
  """Oracle: exit code 2 and the folder's name; what is in it stays."""
  (tmp_path / "a.txt").write_text("text " * 1000)
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("x")
  assert cli.run(["tokenize", f"--out={tmp_path / 'out'}", "--vocab-size=300",
                  str(tmp_path / "a.txt")]) == 2
  assert str(tmp_path / "out") in capsys.readouterr().err
  assert (tmp_path / "out" / "mine").read_text() == "x"
