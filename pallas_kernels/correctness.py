"""Runs every kernel on the hardware against its reference: `python -m pallas_kernels.correctness`.

Fresh random data each time (the seed is printed and can be given), sizes with tails, empty and hot
groups, unused blocks, ragged contexts; see `checks` for what counts as right. `--dry` interprets a
few small cases on any machine. The status is 1 where a kernel is wrong, 2 where there is no GPU.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import cases, shapes
from pallas_kernels import checks as make
from pallas_kernels.mosaic import config as config_lib

TOLERANCE = 2e-3  # of a GEMM's sum: the tensor core adds in 14 bits, 128 values at a time


@dataclasses.dataclass(frozen=True)
class Check:
  """One call: `run(rng, **how)` gives its error, at most `tolerance` where right."""

  name: str
  run: Callable[..., float]
  tolerance: float = TOLERANCE
  dry: bool = False  # small enough for the interpreter


def checks() -> list[Check]:
  """Every kernel; each tile and cluster of the GEMM that a tuner would try on one shape."""
  found = [
      Check("gemm 128x128x256", make.dense(128, 128, 256, cases.TINY), dry=True),
      Check("gemm tails 200x328x400", make.dense(200, 328, 400)),
      Check("gemm one row", make.dense(1, 256, 256)),
      Check("gemm 2112 columns, fp32", make.dense(130, 2112, 640, out_dtype=jnp.float32)),
      Check("gemm interval 32", make.dense(256, 256, 512, interval=32)),
      Check("wgrad 128x128x256", make.wgrad(128, 128, 256, cases.TINY), dry=True),
      Check("wgrad tails, accumulated", make.wgrad(328, 200, 400, accumulate=True)),
      Check("grouped", make.grouped(8, 24, 384, 512)),
      Check("grouped, small", make.grouped(2, 3, 128, 128, cases.TINY), dry=True),
      Check("grouped wgrad", make.grouped_wgrad(6, 16, 256, 384)),
      Check("masked", make.masked(5, 300, 384, 512)),
  ]
  for kind, function in (("dense", make.dense), ("wgrad", make.wgrad)):
    sizes = 1024, 768, 512
    seen = {(c.tile_m, c.rows, c.tile_n, c.cluster): c for c in
            config_lib.candidates(kind, *sizes, 1, cases.out_dtype(kind))}
    found += [Check(f"{kind} {config}", function(*sizes, config)) for config in seen.values()]
  found += [Check(f"real {s.name}", make.real(s)) for s in shapes.GEMMS]
  for name in ("rows", "columns", "both"):
    found += [Check(f"quantize {name} {M}x{K}{' pow2' * pow2}",
                    make.quantized(name, M, K, pow2), 1.0, dry=name == "rows" and M == 128)
              for M, K, pow2 in ((128, 256, False), (1000, 2080, False), (384, 512, True))]
  found += [
      Check("quantize turn 300x544", make.turned(300, 544), 1.0),
      Check("quantize blocks", make.weights(2, 288, 416, False), 1.0),
      Check("quantize blocks pow2", make.weights(1, 256, 384, True), 1.0),
      Check("swiglu", make.gated(333, 544), 1.0),
      Check("swiglu backward from bf16", make.gated(300, 544, "bf16"), 1.0),
      Check("swiglu backward from codes", make.gated(256, 512, "codes"), 1.0),
  ]
  for records in (False, True):
    kind = "records" if records else "bf16"
    found += [Check(f"decode {kind} {T} queries {H} heads, {splits or 'chosen'} splits",
                    make.decoded(B, T, H, pages, records, splits), 2e-2)
              for B, T, H, pages, splits in (
                  (5, 1, 128, 9, 0), (3, 2, 16, 5, 3), (2, 1, 128, 4, 1))]
  return found


def main(argv: list[str] | None = None) -> int:
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("--only", nargs="+", default=[], metavar="TEXT",
                 help="checks whose name contains one of these")
  p.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="default: the time's")
  p.add_argument("--json", type=pathlib.Path)
  p.add_argument("--dry", action="store_true")
  args = p.parse_args(argv)
  if args.dry:
    jax.config.update("jax_platforms", "cpu")
    how = dict(num_sms=2, interpret=True)
  elif jax.default_backend() != "gpu":
    print("correctness: no GPU: nothing was run (--dry interprets a few small cases)")
    return 2
  else:
    how = dict(num_sms=jax.devices()[0].core_count, interpret=False)
  print(f"seed {args.seed}")
  found = []
  for check in checks():
    if (args.dry and not check.dry) or (
        args.only and not any(text in check.name for text in args.only)):
      continue
    off, note = float("nan"), ""
    try:
      off = check.run(np.random.default_rng(args.seed), **how)
    except Exception as problem:  # the other kernels' verdicts are wanted too
      note = f"{type(problem).__name__}: {str(problem)[:300]}"
    ok = off <= check.tolerance
    found.append({"name": check.name, "error": off if np.isfinite(off) else str(off), "ok": ok,
                  "tolerance": check.tolerance, "note": note})
    print(f"{'ok   ' if ok else 'WRONG'} {check.name}: {off:.2g} {note}", flush=True)
    if args.json:
      args.json.write_text(json.dumps({
          "device": jax.devices()[0].device_kind, "jax": jax.__version__, "seed": args.seed,
          "dry": args.dry, "checks": found}, indent=1) + "\n")
  wrong = [c["name"] for c in found if not c["ok"]]
  print(f"{len(found) - len(wrong)} of {len(found)} right")
  return int(bool(wrong) or not found)


if __name__ == "__main__":
  sys.exit(main())
