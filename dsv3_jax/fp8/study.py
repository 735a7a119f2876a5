"""How the width of the accumulator and the promotion interval change an FP8 GEMM (report 3.5.2).

The report finds "nearly 2 %" maximum relative error for two random matrices with K = 4096 at 14
bits, and says neither how the matrices are drawn nor what the error is relative to. So all of it
is measured: draws, directions of cutting, and four definitions of the error.

Everything here returns plain numbers; `analysis.numerics` makes the table and the plot.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dsv3_jax.fp8 import accumulate, formats, quantize

BITS = (10, 12, 14, 16, 18)
INTERVALS = (32, 128, 512, 2048, 0)  # 0: none
SIZES = (1024, 4096, 16384)
WIDTHS = tuple(range(10, accumulate.MAX_BITS + 1, 2))
DRAWS: dict[str, Callable[..., np.ndarray]] = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "uniform -1..1": lambda rng, shape: rng.uniform(-1, 1, shape),
    "uniform 0..1": lambda rng, shape: rng.uniform(0, 1, shape),
}
ROWS = 128  # and columns of the products of the grid
REPORT_ROWS = 512  # of those at K = 4096: a maximum over more outputs is larger


def codes(draw: str, shape: tuple[int, int], seed: int) -> np.ndarray:
  """A random matrix as E4M3 codes, fp32 [*shape]; its largest magnitude is E4M3's, 448.

  Args:
    draw: a key of `DRAWS`; or "codes", where each of the 253 finite values that E4M3 has is as
      likely as any other, which spreads exponents as far as they go.
  """
  rng = np.random.default_rng(seed)
  if draw == "codes":
    found = np.asarray(formats.decode(np.arange(256, dtype=np.uint8).view("float8_e4m3fn"),
                                      formats.E4M3, 256))
    return rng.choice(np.unique(found[np.isfinite(found)]), shape).astype(np.float32)
  x = DRAWS[draw](rng, shape).astype(np.float32)
  return np.asarray(quantize.quantize(x, formats.E4M3, None).decoded())


def errors(y: np.ndarray, exact: np.ndarray) -> dict[str, float]:
  """An emulated product against the exact product of the same codes, by four definitions.

  Returns:
    max_over_rms: largest error over the root mean square of the exact product; max_over_max: over
    its largest element; norm: Frobenius norms of error and product; max_of_ratios: the largest of
    the elements' own relative errors, which cancellation makes as large as one likes.
  """
  error = np.abs(np.asarray(y, np.float64) - exact)
  nonzero = exact != 0
  return {"max_over_rms": float(error.max() / np.sqrt(np.mean(exact**2))),
          "max_over_max": float(error.max() / np.abs(exact).max()),
          "norm": float(np.linalg.norm(error) / np.linalg.norm(exact)),
          "max_of_ratios": float((error[nonzero] / np.abs(exact[nonzero])).max())}


def exact_sums(a_SK: np.ndarray, b_SK: np.ndarray, bits: int) -> dict[str, float]:
  """How well one MMA step adds the products of each row.

  Returns:
    share: of the sums that equal the true one cut to fp32; max_error: the largest error over the
    row's largest product.
  """
  products_SK = a_SK.astype(np.float64) * b_SK
  true_S = products_SK.sum(1)  # exact: multiples of 2^-18 below 2^23
  unit_S = 2.0**(np.floor(np.log2(np.maximum(np.abs(true_S), 2.0**-18))) - 23)
  cut_S = np.trunc(true_S / unit_S) * unit_S
  found_S = np.asarray(accumulate.sum_of_step(a_SK, b_SK, bits), np.float64)
  error_S = np.abs(found_S - cut_S) / np.maximum(np.abs(products_SK).max(1), 2.0**-18)
  return {"share": float(np.mean(found_S == cut_S)), "max_error": float(error_S.max())}


@functools.partial(jax.jit, static_argnames=("interval", "bits", "truncation"))
def _matmul(a_MK, b_KN, interval, bits, truncation="zero"):
  return accumulate.matmul(a_MK, b_KN, interval=interval, bits=bits, truncation=truncation)


def accumulation(bits: Sequence[int] = BITS, intervals: Sequence[int] = INTERVALS,
                 sizes: Sequence[int] = SIZES, rows: int = ROWS,
               report_rows: int = REPORT_ROWS, seed: int = 0,
                 say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
  """The whole study as JSON values.

  Args:
    bits, intervals, sizes: what the grid spans; an interval of K or more is none (0).
    rows: M and N of the grid's products.
    report_rows: M and N of the products at K = 4096.
    seed: of the matrices.
    say: told about progress.

  Returns:
    grid: errors of normal matrices for each K, interval and width.
    report: errors at K = 4096 and 14 bits without promotion and with N_C = 128, for each draw and
      direction of cutting.
    exact: for each width, the share of sums of 32 products that come out exact, and their largest
      error over the largest product: normal matrices, and all codes equally likely.
  """
  def product(draw: str, K: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b = codes(draw, (rows, K), seed), codes(draw, (K, rows), seed + 1)
    return a, b, a.astype(np.float64) @ b.astype(np.float64)

  grid, report, exact = [], [], []
  for K in sizes:
    a, b, true = product("normal", K, rows)
    for interval in sorted({0 if i >= K else i for i in intervals}, key=lambda i: i or K):
      say(f"K {K}, promotion every {interval or 'never'}")
      for width in bits:
        y = _matmul(a, b, interval, width)
        grid.append({"K": K, "interval": interval, "bits": width, **errors(y, true)})
  for draw in DRAWS:
    say(f"draw {draw}")
    a, b, true = product(draw, 4096, report_rows)
    for truncation in accumulate.TRUNCATIONS:
      for interval in (0, 128):
        y = _matmul(a, b, interval, accumulate.HOPPER_BITS, truncation)
        report.append({"draw": draw, "truncation": truncation, "K": 4096, "interval": interval,
                       "bits": accumulate.HOPPER_BITS, **errors(y, true)})
  for draw in ("normal", "codes"):
    pair = [codes(draw, (ROWS**2, accumulate.STEP), seed + i) for i in (2, 3)]
    exact += [{"draw": draw, "bits": width, **exact_sums(*pair, width)} for width in WIDTHS]
  return {"study": "accumulation", "rows": rows, "report_rows": report_rows, "seed": seed,
          "grid": grid, "report": report, "exact": exact}
