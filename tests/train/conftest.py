"""One compilation cache for this folder's tests, and one finished run that several look at."""

import functools
import pathlib

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from dsv3_jax import train
from dsv3_jax.train import metrics
from tests import quick
from tests.train import fakes


@pytest.fixture(scope="package", autouse=True)
def cache_dir(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.getbasetemp().parent / "dsv3_jax_xla"
  keys = {"jax_compilation_cache_dir": str(folder),
          "jax_persistent_cache_min_compile_time_secs": 0.0}
  before = {key: getattr(jax.config, key) for key in keys}
  for key, value in keys.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()
  jit, jax.jit = jax.jit, functools.partial(jax.jit, compiler_options=quick.options())
  yield folder
  jax.jit = jit
  for key, value in before.items():
    jax.config.update(key, value)
  compilation_cache.reset_cache()


@pytest.fixture(scope="package")
def config():
  return fakes.small_config(**{"optim.ema_decay": 0.9, "optim.ema_every": 2})


@pytest.fixture(scope="package")
def whole(tmp_path_factory, config, cache_dir) -> pathlib.Path:
  """The workdir of a run that nothing interrupted."""
  folder = tmp_path_factory.mktemp("whole")
  result = train.run(config, str(folder), ui=metrics.Silent(), corpus=fakes.FakeCorpus(config))
  assert result.finished and result.exit_code == 0
  return folder
