"""Kernels of dsv3_jax as an independent package: it needs jax and numpy alone.

Each operation has a `reference` (its definition), an XLA implementation in `xla/` for any platform,
and accelerator implementations. An implementation that cannot take a call raises
NotImplementedError; `dsv3_jax.ops` then tries the next one.
"""
