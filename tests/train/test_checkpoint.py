"""Checkpoints: exact, whole or refused, independent of the mesh."""

import concurrent.futures
import json
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax import config
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.train import checkpoint, optim, state


def _state(seed: int = 0, size: int = 32, where=None) -> state.TrainState:
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {"head_DV": draw(size, 8), "moe": {"attn": {"w_o_HUD": draw(2, 4, 8)}}}
  optimizer = optim.make_optimizer(config.Optim(nu_dtype="bfloat16"))
  made = state.make_state(params, {"moe": {"ffn": {"bias_E": draw(2, 4)}}}, optimizer)
  filled = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 9, x.dtype), made)
  return jax.device_put(filled, where or jax.devices()[0])


def _meta(step: int, **more) -> dict:
  return {"step": step, "val_loss": None, "iterator": {"step": step}} | more


def _abstract(like, where=None):
  where = where or jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like)


def _assert_equal(a, b) -> None:
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def _saved(folder, steps=(10, 20), **options) -> checkpoint.Checkpoints:
  store = checkpoint.Checkpoints(str(folder), **({"keep_last": 9} | options))
  for step in steps:
    store.save(_state(step), _meta(step))
  store.wait()
  return store


def test_round_trip(tmp_path):
  """Oracle: the arrays as they were saved, bit for bit, though the originals were donated."""
  store = checkpoint.Checkpoints(str(tmp_path))
  scramble = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
  scramble(_state(2, size=2**17))  # compiled: nothing delays the donation below
  saved = _state(1, size=2**17)
  expected = jax.device_get(_state(1, size=2**17))  # a view of `saved` would prevent its donation
  ema = concurrent.futures.Future()
  average = jax.tree.map(lambda x: np.float32(x) / 3, expected.params)
  ema.set_result((average, 7))
  store.save(saved, _meta(30, extra="text", tokens=10**15), ema)
  jax.block_until_ready(scramble(saved))
  assert saved.params["head_DV"].is_deleted()
  store.wait()
  restored = checkpoint.Checkpoints(str(tmp_path)).restore(_abstract(expected))
  _assert_equal(restored.state, jax.tree.map(jnp.asarray, expected))
  _assert_equal(restored.ema, average)
  meta = restored.meta
  assert (meta["step"], meta["tokens"], meta["extra"], meta["ema_updates"]) == (
      30, 10**15, "text", 7)
  params, buffers, meta = checkpoint.load_params(str(tmp_path))
  _assert_equal((params, buffers),
                jax.tree.map(jnp.asarray, (expected.params, expected.buffers)))
  _assert_equal(checkpoint.load_params(str(tmp_path), 30, ema=True)[0],
                jax.tree.map(jnp.asarray, average))


def test_a_model_without_experts(tmp_path):
  """Oracle: the arrays as they were saved, of a state that has no router biases."""
  params = {"head_DV": jnp.ones((8, 4))}
  saved = state.make_state(params, {}, optim.make_optimizer(config.Optim()))
  store = checkpoint.Checkpoints(str(tmp_path))
  store.save(saved, _meta(3))
  store.wait()
  _assert_equal(store.restore(_abstract(saved)).state, saved)
  assert checkpoint.load_params(str(tmp_path))[1] == {}


def test_another_mesh(tmp_path):
  """Law: written from 8 devices with a sharded array, read on 1 and on 4, the same bits."""
  mesh = mesh_lib.make_mesh(config.Mesh(data=8))
  cut = lambda x: NamedSharding(mesh, PartitionSpec("data") if x.shape[:1] == (32,)
                                else PartitionSpec())
  plain = _state(3)
  sharded = jax.device_put(plain, jax.tree.map(cut, plain))
  assert len(sharded.params["head_DV"].sharding.device_set) == 8
  store = checkpoint.Checkpoints(str(tmp_path))
  store.save(sharded, _meta(1))
  store.wait()
  _assert_equal(store.restore(_abstract(plain)).state, plain)
  four = NamedSharding(mesh_lib.make_mesh(config.Mesh(data=4)), PartitionSpec())
  restored = store.restore(_abstract(plain, four)).state
  assert len(restored.params["head_DV"].sharding.device_set) == 4
  _assert_equal(restored, plain)


def _largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def _truncate(folder):
  path = _largest(folder / "arrays")
  path.write_bytes(path.read_bytes()[:-100])


def _flip(folder):
  path = _largest(folder / "arrays")
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def _delete(folder):
  _largest(folder / "arrays").unlink()


def _no_sidecar(folder):
  (folder / "checkpoint.json").unlink()


def _half_sidecar(folder):
  path = folder / "checkpoint.json"
  path.write_text(path.read_text()[:40])


def _no_arrays(folder):
  shutil.rmtree(folder / "arrays")


@pytest.mark.parametrize("damage", [_truncate, _flip, _delete, _no_sidecar, _half_sidecar,
                                    _no_arrays])
def test_a_damaged_last_checkpoint(tmp_path, damage):
  """Oracle: the previous checkpoint's bits, and exactly one warning that names both."""
  _saved(tmp_path)
  damage(tmp_path / "checkpoints" / "00000020")
  store = checkpoint.Checkpoints(str(tmp_path))
  with pytest.warns(UserWarning) as caught:
    restored = store.restore(_abstract(_state()))
  assert len(caught) == 1
  message = str(caught[0].message)
  assert "step 20" in message and "damaged" in message and "using step 10" in message
  _assert_equal(restored.state, _state(10))
  assert restored.meta["iterator"] == {"step": 10}
  store.save(_state(21), _meta(20))  # the number is free again
  store.wait()
  _assert_equal(store.restore(_abstract(_state())).state, _state(21))


def test_all_damaged(tmp_path):
  """Oracle: an error instead of a silent start from nothing."""
  _saved(tmp_path, [10])
  _truncate(tmp_path / "checkpoints" / "00000010")
  with pytest.warns(UserWarning), pytest.raises(checkpoint.CheckpointError, match="is whole"):
    checkpoint.Checkpoints(str(tmp_path)).restore(_abstract(_state()))
  with pytest.raises(checkpoint.CheckpointError, match="is whole"):  # and so at every later start
    checkpoint.Checkpoints(str(tmp_path)).restore(_abstract(_state()))
  assert checkpoint.Checkpoints(str(tmp_path / "new")).restore(_abstract(_state())) is None


def test_an_error_of_the_reader_moves_nothing(tmp_path, monkeypatch):
  """Oracle: the folders before; the error passes through, and the next start loads the bits."""
  store = _saved(tmp_path)

  def fail(*args, **kwargs):
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
    patch.setattr(checkpoint.ocp, "load_checkpointables", fail)
    store.restore(_abstract(_state()))
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000010", "00000020"]
  _assert_equal(store.restore(_abstract(_state())).state, _state(20))


def test_an_unfinished_save(tmp_path):
  """Oracle: a folder as a kill leaves it is reported once and removed; the previous one is used."""
  _saved(tmp_path, [10])
  unfinished = tmp_path / "checkpoints" / "00000020.tmp"
  shutil.copytree(tmp_path / "checkpoints" / "00000010" / "arrays", unfinished / "arrays")
  with pytest.warns(UserWarning, match="step 20 was not finished.*using step 10") as caught:
    store = checkpoint.Checkpoints(str(tmp_path))
  assert len(caught) == 1 and not unfinished.exists()
  _assert_equal(store.restore(_abstract(_state())).state, _state(10))


def test_which_are_kept(tmp_path):
  """Oracle: written out: the last two, and the best by validation loss besides."""
  store = checkpoint.Checkpoints(str(tmp_path), keep_last=2, keep_best=1)
  for step, loss in [(1, 5.0), (2, 3.0), (3, 4.0), (4, None), (5, 3.5), (6, float("nan"))]:
    store.save(_state(), _meta(step, val_loss=loss))
  store.wait()
  assert store.steps() == [2, 5, 6]


def test_a_full_disk_before_the_save(tmp_path, monkeypatch):
  """Oracle: a disk that says it has no room; the earlier checkpoint stays whole."""
  store = _saved(tmp_path, [10])
  usage = shutil.disk_usage(tmp_path)._replace(free=100)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(checkpoint.CheckpointError, match="step 20.*are free.*step 10 is intact"):
    store.save(_state(20), _meta(20))
  _assert_equal(store.restore(_abstract(_state())).state, _state(10))


def test_a_disk_that_fills_up_during_the_save(tmp_path):
  """Oracle: the kernel refuses writes past a size; the error is clear, the earlier one whole."""
  store = _saved(tmp_path, [10])
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
  try:
    store.save(_state(20, size=2**17), _meta(20))
    with pytest.raises(checkpoint.CheckpointError, match="step 20.*step 10 is intact"):
      store.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000010"]
  _assert_equal(store.restore(_abstract(_state())).state, _state(10))


def test_a_folder_that_cannot_be_made(tmp_path):
  """Oracle: a file where the folder was; an error at once, not threads that wait for ever."""
  store = _saved(tmp_path, [10])
  shutil.move(tmp_path / "checkpoints", tmp_path / "elsewhere")
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(checkpoint.CheckpointError, match="step 20.*Not a directory"):
    store.save(_state(20), _meta(20))
  store.close()


def test_load_params_errors(tmp_path):
  """Oracle: each message names what is wrong and what there is."""
  with pytest.raises(checkpoint.CheckpointError, match="none"):
    checkpoint.load_params(str(tmp_path))
  _saved(tmp_path)
  with pytest.raises(checkpoint.CheckpointError, match="step 15.*10, 20"):
    checkpoint.load_params(str(tmp_path), 15)
  with pytest.raises(checkpoint.CheckpointError, match="no EMA"):
    checkpoint.load_params(str(tmp_path), ema=True)
  _truncate(tmp_path / "checkpoints" / "00000020")
  with pytest.raises(checkpoint.CheckpointError, match="damaged.*bytes instead of"):
    checkpoint.load_params(str(tmp_path))
  assert json.loads((tmp_path / "checkpoints/00000010/checkpoint.json").read_text())["step"] == 10
