"""Baselines of the validation text."""

import shutil
import subprocess

import numpy as np
import pytest

from dsv3_jax.data import baselines


@pytest.mark.skipif(not shutil.which("gzip"), reason="no gzip command")
def test_gzip_equals_the_command():
  """Oracle: the size that `gzip -9` itself gives, up to the file name in its header."""
  text = "".join(f"{i} bottles of beer on the wall\n" for i in range(3000)).encode()
  size = len(subprocess.run(["gzip", "-9", "-n", "-c"], input=text, capture_output=True,
                            check=True).stdout)
  assert baselines.compression(text)["gzip -9"] == pytest.approx(8 * size / len(text), rel=1e-3)


def test_xz_finds_repeats_beyond_gzips_window():
  """Law: a random block repeated after 64 KiB is free for xz and invisible to gzip."""
  block = np.random.default_rng(0).bytes(65_536)
  bits = baselines.compression(block * 4)
  assert bits["gzip -9"] > 7.9
  assert bits["xz"] < 2.1


def test_unigram_by_hand():
  """Oracle: counts (2, 1, 0) over a vocabulary of 3, add-one smoothed to 3/6, 2/6, 1/6."""
  value = baselines.unigram(np.array([0, 0, 1]), np.array([0, 1, 2]), 3, text_bytes=6)
  expected = (np.log2(6 / 3) + np.log2(6 / 2) + np.log2(6 / 1)) / 6
  assert value == pytest.approx(expected, rel=1e-12)


def test_empty_text_is_an_error():
  """Oracle: the message names the key that decides how much validation text there is."""
  with pytest.raises(ValueError, match="data.validation_fraction"):
    baselines.compression(b"")
  with pytest.raises(ValueError, match="data.validation_fraction"):
    baselines.unigram(np.array([0]), np.array([], np.int32), 3, 0)
