"""The cost model against the clock: a training step predicted from its config, and measured.

    python -m benchmarks.cost                     this CPU: tiny and train_step's shapes, fp32
    python -m benchmarks.cost --only tiny
    python -m benchmarks.cost --gpu v3.json       a step on a GPU, as benchmarks.gpu_train wrote it

On the CPU, what is predicted with and what is predicted take turns: numpy's matmul and copy, as
`--hardware=cpu` measures them, and then a step; the ratio is the median of the pairs'. There the
model counts matmuls at the cores' best rate and other work at copying speed. It knows nothing of
small matmuls' lower rate, of experts' padding, of loops and of other programs, so that it predicts
too little: the ratio, measured over predicted, says how much. results/train_step.json, from a quiet
machine, gives 1.2 to 1.6 (tests/cost/test_report.py).

For a GPU no measurement is kept yet: `make gpu` on one H100 writes the files that --gpu reads.
"""

import json
import pathlib
import statistics

from benchmarks import common
from dsv3_jax import config, cost
from dsv3_jax.cost import hardware

SETTLED = 3.0  # a prediction this near is of use for planning


def arms() -> dict[str, config.Config]:
  """Names and configs: the tiny experiment, and train_step's shapes a and b, without MTP."""
  from benchmarks import train_step
  from experiments import tiny

  found = {"tiny": tiny.get_config()}
  for shape in train_step.SHAPES:
    found[shape] = config.replace(
        tiny.get_config(), model=train_step.model_config(shape))
  return found


def stepper(cfg: config.Config):
  """One training step of random tokens, as the trainer compiles it."""
  import jax
  import numpy as np

  from dsv3_jax import host
  from dsv3_jax.train import optim, state, step

  host.keep_memory()
  optimizer = optim.make_optimizer(cfg.optim)
  graphdef, _, init = state.initializer(lambda: state.build_model(cfg.model, 0), optimizer)
  train_step = step.make_train_step(graphdef, cfg, optimizer)
  hyper = state.Hyper(lr=np.float32(1e-4), bias_speed=np.float32(1e-3),
                      mtp_weight=np.float32(0.3))
  rng = np.random.default_rng(0)
  shape = (1, cfg.data.batch_size, cfg.data.sequence_length + 1)
  held = {"state": init()}

  def run() -> None:
    tokens = rng.integers(0, cfg.model.vocab_size, shape, dtype=np.int32)
    held["state"], _ = train_step(held["state"], {"tokens": tokens}, hyper)
    jax.block_until_ready(held["state"])

  return run


def on_cpu(name: str, cfg: config.Config, rounds: int) -> common.Line:
  """Predicted and measured, turn by turn."""
  rates, predicted = [], []

  def predict() -> None:
    rates.append(hardware.measure_cpu())
    predicted.append(cost.estimate(cfg, rates[-1]).step)

  run = stepper(cfg)
  times = common.alternate({"predict": predict, "step": run}, rounds)["step"]
  predicted = predicted[-rounds:]
  ratio = common.paired(times, predicted)
  best = max(rates, key=lambda hw: hw.fp32)
  return common.Line(
      name, f"predicted {common.times_text(predicted)}", f"measured {common.times_text(times)}",
      ratio, f"measured over predicted within {SETTLED:g}", ratio <= SETTLED,
      {"pairs": [list(p) for p in zip(predicted, times, strict=True)],
       "fp32_flops_per_s": statistics.median(hw.fp32 for hw in rates[-rounds:]),
       "bytes_per_s": statistics.median(hw.bandwidth for hw in rates[-rounds:]),
       "best_fp32_flops_per_s": best.fp32})


def on_gpu(path: pathlib.Path, name: str) -> common.Line:
  """A file of benchmarks.gpu_train against the prediction for the same arm."""
  from experiments import h100_moe

  measured = json.loads(path.read_text(encoding="utf-8"))
  seconds = measured["tokens_a_step"] / measured["tokens_per_s"]
  cfg = h100_moe.get_config(measured["arm"])
  predicted = cost.estimate(cfg, hardware.get(name)).step
  return common.Line(
      f"h100_moe {measured['arm']} on {name}", f"predicted {common.seconds(predicted)}",
      f"measured {common.seconds(seconds)}", seconds / predicted,
      f"measured over predicted within {SETTLED:g}", seconds / predicted <= SETTLED,
      {"predicted_s": predicted, "measured_s": seconds})


def main(argv: list[str] | None = None) -> None:
  parser = common.parser(__doc__, rounds=7)
  parser.add_argument("--only", nargs="+", choices=("tiny", "a", "b"), default=("tiny", "a", "b"),
                      help="which models")
  parser.add_argument("--gpu", type=pathlib.Path, metavar="FILE",
                      help="JSON of benchmarks.gpu_train in place of measuring this CPU")
  parser.add_argument("--hardware", default="h100", metavar="NAME",
                      help="the GPU that --gpu was measured on (default: %(default)s)")
  args = parser.parse_args(argv)
  if args.gpu:
    common.report("cost_gpu", [on_gpu(args.gpu, args.hardware)], args.save)
    return
  common.report("cost", [on_cpu(name, cfg, args.rounds) for name, cfg in arms().items()
                         if name in args.only], args.save)


if __name__ == "__main__":
  main()
