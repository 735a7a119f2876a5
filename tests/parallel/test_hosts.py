"""What a process holds of arrays over several processes' devices."""

import jax
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.parallel import hosts, sharding
from dsv3_jax.parallel import mesh as mesh_lib


class _Part:
  """A sharding as the process sees it that has some of the devices."""

  is_fully_addressable = False

  def __init__(self, where, devices):
    self._where, self._devices = where, devices

  def addressable_devices_indices_map(self, shape):
    return {d: i for d, i in self._where.devices_indices_map(shape).items() if d in self._devices}


@pytest.mark.parametrize("axes, rows", [
    ({"data": 4}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
    ({"pipe": 2, "data": 2}, [tuple(range(8)), tuple(range(8))]),
    ({"pipe": 2, "node": 2, "gpu": 2}, [tuple(range(8)), tuple(range(8))]),
    ({"data": 2, "gpu": 2}, [(0, 1, 2, 3), (4, 5, 6, 7)]),
])
def test_rows_of_two_processes(axes, rows, monkeypatch):
  """Oracle: by hand, each process having half of the mesh; each device's part is then its rows."""
  mesh = mesh_lib.make_mesh(config.Mesh(**axes))
  where = sharding.batch_sharding(mesh)
  devices = list(mesh.devices.flat)
  batch = np.arange(2 * 8 * 3).reshape(2, 8, 3)
  for half, expected in zip((devices[:len(devices) // 2], devices[len(devices) // 2:]), rows,
                            strict=True):
    part, got = _Part(where, half), {}
    assert hosts.rows(part, (1, 8, 1), 1) == expected

    def make(shape, _, callback, part=part, got=got):
      got |= {d: callback(i) for d, i in part.addressable_devices_indices_map(shape).items()}
      return shape

    monkeypatch.setattr(hosts, "_make", make)
    shape = hosts.put_rows({"x": batch[:, list(expected)]}, part, expected, 8, 1)["x"]
    assert shape == batch.shape
    indices = where.devices_indices_map(batch.shape)
    for device, held in got.items():
      np.testing.assert_array_equal(held, batch[indices[device]])


def test_parts_join_again():
  """Oracle: the array itself, from the parts that several processes would keep of it."""
  mesh = mesh_lib.make_mesh(config.Mesh(node=2, gpu=2))
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("node", "gpu"), None))
  whole = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  x = hosts.put(whole, where)
  np.testing.assert_array_equal(hosts.parts(x), whole)
  parts = {hosts.key(s.index, x.shape): np.asarray(s.data) for s in x.addressable_shards}
  assert list(parts) == [((2 * i, 2 * i + 2), (0, 3)) for i in range(4)]
  for held in (whole, parts):
    joined = hosts.join({"w": held}, {"w": x})["w"]
    assert joined.sharding == where
    np.testing.assert_array_equal(joined, whole)
  np.testing.assert_array_equal(hosts.whole({"w": x}, mesh)["w"], whole)
