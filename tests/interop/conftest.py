"""Each configuration is written, loaded and run once for all oracles."""

import functools
import types
import zlib

import numpy as np
import pytest

from dsv3_jax.interop import huggingface
from tests.interop import oracle
from tests.interop.cases import CASES, TOKENS_BT, run


@pytest.fixture(scope="session")
def case(tmp_path_factory):
  """name -> config, tensors, folder, and our logits on TOKENS_BT."""

  @functools.cache
  def build(name):
    c, bias = CASES[name]
    tensors = oracle.random_tensors(c, zlib.crc32(name.encode()), bias)
    folder = oracle.write_folder(tmp_path_factory.mktemp(name) / "m", c, tensors,
                                 shards=1 + len(name) % 3)
    model = huggingface.load(folder)
    out = model(TOKENS_BT) if name == "base" else run(model)  # the plain call, once
    logits = np.asarray(out.logits_BTV)
    return types.SimpleNamespace(config=c, tensors=tensors, folder=folder, logits=logits)

  return build
