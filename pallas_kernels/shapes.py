"""The shapes that kernels are tuned and measured on: DeepSeek-V3's own, in the tables of DeepGEMM.

`published` is what DeepGEMM's README (dense, grouped, masked; commit 327ec92) and its pull request
95 (Wgrad) give in TFLOP/s on an H800, whose tensor cores are an H100's: the numbers to pass.
"""

import dataclasses

KINDS = ("dense", "grouped", "masked", "wgrad", "grouped_wgrad")


@dataclasses.dataclass(frozen=True)
class Gemm:
  """A matmul `[m, k] @ [n, k]^T`, `groups` times.

  Attributes:
    kind: dense (activations by a weight: Fprop and Dgrad), grouped (rows sorted by expert),
      masked (as grouped, for decoding: few rows an expert), wgrad (both operands scaled along
      k, which are tokens), grouped_wgrad (tokens sorted by expert).
    m, n, k: of one group.
    groups: experts.
    published: TFLOP/s to pass; 0: none is known.
  """

  kind: str
  m: int
  n: int
  k: int
  groups: int = 1
  published: float = 0.0

  @property
  def name(self) -> str:
    groups = f"{self.groups}x" if self.kind not in ("dense", "wgrad") else ""
    return f"{self.kind} {groups}{self.m}x{self.n}x{self.k}"

  @property
  def flops(self) -> float:
    return 2.0 * self.groups * self.m * self.n * self.k

  @property
  def bytes(self) -> float:
    """Each operand read once and the result written once: bf16, or fp32 where it is a gradient."""
    out = 4 if self.kind in ("wgrad", "grouped_wgrad") else 2
    scales = 4 / 128
    a = self.m * self.k * (1 + scales)
    b = self.n * self.k * (1 + (scales if out == 4 else scales / 128))
    return float(self.groups * (a + b + out * self.m * self.n))


_WIDTHS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))


def _dense(m: int, published: tuple[float, ...]) -> tuple[Gemm, ...]:
  return tuple(Gemm("dense", m, n, k, published=p)
               for (n, k), p in zip(_WIDTHS, published, strict=True))


def _experts(kind: str, sizes: dict[tuple[int, int], tuple[float, float]]) -> tuple[Gemm, ...]:
  return tuple(Gemm(kind, m, n, k, groups, p) for (groups, m), both in sizes.items()
               for (n, k), p in zip(_WIDTHS[-2:], both, strict=True))


DENSE = _dense(4096, (1127, 1212, 775, 1520, 1410, 1168))
DECODE = _dense(128, (352, 535, 358, 645, 533, 510))
GROUPED = _experts("grouped", {(4, 8192): (1346, 1214), (8, 4096): (1346, 1214)})
MASKED = _experts("masked", {(1, 1024): (1233, 925), (2, 512): (1040, 916), (4, 256): (932, 815)})
# The weight gradient: m and n are the weight's widths, k the tokens.
WGRAD = tuple(Gemm("wgrad", m, n, 4096, published=p)
              for m, n, p in ((7168, 2112, 920), (1536, 24576, 986), (512, 32768, 878),
                              (16384, 7168, 994), (7168, 4096, 942), (2048, 7168, 920)))
GROUPED_WGRAD = (Gemm("grouped_wgrad", 7168, 4096, 4096, 4, 939),
                 Gemm("grouped_wgrad", 2048, 7168, 4096, 4, 900))
GEMMS = DENSE + DECODE + GROUPED + MASKED + WGRAD + GROUPED_WGRAD


@dataclasses.dataclass(frozen=True)
class Decode:
  """MLA decoding over the latent cache: `batch` sequences of `context` cached tokens."""

  batch: int
  context: int
  heads: int = 128
  queries: int = 1  # tokens a step (2 with one speculated)

  @property
  def name(self) -> str:
    return f"mla_decode {self.batch}x{self.heads}x{self.context}"

  @property
  def flops(self) -> float:
    return 2.0 * self.batch * self.queries * self.heads * self.context * (576 + 512)

  def bytes(self, record: int) -> float:
    """The cache read once (`record` bytes a token), queries and outputs in bf16."""
    return float(self.batch * (self.context * record
                               + self.queries * self.heads * 2 * (576 + 512)))


DECODES = (Decode(128, 4096), Decode(32, 16384), Decode(128, 4096, heads=16))
ROWS = ((4096, 7168), (4096, 2048), (32768, 7168), (128, 7168))  # to quantize: tokens, width
WEIGHTS = ((7168, 2048), (4096, 7168))
SWIGLU = ((4096, 2048), (32768, 2048))  # tokens, F


@dataclasses.dataclass(frozen=True)
class Limits:
  """A device's data sheet: dense FP8 and bf16 FLOP/s, bytes/s of memory."""

  fp8: float
  bf16: float
  memory: float


LIMITS = {"H100": Limits(1979e12, 989.4e12, 3.35e12), "H200": Limits(1979e12, 989.4e12, 4.8e12),
          "H800": Limits(1979e12, 989.4e12, 3.35e12)}


def limits(device: str) -> Limits | None:
  """Of the device whose name contains a known one; None for others."""
  return next((v for k, v in LIMITS.items() if k in device), None)
