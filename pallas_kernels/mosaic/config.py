"""How the FP8 GEMM kernel cuts a product up: configurations, their limits, and a choice by model.

`legal` says what the hardware and the lowering allow, `candidates` what is worth timing, and
`heuristic` what an analytic model of the machine likes best, for shapes that no table has.

The model's numbers are an H100's, in clocks and bytes of one multiprocessor. A tile's step over 128
values of k is bound by the slowest of: the tensor core (8192 FP8 multiply-adds a 2 clocks), the
port of shared memory (128 bytes a clock for what wgmma reads and the copies write), instruction
issue of the promotion, and the copies' share of L2. Tiles run in waves over the multiprocessors.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp

BLOCK = 128  # values of k, and rows and columns of a weight, that share a scale
KINDS = ("dense", "wgrad", "grouped", "masked", "grouped_wgrad")
SHARED_MEMORY = 232_448  # bytes that a thread block may use
SMS = 132


@dataclasses.dataclass(frozen=True)
class GemmConfig:
  """Attributes:
    rows: of a warpgroup: 64, or 128 in two waves.
    tile_n: columns of a tile.
    warpgroups: that compute; they lie one under the other.
    stages: of the ring of operands, of 128 values each.
    cluster: None, or the axis along which two thread blocks lie: "m" (they share B) or "n" (A).
    raster_minor: 0 or 1, the axis (M or N) along which consecutive tiles lie,
    raster_width: in runs of this many.
    registers: a thread of the copying warpgroup keeps; the computing ones get the rest.
    fence: a proxy fence before a stage is given back (see `compat.release`).
    overlap: a tile's epilogue runs under the next tile's first product.
  """

  rows: int = 64
  tile_n: int = 128
  warpgroups: int = 2
  stages: int = 4
  cluster: str | None = None
  raster_minor: int = 1
  raster_width: int = 8
  registers: int = 40
  fence: bool = False
  overlap: bool = True

  @property
  def tile_m(self) -> int:
    return self.rows * self.warpgroups

  def to_dict(self) -> dict:
    """For JSON."""
    return dataclasses.asdict(self)

  @classmethod
  def from_dict(cls, values: dict) -> "GemmConfig":
    """Inverse of `to_dict`; a key that is not an attribute is a ValueError."""
    unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
    if unknown:
      raise ValueError(f"GemmConfig has no {', '.join(sorted(unknown))}")
    return cls(**values)


def one_d(kind: str) -> bool:
  """Whether B has a scale a row, as in weight gradients, rather than one a block."""
  return kind.endswith("wgrad")


def store_columns(tile_n: int, N: int, dtype) -> int:
  """Columns that the staging of the output keeps together: up to a swizzle of 128 bytes."""
  return math.gcd(tile_n, N, 128 // jnp.dtype(dtype).itemsize)


def shared_memory(config: GemmConfig, kind: str, out_dtype=jnp.bfloat16) -> int:
  """Bytes of shared memory; each array starts at a multiple of 1024."""
  return _shared_memory(config, kind, out_dtype, config.stages, BLOCK)


def _shared_memory(config, kind, out_dtype, stages, values):
  tm, tn = config.tile_m, config.tile_n
  arrays = [stages * tm * values, stages * tn * values, stages * tm * 4,
            tm * tn * jnp.dtype(out_dtype).itemsize]
  if one_d(kind):
    arrays.append(stages * tn * 4)
  barriers = 3 * stages + 2
  return sum(-(-size // 1024) * 1024 for size in arrays) + 8 * barriers


def ring(config: GemmConfig, kind: str, out_dtype, interval: int) -> int:
  """Stages of `interval` values that hold what `config.stages` of 128 do, if there is room."""
  stages = config.stages * (BLOCK // interval)
  while _shared_memory(config, kind, out_dtype, stages, interval) > SHARED_MEMORY:
    stages -= 1
  return stages


def legal(config: GemmConfig, kind: str, M: int, N: int, K: int, out_dtype=jnp.bfloat16
          ) -> str | None:
  """Why the kernel cannot run like this, or None.

  Args:
    M, N, K: of one product; for weight gradients M, N are the weight's axes and K the tokens.
  """
  c = config
  if kind not in KINDS:
    return f"kind {kind!r} is none of {', '.join(KINDS)}"
  if c.rows not in (64, 128) or c.warpgroups not in (1, 2):
    return "rows are 64 or 128, warpgroups 1 or 2"
  if not 16 <= c.tile_n <= 256 or c.tile_n % 16:
    return "tile_n is a multiple of 16 in [16, 256]"
  if c.cluster not in (None, "m", "n"):
    return "cluster is None, 'm' or 'n'"
  if c.raster_minor not in (0, 1) or c.raster_width < 1 or c.stages < 2:
    return "raster_minor is 0 or 1, raster_width at least 1, stages at least 2"
  if not 24 <= c.registers <= 128 or c.registers % 8:
    return "registers is a multiple of 8 in [24, 128]"
  if kind == "grouped" and BLOCK % c.tile_m:
    return "a tile of more than 128 rows would span groups"
  if kind == "masked" and c.cluster == "m":
    return "tiles that follow each other need not share a group"
  used = shared_memory(c, kind, out_dtype)
  if used > SHARED_MEMORY:
    return f"{used} bytes of shared memory, {SHARED_MEMORY} exist"
  if spills(c, kind):
    return "its accumulators do not fit into registers"
  return None


def spills(config: GemmConfig, kind: str) -> bool:
  """Whether a thread's accumulators are more than its registers hold, as compiling showed.

  They are the product on its way, the promoted sums, and a row of scales if there is one: 200 of
  the 232 registers are what fits besides addresses (128x192 and 256x128 dense, 128x160 wgrad).
  """
  columns, waves = config.tile_n // 2, config.rows // 64
  scales = config.tile_n // 4 if one_d(kind) else 0
  return columns + waves * columns + scales > 200


# --- the model ------------------------------------------------------------------------------------

L2_BYTES = 36  # a clock and multiprocessor that copies get out of L2
HBM_BYTES = 1900  # a clock, all multiprocessors together
TILE_END = {True: 250, False: 700}  # clocks at a tile's end; by `overlap`
FILL = 1500  # clocks until the first operands arrive


def clocks(config: GemmConfig, kind: str, M: int, N: int, K: int, G: int = 1,
           out_dtype=jnp.bfloat16, sms: int = SMS) -> float:
  """Estimated clocks of a call; see the module docstring.

  Args:
    M, N, K: as in `legal`; of grouped, M are all rows, of masked those of a group; of
      grouped_wgrad, K are all tokens.
    G: number of groups.
  """
  tm, tn, waves = config.tile_m, config.tile_n, config.tile_m // 64
  share_a, share_b = (2 if config.cluster == axis else 1 for axis in "nm")
  tensor = tm * tn / 32
  port = waves * (64 + tn) + tm + tn
  subs = 1 if one_d(kind) else tn // math.gcd(tn, BLOCK)
  promotion = tn * 1.15 if one_d(kind) else tn / 2
  issue = waves * (promotion + 70 + 20 * subs)
  l2 = (tm / share_a + tn / share_b) * BLOCK / L2_BYTES
  step = max(tensor, port, issue, l2)

  matrices = G if kind in ("masked", "grouped_wgrad") else 1
  steps = -(-K // BLOCK) / (G if kind == "grouped_wgrad" else 1)
  pairs = -(-M // (tm * share_b)) * -(-N // (tn * share_a)) * matrices
  rounds = -(-pairs // (sms // (share_a * share_b)))
  out_bytes = jnp.dtype(out_dtype).itemsize
  weights = G if kind in ("grouped", "masked") else 1
  moved = M * K * (matrices if kind == "masked" else 1) + weights * N * K
  moved += M * N * matrices * out_bytes
  return max(rounds * (steps * step + TILE_END[config.overlap]), moved / HBM_BYTES) + FILL


def _tiles(kind: str, M: int, N: int, K: int, out_dtype) -> list[GemmConfig]:
  """Each tile and cluster once, with as many stages as fit."""
  found = []
  raster = {"grouped": (0, 16), "masked": (0, 16), "grouped_wgrad": (1, 1024)}.get(kind, (1, 8))
  for rows, warpgroups in ((64, 1), (64, 2), (128, 2)):
    for tile_n in range(16, 257, 16):
      for cluster in (None, "m", "n"):
        config = GemmConfig(rows, tile_n, warpgroups, 2, cluster, *raster)
        if legal(config, kind, M, N, K, out_dtype):
          continue
        fits = (s for s in range(16, 2, -1) if not legal(
            dataclasses.replace(config, stages=s), kind, M, N, K, out_dtype))
        stages = next(fits, 0)
        if stages:
          found.append(dataclasses.replace(config, stages=stages))
  return found


def candidates(kind: str, M: int, N: int, K: int, G: int = 1, out_dtype=jnp.bfloat16
               ) -> list[GemmConfig]:
  """What a tuner should time, at most 40, the model's favourite first: arguments as `clocks`."""
  cost = lambda c: (clocks(c, kind, M, N, K, G, out_dtype), c.tile_m * c.tile_n)
  best = sorted(_tiles(kind, M, N, K, out_dtype), key=cost)[:10]
  rasters = ((1, 8), (0, 8), (0, 16), (1, 1024))
  found = list(best)
  for config in best[:8]:
    found += [dataclasses.replace(config, raster_minor=minor, raster_width=width)
              for minor, width in rasters]
  for config in best[:3]:
    found += [dataclasses.replace(config, overlap=False),
              dataclasses.replace(config, stages=config.stages - 1)]
  found = list(dict.fromkeys(found))
  return [c for c in found if not legal(c, kind, M, N, K, out_dtype)][:40]


@functools.cache
def heuristic(kind: str, M: int, N: int, K: int, G: int = 1, out_dtype=jnp.bfloat16) -> GemmConfig:
  """The model's choice; arguments as `clocks`."""
  return candidates(kind, M, N, K, G, out_dtype)[0]
