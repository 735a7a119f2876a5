"""Checkpoints with Orbax: asynchronous, atomic, verified, independent of the mesh.

    workdir/checkpoints/00000200/arrays/...        Orbax: params, buffers, optimizer, ema
                                 checkpoint.json   step, tokens, config, data-iterator state,
                                                   validation loss, size and CRC-32 of each file

Arrays are saved under their parameter paths and global shapes; restoring gives them the
shardings asked for, whatever mesh wrote them. A save goes to `00000200.tmp` and is renamed when
complete, so a folder with a plain number is a whole checkpoint unless its disk failed, which the
sizes and sums tell. Saving blocks the training thread only to hand over a copy of the state.

Several processes write and read their own parts of the arrays, on a file system that all share; all
else, the sums and the rename included, is process 0's. Orbax compares paths with a collective and
meets at barriers, so there a save begins in the training thread, at the same step everywhere.

Local file systems (or mounted ones) only: the atomic rename is the file system's.
"""

import concurrent.futures
import json
import os
import shutil
import warnings
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from dsv3_jax import files
from dsv3_jax.parallel import hosts
from dsv3_jax.train import processes
from dsv3_jax.train.ema import snapshot
from dsv3_jax.train.state import TrainState

_SIDECAR = "checkpoint.json"
_DAMAGED = ".damaged"


class CheckpointError(RuntimeError):
  """A checkpoint that could not be written or read; earlier ones are untouched."""


class Restored(NamedTuple):
  state: TrainState
  ema: Any  # the averaged parameters, or None
  meta: dict[str, Any]


# --- trees on disk --------------------------------------------------------------------------------


def _key(entry: Any) -> str:
  for name in ("key", "name", "idx"):
    if hasattr(entry, name):
      return str(getattr(entry, name))
  return str(entry)


def flatten(tree: Any) -> dict[str, Any]:
  """A pytree as {"a/b/w_DD": leaf}: what is on disk does not know our container types."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {"/".join(map(_key, path)): leaf for path, leaf in paths}


def unflatten(flat: dict[str, Any], like: Any) -> Any:
  """Inverse of `flatten`, with the structure of `like`."""
  return jax.tree.unflatten(jax.tree.structure(like), [flat[k] for k in flatten(like)])


def nest(flat: dict[str, Any]) -> dict[str, Any]:
  """{"a/b": x} as nested dictionaries."""
  tree: dict[str, Any] = {}
  for key, leaf in flat.items():
    *parents, last = key.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _parts(state: TrainState) -> dict[str, Any]:
  """The state in the units that a reader may want apart; Orbax takes no empty one."""
  counters = {"step": state.step, "bad_steps": state.bad_steps, "skipped": state.skipped}
  parts = {"params": flatten(state.params), "buffers": flatten(state.buffers),
           "optimizer": flatten({"state": state.opt_state, **counters})}
  parts |= {} if state.amax is None else {"amax": flatten(state.amax)}
  return {name: part for name, part in parts.items() if part}


# --- files ----------------------------------------------------------------------------------------


def _files(folder: str) -> list[str]:
  return sorted(os.path.relpath(os.path.join(root, name), folder)
                for root, _, names in os.walk(folder) for name in names if name != _SIDECAR)


def _crc(path: str) -> int:
  value = 0
  with open(path, "rb") as f:
    while block := f.read(1 << 22):
      value = zlib.crc32(block, value)
  return value


def _inventory(folder: str) -> dict[str, list[int]]:
  paths = {name: os.path.join(folder, name) for name in _files(folder)}
  return {name: [os.path.getsize(path), _crc(path)] for name, path in paths.items()}


def _damage(folder: str, meta: dict[str, Any]) -> str | None:
  """What is wrong with a checkpoint's files, or None."""
  for name, (size, crc) in meta["files"].items():
    path = os.path.join(folder, name)
    if not os.path.exists(path):
      return f"{name} is missing"
    if os.path.getsize(path) != size:
      return f"{name} has {os.path.getsize(path)} bytes instead of {size}"
    if _crc(path) != crc:
      return f"{name} has changed since it was written"
  return None


def _read_sidecar(folder: str) -> dict[str, Any]:
  with open(os.path.join(folder, _SIDECAR)) as f:
    return json.load(f)


def _steps(root: str) -> list[int]:
  if not os.path.isdir(root):
    return []
  return sorted(int(name) for name in os.listdir(root) if name.isdigit())


def _folder(root: str, step: int) -> str:
  return os.path.join(root, f"{step:08d}")


def _save_context() -> ocp.Context:
  context = ocp.Context()
  context.array.saving.use_compression = False  # fp32 weights do not compress
  # Made in the background, folders that cannot be made leave threads that wait for them for ever.
  context.asynchronous.create_directories_asynchronously = False
  # 20 minutes would end every run whose checkpoints take longer; a lost process is found elsewhere.
  context.asynchronous.timeout_secs = 24 * 3600
  return context


class Checkpoints:
  """The checkpoints of one run.

  Args:
    workdir: the run's folder.
    keep_last: newest checkpoints kept.
    keep_best: checkpoints kept for their validation loss besides.
    group: the processes that share the run; all make the same calls in the same order.
  """

  def __init__(self, workdir: str, keep_last: int = 2, keep_best: int = 1,
               group: processes.Alone | None = None):
    self._root = os.path.join(workdir, "checkpoints")
    self._group = group or processes.Alone()
    self._keep_last = keep_last
    self._keep_best = keep_best
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: concurrent.futures.Future | None = None
    if self._group.first:
      self._clean()

  def _clean(self) -> None:
    """Makes the folder, and removes what a run left in it that was ended."""
    os.makedirs(self._root, exist_ok=True)
    unfinished = []
    for name in sorted(os.listdir(self._root)):
      if name.endswith((".tmp", ".delete")):
        unfinished += [name] if name.endswith(".tmp") else []
        shutil.rmtree(os.path.join(self._root, name), ignore_errors=True)
    if unfinished:
      latest = self.steps()[-1:]
      use = f"using step {latest[0]}" if latest else "there is no earlier one"
      warnings.warn(f"checkpoint of step {int(unfinished[-1].split('.')[0])} was not finished when "
                    f"the run ended; removed, {use}", stacklevel=2)

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, oldest first."""
    return _steps(self._root)

  # --- saving

  def save(self, state: TrainState, meta: dict[str, Any],
           ema: concurrent.futures.Future | None = None) -> None:
    """Starts a save of `state` as of `meta["step"]` and returns; `state` may be donated after.

    Args:
      state: the training state; saved with its global shapes.
      meta: JSON-able; "step" and "val_loss" (or None) are used here.
      ema: gives (tree of `hosts.parts` or None, updates).

    Raises:
      CheckpointError: this save does not fit on the disk, or the previous one failed.
    """
    self.wait()
    step = meta["step"]
    parts = _parts(state)
    temporary = _folder(self._root, step) + ".tmp"

    def start(folder: str, parts: dict[str, Any]) -> Any:
      with _save_context():
        return ocp.save_checkpointables_async(os.path.join(temporary, folder), parts)

    def start_ema() -> tuple[Any, dict[str, Any]]:
      if ema is None:
        return None, {}
      values, updates = ema.result()
      if values is not None:
        values = hosts.join(values, state.params) if self._group.count > 1 else values
        values = start("ema", {"params": flatten(values)})
      return values, {"ema_updates": updates}

    # On a CPU, host memory and device memory are one and Orbax would read buffers that the next
    # step overwrites: copy first, and hand over in the background. Elsewhere Orbax copies to the
    # host before it returns.
    on_cpu = next(iter(jax.tree.leaves(parts)[0].devices())).platform == "cpu"
    late = on_cpu and self._group.count == 1
    try:
      if self._group.first:
        self._check_room(step, parts, ema is not None)
        os.makedirs(temporary)  # a disk that takes nothing says so here
      begun = snapshot(parts) if on_cpu else parts
      begun = begun if late else start("arrays", begun)
      averaged = start_ema() if self._group.count > 1 else None
    except Exception as e:
      raise self._error(step, e) from e

    def finish() -> None:
      try:
        (start("arrays", begun) if late else begun).result()
        began, more = averaged or start_ema()
        if began is not None:
          began.result()
        if not self._group.first:
          return
        files.write_atomic(os.path.join(temporary, _SIDECAR),
                           json.dumps(meta | more | {"files": _inventory(temporary)}))
        final = _folder(self._root, step)
        if os.path.exists(final):
          self._delete(step)
        os.replace(temporary, final)
        self._retain()
      except BaseException as e:
        if self._group.count == 1:  # others may still be writing
          shutil.rmtree(temporary, ignore_errors=True)
        raise self._error(step, e) from e

    self._pending = self._pool.submit(finish)

  def _check_room(self, step: int, parts: dict[str, Any], ema: bool) -> None:
    needed = sum(x.nbytes for x in jax.tree.leaves(parts))
    if ema:
      needed += sum(x.nbytes for x in parts["params"].values())
    free = shutil.disk_usage(self._root).free
    if free < needed:
      raise self._error(step, f"it needs {needed / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free")

  def poll(self) -> None:
    """Raises the error of a save that has failed meanwhile; never waits."""
    if self._pending is not None and self._pending.done():
      self.wait()

  def wait(self) -> None:
    """Waits for the save in progress, and raises its error."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      pending.result()

  def close(self) -> None:
    """Waits, and ends the background thread."""
    try:
      self.wait()
    finally:
      self._pool.shutdown()

  def _error(self, step: int, reason: Any) -> CheckpointError:
    if isinstance(reason, OSError):
      reason = f"{reason.strerror or reason}"
    reason = str(reason).strip().splitlines()[-1] if str(reason).strip() else repr(reason)
    steps = self.steps()
    kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier one"
    return CheckpointError(f"could not save the checkpoint of step {step} under {self._root}: "
                           f"{reason}; {kept}. Free some space (or see to the disk), and run the "
                           "same command to go on from there.")

  def _delete(self, step: int) -> None:
    doomed = _folder(self._root, step) + ".delete"
    os.replace(_folder(self._root, step), doomed)
    shutil.rmtree(doomed, ignore_errors=True)

  def _retain(self) -> None:
    """Deletes what neither keep_last nor keep_best wants."""
    steps = self.steps()
    keep = set(steps[-self._keep_last:])
    losses = []
    for step in steps:
      try:
        loss = _read_sidecar(_folder(self._root, step)).get("val_loss")
      except (OSError, ValueError):
        continue
      if loss is not None and np.isfinite(loss):
        losses.append((loss, step))
    keep |= {step for _, step in sorted(losses)[:self._keep_best]}
    for step in steps:
      if step not in keep:
        self._delete(step)

  # --- restoring

  def restore(self, abstract: TrainState) -> Restored | None:
    """The newest checkpoint that is whole, or None where there is none at all.

    Args:
      abstract: the state as ShapeDtypeStructs with the shardings wanted.

    A checkpoint whose files are not those that were written is set aside as `NUMBER.damaged` with
    one warning that says what is wrong. An error in loading one that is whole passes through: the
    next start may succeed, so nothing is moved.

    Raises:
      CheckpointError: there are checkpoints, or were, and none is whole.
    """
    newest = self._newest() if self._group.first else None
    newest = json.loads(self._group.share("checkpoint", json.dumps(newest)))
    if newest is None:
      return None
    folder = _folder(self._root, newest)
    return self._load(folder, _read_sidecar(folder), abstract)

  def _newest(self) -> int | None:
    """The step of the newest whole checkpoint; see `restore`."""
    for step in reversed(self.steps()):
      folder = _folder(self._root, step)
      try:
        meta = _read_sidecar(folder)
        damage = _damage(folder, meta)
      except (FileNotFoundError, ValueError, KeyError, TypeError) as e:
        damage = f"its {_SIDECAR} is not whole: {type(e).__name__}: {e}"
      if damage is None:
        return step
      earlier = [s for s in self.steps() if s < step]
      use = f"using step {earlier[-1]}" if earlier else "there is no earlier one"
      aside = folder + _DAMAGED
      shutil.rmtree(aside, ignore_errors=True)
      os.replace(folder, aside)
      warnings.warn(f"checkpoint of step {step} is damaged ({damage}); moved to {aside}, {use}",
                    stacklevel=2)
    if any(name.endswith(_DAMAGED) for name in os.listdir(self._root)):
      raise CheckpointError(f"no checkpoint under {self._root} is whole; restore one from a copy, "
                            "or give another --workdir to start again")
    return None

  def _load(self, folder: str, meta: dict[str, Any], abstract: TrainState) -> Restored:
    parts, path = _parts(abstract), os.path.join(folder, "arrays")
    fresh = {}
    if "amax" in parts and "amax" not in os.listdir(path):  # written under another FP8 recipe
      fresh["amax"] = {k: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)
                       for k, x in parts.pop("amax").items()}
    arrays = ocp.load_checkpointables(path, parts) | fresh
    optimizer = arrays["optimizer"]
    counters = {k: optimizer.pop(k) for k in ("step", "bad_steps", "skipped")}
    opt_state = unflatten({k.removeprefix("state/"): v for k, v in optimizer.items()},
                          abstract.opt_state)
    state = TrainState(unflatten(arrays["params"], abstract.params),
                       unflatten(arrays.get("buffers", {}), abstract.buffers), opt_state,
                       **counters, amax=unflatten(arrays.get("amax", {}), abstract.amax))
    ema = None
    if os.path.isdir(os.path.join(folder, "ema")):
      averaged = ocp.load_checkpointables(os.path.join(folder, "ema"),
                                          {"params": flatten(abstract.params)})
      ema = unflatten(averaged["params"], abstract.params)
    return Restored(state, ema, meta)


def _load_part(folder: str, part: str) -> dict[str, Any]:
  """One checkpointable on this process's first device, by the shapes that the folder states.

  Empty where the folder has none, as the router biases of a model without experts.
  """
  if part not in os.listdir(folder):
    return {}
  device = jax.sharding.SingleDeviceSharding(
      jax.config.jax_default_device or jax.local_devices()[0])
  metadata = ocp.checkpointables_metadata(folder).metadata[part]
  abstract = {k: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device)
              for k, m in metadata.items()}
  return ocp.load_checkpointables(folder, {part: abstract})[part]


def steps(workdir: str) -> list[int]:
  """Steps of which a run keeps a checkpoint, oldest first."""
  return _steps(os.path.join(workdir, "checkpoints"))


def load_meta(workdir: str, step: int | None = None) -> dict[str, Any]:
  """The meta (step, tokens, config, ...) of the checkpoint that `load_params` would take.

  Raises:
    CheckpointError: there is no such checkpoint, or its meta cannot be read.
  """
  _, folder = _chosen(workdir, step)
  try:
    return _read_sidecar(folder)
  except (OSError, ValueError) as e:
    raise CheckpointError(f"checkpoint {folder} is damaged: {e}") from None


def load_params(workdir: str, step: int | None = None, ema: bool = False) -> tuple[Any, Any, dict]:
  """Parameters and router biases of a run, for evaluation, sampling or conversion.

  Args:
    workdir: the run's folder.
    step: which checkpoint; the newest where None.
    ema: the averaged parameters in place of the last ones.

  Returns:
    (params, buffers, meta): nested dictionaries of jax arrays on the first local device, as
    `state.split` gives them, and the checkpoint's meta (step, tokens, config, ...).

  Raises:
    CheckpointError: there is no such checkpoint, it is damaged, or it holds no EMA.
  """
  steps, folder = _chosen(workdir, step)
  try:
    meta = _read_sidecar(folder)
    damage = _damage(folder, meta)
  except (OSError, ValueError) as e:
    damage = str(e)
  if damage is not None:
    raise CheckpointError(f"checkpoint {folder} is damaged: {damage}; name another step "
                          f"({', '.join(map(str, steps))})")
  arrays = os.path.join(folder, "arrays")
  if ema and not os.path.isdir(os.path.join(folder, "ema")):
    raise CheckpointError(f"checkpoint {folder} holds no EMA (optim.ema_decay was 0)")
  params = _load_part(os.path.join(folder, "ema") if ema else arrays, "params")
  return nest(params), nest(_load_part(arrays, "buffers")), meta


def _chosen(workdir: str, step: int | None) -> tuple[list[int], str]:
  """The steps that have checkpoints, and the folder of the one that is asked for."""
  root = os.path.join(os.path.abspath(os.path.expanduser(workdir)), "checkpoints")
  steps = _steps(root)
  if not steps or (step is not None and step not in steps):
    wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
    have = ", ".join(map(str, steps)) or "none"
    raise CheckpointError(f"{root} holds no {wanted.removeprefix('a ')}; steps there: {have}")
  return steps, _folder(root, steps[-1] if step is None else step)
