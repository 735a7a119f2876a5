"""Seconds of a kernel on a device, from its FLOPs and bytes."""

import collections
from collections.abc import Iterable

from dsv3_jax.cost.hardware import Hardware
from dsv3_jax.cost.operations import TILE, Kernel

PHASES = ("F", "I", "W")


def seconds(kernel: Kernel, hw: Hardware) -> float:
  """Time of one kernel while `hw.comm_sms` processors move data.

  A matmul takes its main loop and then what its results take to memory, and at least what its
  operands take from it. An attention kernel takes its FLOPs, a stream its bytes.
  """
  shares = hw.shares
  if (kernel.cast == "row" and hw.fused_cast) or (kernel.cast == "column" and hw.transposed_reads):
    return 0.0
  if kernel.kind == "matmul":
    loop = kernel.flops / (hw.peak(kernel.precision) * shares.matmul * hw.compute_share)
    if kernel.precision == "fp8" and hw.native_scales:
      loop = max(loop - promotion(kernel, hw),
                 kernel.flops / (hw.peak("fp8") * hw.compute_share))
    moved = (kernel.read + kernel.written) / (hw.bandwidth * shares.operands)
    return max(loop + kernel.written / (hw.bandwidth * shares.output), moved)
  if kernel.kind.startswith("attention"):
    return kernel.flops / (hw.peak(kernel.precision) * getattr(shares, kernel.kind)
                           * hw.compute_share)
  return (kernel.read + kernel.written) / (hw.bandwidth * getattr(shares, kernel.kind))


def promotion(kernel: Kernel, hw: Hardware) -> float:
  """Seconds that an FP8 matmul's partial sums take outside the matrix units, if nothing hides them.

  One multiply-add an output and 128 values of K: a 128th of the FLOPs, at the vector units' rate.
  The kernels hide some of it behind another warpgroup's matmuls, so this is the most that native
  scaling can save.
  """
  return kernel.flops / TILE / (hw.vector * hw.compute_share) if hw.vector else 0.0


def by_phase(kernels: Iterable[Kernel], hw: Hardware) -> dict[str, float]:
  """{"F", "I", "W"}: seconds of a list of kernels, one after another."""
  total = dict.fromkeys(PHASES, 0.0)
  for kernel in kernels:
    total[kernel.phase] += seconds(kernel, hw)
  return total


def by_class(kernels: Iterable[Kernel], hw: Hardware) -> dict[str, float]:
  """Seconds of the kernels by what they are, as the profile trace is summed up."""
  total: dict[str, float] = collections.Counter()
  for k in kernels:
    if k.kind == "matmul":
      name = "Wgrad GEMMs" if k.phase == "W" else (
          "grouped GEMMs" if k.component == "routed" else "other GEMMs")
    else:
      name = {"cast": "casts, transposes", "stream": "other streams"}.get(k.kind, "attention core")
    total[name] += seconds(k, hw)
  return dict(total)


def flops(kernels: Iterable[Kernel], recomputed: bool = False) -> dict[str, float]:
  """Useful FLOPs by component; or those of recomputation."""
  total: dict[str, float] = collections.Counter()
  for k in kernels:
    if k.recomputed == recomputed and k.flops:
      total[k.component] += k.flops
  return dict(total)
