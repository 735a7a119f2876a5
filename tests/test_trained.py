"""How weights are taken from a run or a folder: in FP8 or plain."""

import functools
import json

import jax
import numpy as np
import pytest

from dsv3_jax import cli, trained
from dsv3_jax.config import ConfigError
from dsv3_jax.fp8.weights import Weight
from tests import quick, saved_run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
  """A run, and the FP8 folder that `dsv3 convert` makes of it; compiled without optimisation."""
  run, exported = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("hf") / "fp8"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=quick.options()))
    saved_run.make(run)
    assert cli.run(["convert", str(run), str(exported), "--quantization=fp8"]) == 0
    yield run, exported


@pytest.fixture(scope="module")
def kept(folders):
  """The folder in FP8, and what was said."""
  said = []
  return trained.load(folders[1], weights="fp8", say=said.append), said


def matrices(loaded):
  """Names and bytes of the FP8 weights; fp32 numbers of the others."""
  is_weight = lambda x: isinstance(x, Weight)
  found = {}
  for path, x in jax.tree_util.tree_leaves_with_path(loaded.generator.weights, is_leaf=is_weight):
    held = [np.asarray(y).tobytes() for y in jax.tree.leaves(x)] if is_weight(x) else None
    found[jax.tree_util.keystr(path)] = held or np.asarray(x, np.float32)
  return found


def test_fp8(folders, kept):
  """Oracle: the folder's weights; those of the run, quantized at loading, have the same bytes."""
  kept, said = kept
  run = trained.load(folders[0], weights="fp8", say=said.append)
  a, b = matrices(run), matrices(kept)
  assert a.keys() == b.keys()
  fp8 = [name for name, x in b.items() if isinstance(x, list)]
  assert len(fp8) == 3 * 5 + 2 + 2 * 4  # MLA, dense FFN, experts and the shared one (and MTP's)
  assert all(a[name] == b[name] for name in fp8)
  assert run.generator.runtime == kept.generator.runtime
  assert run.generator.runtime.recipe == "v3"
  assert len(said) == 2 and all("emulated" in line and "--weights=plain" in line for line in said)


def test_auto_is_plain_where_fp8_would_be_emulated(folders, kept):
  """Oracle: code times scale of the FP8 weights; a line says what was done."""
  said = []
  auto = trained.load(folders[1], say=said.append).generator
  line, = said
  assert "dequantized to float32" in line and "--weights=fp8" in line
  assert auto.runtime.recipe == "none"
  held, w = (g.weights.layers[0].attn.w_o_HUD for g in (kept[0].generator, auto))
  np.testing.assert_array_equal(w, held.fprop.typed().dequantize().reshape(w.shape))


def test_errors(folders, tmp_path, capsys):
  """Law: what cannot be kept is refused with what can be done, and so is an unknown choice."""
  odd = tmp_path / "odd"
  odd.mkdir()
  for file in folders[1].iterdir():
    (odd / file.name).symlink_to(file)
  values = json.loads((odd / "config.json").read_text()) | {"rope_interleave": False}
  (odd / "config.json").unlink()
  (odd / "config.json").write_text(json.dumps(values))
  assert cli.run(["generate", str(odd), "--prompt=a", "--weights=fp8"]) == 2
  assert "rope_interleave=false" in (said := capsys.readouterr().err) and "--weights=plain" in said
  with pytest.raises(ConfigError, match="weights='int8' must be one of auto, fp8, plain"):
    trained.load(odd, weights="int8")
