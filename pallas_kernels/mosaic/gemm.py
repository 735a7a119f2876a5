"""FP8 GEMMs for Hopper: dense, grouped and masked products, and weight gradients.

    gemm            a_MK   @ b_NK^T              Fprop, Dgrad
    grouped_gemm    a_MK   @ b_GNK[group]^T      rows sorted by expert, in blocks of 128
    masked_gemm     a_GMK  @ b_GNK^T             the first masked_m[g] rows of each group (decoding)
    wgrad           x_KT   @ dy_NT^T             fp32 weight gradient of y = x @ w, from tokens
    grouped_wgrad   the same of each group's tokens

Operands are e4m3 with the summed axis contiguous. Activations and gradients carry a scale for 128
values of that axis, laid out [blocks, rows]; weights one for a block of 128x128. Scales multiply
codes. All kernels are `gemm_kernel.run`; here shapes are checked and, where the copies' alignment
asks for it, padded: M and N to 16, the summed axis to 128, and each to a tile's extent
at least. A sum over 576 (Dgrad of DeepSeek-V3's w_dkv) needs it.

Promotion to fp32 happens every `interval` values: 32, 64 or 128. More than 128 cannot be had: the
sum in the tensor core would span several blocks, each of which has a scale of its own.

Results do not depend on `num_sms`, and hardly on the configuration (which never splits a sum).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.mosaic import compat, gemm_kernel
from pallas_kernels.mosaic import config as config_lib
from pallas_kernels.mosaic.config import BLOCK, GemmConfig


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple


def _pad(x: jax.Array, *shape: int) -> jax.Array:
  """Zeros behind each axis up to `shape`."""
  if x.shape == shape:
    return x
  return jnp.pad(x, [(0, new - old) for old, new in zip(x.shape, shape, strict=True)])


def _extent(size: int, tile: int, cluster: int, interpret: compat.Interpret) -> int:
  """What an axis of `size` is padded to, for tiles of `tile`: their tails are clipped by copies."""
  if interpret and not compat.TAILS:
    return _up(size, tile * cluster)
  return max(_up(size, 16), tile)


def _codes(**arrays: jax.Array) -> None:
  """Raises where operands are not of the kernels' formats."""
  for name, x in arrays.items():
    if x.dtype == jnp.float8_e5m2:
      raise NotImplementedError(f"{name} is float8_e5m2; these kernels multiply float8_e4m3fn")
    if x.dtype != jnp.float8_e4m3fn:
      raise ValueError(f"{name} must be float8_e4m3fn, not {x.dtype}")


def _shaped(x: jax.Array, name: str, shape: tuple[int, ...], dtype=jnp.float32) -> None:
  if x.shape != shape or x.dtype != dtype:
    raise ValueError(f"{name} must be {jnp.dtype(dtype)}{list(shape)}, "
                     f"not {x.dtype}{list(x.shape)}")


def _chosen(config: GemmConfig | None, kind: str, M: int, N: int, K: int, G: int, out_dtype,
            interval: int) -> GemmConfig:
  """A configuration that can run, or ValueError."""
  if interval not in (32, 64, 128):
    raise ValueError(f"interval must be 32, 64 or 128, not {interval}: a sum over more than "
                     f"{BLOCK} values would mix blocks, whose scales differ")
  if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float32):
    raise ValueError(f"out_dtype must be bfloat16 or float32, not {out_dtype}")
  config = config or config_lib.heuristic(kind, M, N, K, G, out_dtype)
  if reason := config_lib.legal(config, kind, M, N, K, out_dtype):
    raise ValueError(f"{config} cannot run {kind}: {reason}")
  return config


def _clusters(config: GemmConfig) -> tuple[int, int]:
  return tuple(2 if config.cluster == axis else 1 for axis in "mn")


def gemm(a_MK: jax.Array, a_scales_kM: jax.Array, b_NK: jax.Array, b_scales_nk: jax.Array, *,
         config: GemmConfig | None = None, out_dtype=jnp.bfloat16, interval: int = BLOCK,
         num_sms: int = config_lib.SMS, interpret: compat.Interpret = False) -> jax.Array:
  """`a @ b^T`, [M, N] in `out_dtype` (bfloat16 or float32).

  Args:
    a_MK: e4m3, K contiguous. a_scales_kM: fp32 [ceil(K/128), M].
    b_NK: e4m3. b_scales_nk: fp32 [ceil(N/128), ceil(K/128)].
    config: None asks the model of `config.heuristic`.
    interval: values of K that the tensor core adds by itself.
    num_sms: thread blocks to start.

  Raises:
    NotImplementedError: an operand is e5m2.
    ValueError: other types, shapes that do not fit, a configuration that cannot run.
  """
  (M, K), (N, other) = a_MK.shape, b_NK.shape
  n, k = -(-N // BLOCK), -(-K // BLOCK)
  _codes(a_MK=a_MK, b_NK=b_NK)
  if K != other:
    raise ValueError(f"a_MK sums over {K} values, b_NK over {other}")
  _shaped(a_scales_kM, "a_scales_kM", (k, M))
  _shaped(b_scales_nk, "b_scales_nk", (n, k))
  config = _chosen(config, "dense", M, N, K, 1, out_dtype, interval)
  if 0 in (M, N, K):
    return jnp.zeros((M, N), out_dtype)
  cluster_m, cluster_n = _clusters(config)
  rows = _extent(M, config.tile_m, cluster_m, interpret)
  columns = _extent(N, config.tile_n, cluster_n, interpret)
  y = gemm_kernel.run(
      "dense", config, _pad(a_MK, rows, k * BLOCK), _pad(a_scales_kM, k, rows),
      _pad(b_NK, columns, k * BLOCK), b_scales_nk, columns=columns,
      out=jax.ShapeDtypeStruct((rows, columns), out_dtype), interval=interval, num_sms=num_sms,
      interpret=interpret)
  return y[:M, :N]


def wgrad(x_KT: jax.Array, x_scales_tK: jax.Array, dy_NT: jax.Array, dy_scales_tN: jax.Array, *,
          accumulate: jax.Array | None = None, config: GemmConfig | None = None,
          interval: int = BLOCK, num_sms: int = config_lib.SMS,
          interpret: compat.Interpret = False) -> jax.Array:
  """Weight gradient `x^T dy` of `y = x @ w_KN` from operands cast along the tokens; fp32 [K, N].

  Args:
    x_KT, dy_NT: e4m3, T tokens contiguous.
    x_scales_tK, dy_scales_tN: fp32 [ceil(T/128), K or N].
    accumulate: fp32 [K, N] to add to; a new array results (the caller may donate the old one).
    Others and errors as `gemm`.
  """
  (K, T), (N, other) = x_KT.shape, dy_NT.shape
  if T != other:
    raise ValueError(f"x_KT has {T} tokens, dy_NT {other}")
  return _wgrad("wgrad", x_KT, x_scales_tK, dy_NT, dy_scales_tN, (), (K, N), accumulate, config,
                interval, num_sms, interpret)


def grouped_wgrad(x_KT: jax.Array, x_scales_tK: jax.Array, dy_NT: jax.Array,
                  dy_scales_tN: jax.Array, bounds_G2: jax.Array, *,
                  accumulate: jax.Array | None = None, config: GemmConfig | None = None,
                  interval: int = BLOCK, num_sms: int = config_lib.SMS,
                  interpret: compat.Interpret = False) -> jax.Array:
  """`wgrad` of each group's tokens, fp32 [G, K, N]; a group without tokens has zeros.

  Args:
    bounds_G2: int32, first block of 128 tokens of each group and the one behind its last.
    accumulate: fp32 [G, K, N].
    Others and errors as `wgrad`. T is a multiple of 128.
  """
  (K, T), (N, other) = x_KT.shape, dy_NT.shape
  if T != other or T % BLOCK:
    raise ValueError(f"x_KT has {T} tokens, dy_NT {other}; both must be one multiple of {BLOCK}")
  _shaped(bounds_G2, "bounds_G2", (bounds_G2.shape[0], 2), jnp.int32)
  return _wgrad("grouped_wgrad", x_KT, x_scales_tK, dy_NT, dy_scales_tN, (bounds_G2,),
                (bounds_G2.shape[0], K, N), accumulate, config, interval, num_sms, interpret)


def _wgrad(kind, x_KT, x_scales_tK, dy_NT, dy_scales_tN, tables, shape, accumulate, config,
           interval, num_sms, interpret):
  *lead, K, N = shape
  T = x_KT.shape[1]
  t, groups = -(-T // BLOCK), lead[0] if lead else 1
  _codes(x_KT=x_KT, dy_NT=dy_NT)
  _shaped(x_scales_tK, "x_scales_tK", (t, K))
  _shaped(dy_scales_tN, "dy_scales_tN", (t, N))
  if accumulate is not None:
    _shaped(accumulate, "accumulate", shape)
  config = _chosen(config, kind, K, N, T, groups, jnp.float32, interval)
  if 0 in (*shape, T):
    return jnp.zeros(shape, jnp.float32) if accumulate is None else accumulate
  cluster_m, cluster_n = _clusters(config)
  rows = _extent(K, config.tile_m, cluster_m, interpret)
  columns = _extent(N, config.tile_n, cluster_n, interpret)
  addend = None if accumulate is None else _pad(accumulate, *lead, rows, columns)
  dw = gemm_kernel.run(
      kind, config, _pad(x_KT, rows, t * BLOCK), _pad(x_scales_tK, t, rows),
      _pad(dy_NT, columns, t * BLOCK), _pad(dy_scales_tN, t, columns), columns=columns,
      out=jax.ShapeDtypeStruct((*lead, rows, columns), jnp.float32), tables=tables, addend=addend,
      groups=groups, interval=interval, num_sms=num_sms, interpret=interpret)
  return dw[..., :K, :N]


def grouped_gemm(a_MK: jax.Array, a_scales_kM: jax.Array, b_GNK: jax.Array, b_scales_Gnk: jax.Array,
                 group_m: jax.Array, used: jax.Array, *, config: GemmConfig | None = None,
                 out_dtype=jnp.bfloat16, interval: int = BLOCK, num_sms: int = config_lib.SMS,
                 interpret: compat.Interpret = False) -> jax.Array:
  """`y[block i] = a[block i] @ b[group_m[i]]^T`, [M, N]; zeros in blocks that are not in use.

  Args:
    a_MK: e4m3 rows in blocks of 128 of one group each. a_scales_kM: fp32 [ceil(K/128), M].
    b_GNK: e4m3. b_scales_Gnk: fp32 [G, ceil(N/128), ceil(K/128)].
    group_m: int32 [M/128], non-decreasing over the blocks in use; others are not looked at.
    used: int32 scalar, number of blocks in use (the first ones).
    Others and errors as `gemm`.
  """
  (M, K), (G, N, other) = a_MK.shape, b_GNK.shape
  n, k = -(-N // BLOCK), -(-K // BLOCK)
  _codes(a_MK=a_MK, b_GNK=b_GNK)
  if K != other or M % BLOCK:
    raise ValueError(f"a_MK is {M}x{K}, b_GNK sums over {other} values; K must agree and M be a "
                     f"multiple of {BLOCK}")
  _shaped(a_scales_kM, "a_scales_kM", (k, M))
  _shaped(b_scales_Gnk, "b_scales_Gnk", (G, n, k))
  _shaped(group_m, "group_m", (M // BLOCK,), jnp.int32)
  _shaped(used, "used", (), jnp.int32)
  config = _chosen(config, "grouped", M, N, K, G, out_dtype, interval)
  if 0 in (M, N, K, G):
    return jnp.zeros((M, N), out_dtype)
  return _many("grouped", config, a_MK, a_scales_kM, b_GNK, b_scales_Gnk, (group_m, used[None]),
               out_dtype, interval, num_sms, interpret)[:, :N]


def masked_gemm(a_GMK: jax.Array, a_scales_GkM: jax.Array, b_GNK: jax.Array,
                b_scales_Gnk: jax.Array, masked_m_G: jax.Array, *, finite: bool = True,
                config: GemmConfig | None = None, out_dtype=jnp.bfloat16, interval: int = BLOCK,
                num_sms: int = config_lib.SMS, interpret: compat.Interpret = False) -> jax.Array:
  """`y[g, i] = a[g, i] @ b[g]^T` for `i < masked_m_G[g]`, [G, M, N]: a decoder's experts.

  Contract for the other rows: the kernel visits a group's tiles only as far as its rows reach.
  Behind them, rows of the last tile are products of whatever `a_GMK` holds there (finite where
  codes and scales are). Whole tiles behind that are zeros with `finite`, which costs writing
  them but no products; without, they are not written and may hold anything, NaN too.

  Args:
    a_GMK: e4m3. a_scales_GkM: fp32 [G, ceil(K/128), M].
    b_GNK: e4m3. b_scales_Gnk: fp32 [G, ceil(N/128), ceil(K/128)].
    masked_m_G: int32, 0 <= masked_m_G <= M.
    Others and errors as `gemm`.
  """
  (G, M, K), (groups, N, other) = a_GMK.shape, b_GNK.shape
  n, k = -(-N // BLOCK), -(-K // BLOCK)
  _codes(a_GMK=a_GMK, b_GNK=b_GNK)
  if (G, K) != (groups, other):
    raise ValueError(f"a_GMK is {G} groups of {K} values, b_GNK {groups} of {other}")
  _shaped(a_scales_GkM, "a_scales_GkM", (G, k, M))
  _shaped(b_scales_Gnk, "b_scales_Gnk", (G, n, k))
  _shaped(masked_m_G, "masked_m_G", (G,), jnp.int32)
  config = _chosen(config, "masked", M, N, K, G, out_dtype, interval)
  if 0 in (G, M, N, K):
    return jnp.zeros((G, M, N), out_dtype)
  rows = _up(M, config.tile_m)  # a tile may not reach into the next group
  tables = masked_tiles(masked_m_G, rows, config.tile_m, finite)
  y = _many("masked", config, _pad(a_GMK, G, rows, K).reshape(G * rows, K),
            _pad(a_scales_GkM, G, k, rows).reshape(G * k, rows), b_GNK, b_scales_Gnk, tables,
            out_dtype, interval, num_sms, interpret)
  return y.reshape(G, rows, -1)[:, :M, :N]


def masked_tiles(masked_m_G: jax.Array, M: int, tile: int, finite: bool) -> tuple[jax.Array, ...]:
  """Tables of `schedule.schedule`: each tile's group and row, how many are in use, and visited.

  Tiles with rows in use come first, group by group, then the others.
  """
  G, tiles = masked_m_G.shape[0], M // tile
  busy_G = -(-masked_m_G // tile)
  index = jnp.arange(G * tiles, dtype=jnp.int32)

  def locate(index, count_G):
    ends_G = jnp.cumsum(count_G)
    group = (index[:, None] >= ends_G).sum(1, dtype=jnp.int32)
    group = jnp.minimum(group, G - 1)
    return group, index - (ends_G - count_G)[group]

  used = busy_G.sum(dtype=jnp.int32)
  group, tile_of = locate(index, busy_G)
  empty_group, empty_tile = locate(index - used, tiles - busy_G)
  in_use = index < used
  group = jnp.where(in_use, group, empty_group)
  row = M * group + tile * jnp.where(in_use, tile_of, busy_G[empty_group] + empty_tile)
  visited = jnp.int32(G * tiles) if finite else used
  return group, row, used[None], visited[None]


def _many(kind, config, a_MK, a_scales_kM, b_GNK, b_scales_Gnk, tables, out_dtype, interval,
          num_sms, interpret):
  """[M, N and padding] with the groups' matrices one under another."""
  (M, K), (G, N, _) = a_MK.shape, b_GNK.shape
  k = _up(K, BLOCK)
  columns = _extent(N, config.tile_n, _clusters(config)[1], interpret)
  return gemm_kernel.run(
      kind, config, _pad(a_MK, M, k), a_scales_kM, _pad(b_GNK, G, columns, k).reshape(-1, k),
      b_scales_Gnk.reshape(-1, b_scales_Gnk.shape[-1]), columns=columns,
      out=jax.ShapeDtypeStruct((M, columns), out_dtype), tables=tables, groups=G,
      interval=interval, num_sms=num_sms, interpret=interpret)
