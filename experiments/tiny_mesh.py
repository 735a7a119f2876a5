"""Does all of the parallelism work together, on one machine?  (report 3.1 to 3.3, small)

The tiny model as a cluster would run it: a DualPipeV pipeline of 2 ranks; experts over 2 nodes of 2
devices with two-hop dispatch, and the vocabulary over them too; FP8 recipe v3, payloads included;
ZeRO-1. Changing runtime.mesh alone moves the same run to 1, 2, 4 or 8 devices.

Run:      XLA_FLAGS=--xla_force_host_platform_device_count=8 \\
            dsv3 train --config=experiments/tiny_mesh.py
Arg:      smoke   8 steps in place of 40
Cost:     minutes on 2 CPU cores that play 8 devices, most of them compiling the step
Expected: the losses of the same run on one device (LOG.md), to FP8's rounding
"""

from dsv3_jax.config import (
  Config,
  ConfigError,
  Data,
  Dispatch,
  Loss,
  Mesh,
  Model,
  Optim,
  Pipeline,
  Runtime,
  Train,
)


def get_config(arg: str | None = None) -> Config:
  """The run on eight devices; `arg` may be "smoke"."""
  steps = {None: 40, "smoke": 8}
  if arg not in steps:
    raise ConfigError(f"experiments/tiny_mesh.py:{arg}: the only argument is smoke")
  return Config(
      model=Model(init_std=0.02),
      runtime=Runtime(
          mesh=Mesh(pipe=2, node=2, gpu=2), pipeline=Pipeline(schedule="dualpipe_v"),
          dispatch=Dispatch(form="two_hop"), shard_vocab=True, zero=1, recipe="v3",
          compute_dtype="bfloat16"),
      optim=Optim(lr=2e-3, warmup_steps=5),
      loss=Loss(bias_speed=5e-3),
      data=Data(sequence_length=128, batch_size=16, microbatch=4),
      train=Train(tokens=steps[arg] * 16 * 128, eval_every=steps[arg], eval_batches=2,
                  checkpoint_every=steps[arg] // 2, sample_tokens=16))
