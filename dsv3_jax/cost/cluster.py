"""The same run on another number of devices, and the report's own plan."""

from dsv3_jax import config
from dsv3_jax.config import Config, ConfigError


def on(cfg: Config, devices: int) -> Config:
  """`cfg` on so many devices: more or fewer data-parallel parts, the other mesh axes as they are.

  A device keeps its sequences of a micro-batch, as far as the batch allows; so there are fewer
  micro-batches, the more devices.

  Raises:
    ConfigError: the number is no multiple of the other axes' product, or exceeds what the batch can
      be cut into.
  """
  mesh, data = cfg.runtime.mesh, cfg.data
  part = mesh.devices // mesh.data
  if devices < 1 or devices % part:
    raise ConfigError(f"--gpus={devices} is no multiple of the {part} devices of "
                      f"{mesh.describe('pipe', 'node', 'gpu')}; change those, or take "
                      f"{max(devices // part, 1) * part}")
  shards = devices // mesh.pipe
  held = (data.microbatch or data.batch_size) // mesh.batch_shards
  sizes = {data.batch_size, data.batch_start or data.batch_size}
  held = next((h for h in range(held, 0, -1) if all(s % (h * shards) == 0 for s in sizes)), 0)
  if not held:
    # The ramp's start may be too small for so many; the full batch is what counts here.
    sizes = {data.batch_size}
    held = next((h for h in range(max(held, 1), 0, -1)
                 if data.batch_size % (h * shards) == 0), 0)
  if not held:
    raise ConfigError(f"--gpus={devices}: {shards} devices share each of data.batch_size="
                      f"{data.batch_size} sequences' micro-batches, which that does not divide; "
                      "choose a divisor, or another batch")
  start = data.batch_start if data.batch_start in sizes else 0
  return config.replace(cfg, **{
      "runtime.mesh.data": devices // part, "data.microbatch": held * shards,
      "data.batch_start": start})


def reported() -> Config:
  """The report's model and plan: 2,048 GPUs, DualPipe, a sequence a GPU and micro-batch.

  Not published, and so assumed: four layers a stage, as the trace's chunks hold, which leaves the
  last of 16 stages one layer, MTP and both heads; whole embedding and head where they are used.
  Their all-to-alls send what is needed, no padded buffers. Nothing else comes from a run's config,
  so that what is compared with the report does not change with it.
  """
  return Config(
      model=config.preset("v3_671b"),
      runtime=config.Runtime(
          compute_dtype="bfloat16", recipe="v3", remat="report", zero=1,
          mesh=config.Mesh(pipe=16, data=2, node=8, gpu=8),
          pipeline=config.Pipeline("dualpipe", (4,) * 15 + (1,)),
          dispatch=config.Dispatch(transport="ragged")),
      optim=config.Optim(mu_dtype="bfloat16", nu_dtype="bfloat16", ema_decay=0.999),
      data=config.Data(sequence_length=4096, batch_size=15360, batch_start=3072, microbatch=128),
      train=config.Train(tokens=config.REPORT_TOKENS))
