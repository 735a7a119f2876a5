"""The same run on another number of devices, and the report's own plan."""

from dsv3_jax import config
from dsv3_jax.config import Config, ConfigError
from dsv3_jax.cost import arrays


def on(cfg: Config, devices: int) -> Config:
  """`cfg` on so many devices: more or fewer data-parallel parts, the other mesh axes as they are.

  A device keeps its sequences of a micro-batch, as far as the batch divides; so there are fewer
  micro-batches, the more devices. A ramp begins with whole micro-batches. `notes` says what else
  than the mesh and the micro-batch is not as it was.

  Raises:
    ConfigError: the number is no multiple of the other axes' product, or exceeds what the batch can
      be cut into; or sequences are cut over devices.
  """
  arrays.check(cfg.runtime)
  mesh, data = cfg.runtime.mesh, cfg.data
  part = mesh.devices // mesh.data
  if devices < 1 or devices % part:
    raise ConfigError(f"--gpus={devices} is no multiple of the {part} devices of "
                      f"{mesh.describe('pipe', 'node', 'gpu')}; change those, or take "
                      f"{max(devices // part, 1) * part}")
  shards = devices // mesh.pipe
  held = data.micro_batch // mesh.batch_shards
  held = next((h for h in range(held, 0, -1) if data.batch_size % (h * shards) == 0), 0)
  if not held:
    raise ConfigError(f"--gpus={devices}: {shards} devices share each of data.batch_size="
                      f"{data.batch_size} sequences' micro-batches, which that does not divide; "
                      "choose a divisor, or another batch")
  micro = held * shards
  start = -(-data.batch_start // micro) * micro
  return config.replace(cfg, **{
      "runtime.mesh.data": devices // part, "data.microbatch": micro,
      "data.batch_start": start if start < data.batch_size else 0})


def notes(before: Config, after: Config) -> list[str]:
  """What `on` changed besides the number of devices, for people."""
  found = []
  held = [c.data.micro_batch // c.runtime.mesh.batch_shards
          for c in (before, after)]
  if held[0] != held[1]:
    found.append(f"{held[1]} sequence(s) of a micro-batch on a device, not {held[0]}: the batch of "
                 f"{after.data.batch_size} does not divide otherwise")
  old, new = before.data.batch_start, after.data.batch_start
  if old != new:
    found.append(f"batches begin at {new or after.data.batch_size} sequences, not at {old}: a "
                 f"micro-batch has {after.data.microbatch}")
  return found


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
