"""Workdirs that cannot be used say so before any work."""

import json

import pytest

from dsv3_jax import config
from dsv3_jax.data import shards
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.train import processes, workdir


def test_another_config(tmp_path):
  """Oracle: the message names each differing key with both values, and nothing else."""
  old = config.Config()
  with workdir.Workdir(str(tmp_path), old):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
  new = config.replace(old, **{"model.moe.experts": 8, "train.tokens": 5e6,
                               "train.log_every": 7, "runtime.remat": "layer"})
  with pytest.raises(workdir.WorkdirError) as error, workdir.Workdir(str(tmp_path), new):
    pass
  lines = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:-1]]
  assert lines == ["model.moe.experts", "train.tokens"]
  assert "16 there, 8 now" in str(error.value)
  assert config.from_json((tmp_path / "config.json").read_text()) == old


@pytest.mark.parametrize("changes, kept", [
    ({"data.sources": ("mistyped.txt",)}, False), ({"model.vocab_size": 9000}, False),
    ({"optim.lr": 1.0}, True)])
def test_a_start_that_failed_binds_nobody(tmp_path, changes, kept):
  """Law: until something was trained a corrected config may follow, without the old tokenizer."""
  with workdir.Workdir(str(tmp_path), config.replace(config.Config(), **changes)):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
  with workdir.Workdir(str(tmp_path), config.Config()):
    assert (tmp_path / "tokenizer.json").exists() == kept
    (tmp_path / "checkpoints" / "00000001").mkdir()
  assert config.from_json((tmp_path / "config.json").read_text()) == config.Config()
  with pytest.raises(workdir.WorkdirError, match=next(iter(changes))), \
      workdir.Workdir(str(tmp_path), config.replace(config.Config(), **changes)):
    pass


def test_a_converted_model_binds_its_shapes_alone(tmp_path):
  """Oracle: a workdir with a checkpoint of step 0 and nothing trained, as `convert` makes it."""
  with workdir.Workdir(str(tmp_path), config.Config()):
    (tmp_path / "checkpoints" / "00000000").mkdir(parents=True)
  other = config.replace(config.Config(), **{"optim.lr": 1.0, "data.batch_size": 16})
  with workdir.Workdir(str(tmp_path), other):
    pass
  wider = config.replace(other, **{"model.dim": 512, "optim.lr": 2.0})
  with pytest.raises(workdir.WorkdirError, match="model.dim: 256 there, 512 now") as error, \
      workdir.Workdir(str(tmp_path), wider):
    pass
  assert "optim.lr" not in str(error.value)


def test_leftovers_of_a_kill_are_removed(tmp_path):
  """Oracle: the names that files and shards have while they are written; nothing else goes."""
  tokenizer, folder = tokenizer_lib.train(["some text"], 264), tmp_path / "data" / "abc"
  folder.parent.mkdir()
  writer = shards.Writer(str(folder), tokenizer)  # never finished
  writer.add([9, 10], b"ab")
  (tmp_path / ".config.json.1x.tmp").write_text("{")
  (tmp_path / "mine.tmp").write_text("")
  (tmp_path / "data" / "whole").mkdir()
  assert len(list(folder.parent.iterdir())) == 2
  with workdir.Workdir(str(tmp_path), config.Config()):
    pass
  assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json", "data", "mine.tmp"]
  assert [p.name for p in folder.parent.iterdir()] == ["whole"]


def test_free_keys_may_change(tmp_path):
  """Oracle: the same workdir opens, and config.json holds what is in force now."""
  with workdir.Workdir(str(tmp_path), config.Config()):
    pass
  new = config.replace(config.Config(), **{"train.eval_every": 7, "runtime.mesh.data": 2,
                                           "data.workers": 3})
  with workdir.Workdir(str(tmp_path), new) as again:
    assert again.changed == {"data.workers": (0, 3), "runtime.mesh.data": (1, 2),
                             "train.eval_every": (200, 7)}
  assert config.from_json((tmp_path / "config.json").read_text()) == new


def test_every_free_key_exists():
  """Oracle: the config's own fields."""
  keys = workdir._flat(config.to_dict(config.Config()))
  for free in workdir.FREE:
    assert any(k == free or k.startswith(free + ".") for k in keys), free


def test_not_writable(tmp_path):
  """Oracle: a folder below a file, which not even root can make."""
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "below"):
    with pytest.raises(workdir.WorkdirError, match="cannot write to workdir"), \
        workdir.Workdir(str(path), config.Config()):
      pass


def test_one_process_at_a_time(tmp_path):
  """Oracle: a second claim fails, and works once the first has ended."""
  with workdir.Workdir(str(tmp_path), config.Config()):
    with pytest.raises(workdir.WorkdirError, match="another process"), \
        workdir.Workdir(str(tmp_path), config.Config()):
      pass
  with workdir.Workdir(str(tmp_path), config.Config()):
    pass


def test_a_broken_config_file(tmp_path):
  """Oracle: the message names the file."""
  (tmp_path / "config.json").write_text('{"modle": {}}')
  with pytest.raises(workdir.WorkdirError, match="config.json.*model"), \
      workdir.Workdir(str(tmp_path), config.Config()):
    pass


class _Follower(processes.Alone):
  """A second process, to which process 0 said `said`."""

  index, count, first = 1, 2, False

  def __init__(self, said):
    super().__init__()
    self._said = json.dumps(said)

  def share(self, name, value):
    return self._said


def test_other_processes_see_the_same_folder_and_config(tmp_path, monkeypatch):
  """Oracle: the mark that process 0 left; keys and values that differ in the message."""
  mine = config.Config()
  with workdir.Workdir(str(tmp_path), mine):
    said = [(tmp_path / ".lock").read_text(), config.to_json(mine)]
    with workdir.Workdir(str(tmp_path), mine, _Follower(said)) as follower:
      assert follower.path == str(tmp_path)
    for key, old, new in (("optim.lr", 0.00022, 0.5), ("runtime.zero", 0, 1)):
      other = config.replace(mine, **{key: new})
      with (pytest.raises(workdir.WorkdirError, match=(
          rf"process 1 .* another config than process 0:\n  {key}: {old} there, {new} here")),
            workdir.Workdir(str(tmp_path), other, _Follower(said))):
        pass
    monkeypatch.setattr(workdir, "_SHARED_WITHIN", 0.1)
    for mark, path in (("another mark", tmp_path), (said[0], tmp_path / "elsewhere")):
      with (pytest.raises(workdir.WorkdirError, match="process 1 does not see .* one folder, on a"),
            workdir.Workdir(str(path), mine, _Follower([mark, said[1]]))):
        pass


def test_a_tokenizer_that_was_checked_stays(tmp_path):
  """Law: runs that begin with a model have its tokenizer before the folder is theirs; correcting
  the data does not take it away."""
  tuned = config.replace(config.Config(), **{
      "kind": "sft", "sft.problems": ("add:0:5",), "train.init": "runs/tiny"})
  with workdir.Workdir(str(tmp_path), config.replace(tuned, **{"data.batch_size": 4})):
    (tmp_path / "tokenizer.json").write_text("{}")
  with workdir.Workdir(str(tmp_path), tuned):
    assert (tmp_path / "tokenizer.json").exists()
