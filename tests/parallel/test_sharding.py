"""Meshes and PartitionSpecs."""

import jax
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.parallel import mesh, sharding

BATCH = ("data", "node", "gpu")


@pytest.mark.parametrize("name, ndim, expected", [
    ("tokens_BT", None, P(BATCH, None)), ("tokens_BS", 3, P(None, BATCH, None)),
    ("w_gate_EDF", 4, P()), ("step", 0, P()), ("mtp_loss", 1, P())])
def test_spec(name, ndim, expected):
  """Oracle: the letters, written out."""
  assert sharding.spec(name, ndim) == expected


def test_spec_collision():
  """Oracle: one mesh axis cannot cut two letters of one array."""
  with pytest.raises(ValueError, match="x_BT"):
    sharding.spec("x_BT", rules={"B": "data", "T": "data"})
  with pytest.raises(ValueError, match="rank 1"):
    sharding.spec("x_BT", 1)


def test_mesh_of_virtual_devices():
  """Oracle: the sizes asked for; too many is an error that says how to get them."""
  made = mesh.make_mesh(config.Mesh(pipe=2, gpu=2))
  assert dict(made.shape) == {"pipe": 2, "data": 1, "context": 1, "node": 1, "gpu": 2}
  assert made.devices.ravel().tolist() == jax.devices()[:4]  # neighbours share `gpu`
  assert mesh.several(made, mesh.BATCH) == ("gpu",)
  assert sharding.batch_sharding(made).spec == P(None, "gpu", None)
  assert sharding.batch_sharding(mesh.make_mesh(config.Mesh(pipe=2))).spec == P()
  with pytest.raises(config.ConfigError, match="runtime.mesh.data=64 needs 64 devices and 8"):
    mesh.make_mesh(config.Mesh(data=64))
