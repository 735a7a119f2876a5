"""The one training loop.

    from dsv3_jax.train import run
    result = run(config, "runs/tiny")

The same call begins a run, goes on with an interrupted one from its newest whole checkpoint, and
returns at once from a finished one. Everything it makes is in the workdir (config.json,
tokenizer.json, data/, checkpoints/, metrics.jsonl, tensorboard/, summary.json).

The devices are kept busy by dispatching step n before the numbers of step n - 1 are fetched; the
loop's own work hides behind the step. A resumed run repeats the uninterrupted one bit for bit:
state, EMA, data position and tokens come from the checkpoint, metrics.jsonl is cut back to its
step, and everything else is a function of the step number.

Several processes (`processes.py`) run this same loop side by side, each with the rows of the batch
that its devices hold; what is written beside the checkpoints' arrays, process 0 writes.
"""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import os
import platform
import signal
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from dsv3_jax import config as config_lib
from dsv3_jax import counts as counts_lib
from dsv3_jax import files, host
from dsv3_jax.fp8 import delayed
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.parallel import hosts, sharding
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.train import begin as begin_lib
from dsv3_jax.train import evaluate as evaluate_lib
from dsv3_jax.train import launch as launch_lib
from dsv3_jax.train import metrics as metrics_lib
from dsv3_jax.train import numerics as numerics_lib
from dsv3_jax.train import optim, pipelined, processes, schedules
from dsv3_jax.train import sample as sample_lib
from dsv3_jax.train import state as state_lib
from dsv3_jax.train import step as step_lib
from dsv3_jax.train.checkpoint import CheckpointError, Checkpoints
from dsv3_jax.train.ema import HostEma
from dsv3_jax.train.workdir import Workdir

_UNIGRAM_TOKENS = 300_000  # training tokens that the unigram baseline counts


class DivergedError(RuntimeError):
  """Too many steps in a row had a loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True)
class RunResult:
  """How a run ended.

  Attributes:
    workdir: its folder.
    step, tokens: where it stands.
    finished: whether it reached train.tokens.
    exit_code: 0, or 128 + the signal that ended it (130 for SIGINT, 143 for SIGTERM).
    summary: what summary.json holds; empty for an interrupted run.
    first: whether this is process 0, which writes the run's files.
  """

  workdir: str
  step: int
  tokens: int
  finished: bool
  exit_code: int
  summary: dict[str, Any]
  first: bool = True


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless jax was told where to keep them already."""
  if jax.config.jax_compilation_cache_dir is None:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    jax.config.update("jax_compilation_cache_dir", os.path.join(root, "dsv3_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    compilation_cache.reset_cache()  # a notebook may have compiled already, without a cache


def _traced() -> jax.profiler.ProfileOptions:
  """What a profile holds: the annotated steps, XLA's operations and the devices, no Python calls.

  To record Python calls under Python 3.11, jaxlib walks the list of all threads' states without
  the list's lock. A native thread that enters Python for the first time just then (checkpoints are
  written by such threads) has a state half made, and the process dies by a segmentation fault: a
  profile would have cost the run. Without them traces are smaller and steps undisturbed, too.
  """
  options = jax.profiler.ProfileOptions()
  options.python_tracer_level = 0
  return options


class _Trainer:
  """What the loop holds while it runs; its methods are the loop's parts."""

  def __init__(self, cfg: config_lib.Config, workdir: Workdir, corpus: Any,
               ui: metrics_lib.Silent, group: processes.Alone, loss_fn: Callable,
               eval_fn: Callable = loss_lib.loss_fn):
    self.of_text = eval_fn is loss_lib.loss_fn
    self.cfg, self.workdir, self.corpus, self.ui, self.group = cfg, workdir, corpus, ui, group
    train = cfg.train
    self.began = time.monotonic()
    alone = cfg.runtime.mesh.devices == 1 and cfg.runtime.schedule == "none" and group.count == 1
    self.mesh = None if alone else mesh_lib.make_mesh(cfg.runtime.mesh)
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    self._replicated = one if alone else sharding.replicated(self.mesh)
    self._batch_sharding = one if alone else sharding.batch_sharding(self.mesh)
    self.schedule = schedules.batch_schedule(cfg.data, train.tokens)
    self.lr = schedules.learning_rate(cfg.optim, train.tokens)
    self.bias_speed = schedules.bias_speed(cfg.loss, train.tokens)
    self.mtp_weight = schedules.mtp_weight(cfg.loss, train.tokens)
    self.rows = cfg.data.micro_batch
    self.micros = max(self.schedule.sizes) // self.rows

    optimizer = optim.make_optimizer(cfg.optim)
    self.graphdef, abstract, init = state_lib.initializer(
        lambda: state_lib.build_model(cfg.model, train.seed), optimizer, self.mesh, cfg.runtime)
    self.train_step = step_lib.make_train_step(self.graphdef, cfg, optimizer, self.mesh,
                                               loss_fn)
    self.sums = evaluate_lib.make_evaluate(self.graphdef, cfg, self.mesh, eval_fn)
    # Rows of a micro-batch that this process's devices hold; ranks of a pipeline hold the same.
    self.held = hosts.rows(self._batch_sharding, (1, self.rows, 1), 1)
    self.batches = corpus.train_iterator(self.schedule, self.held)

    self.checkpoints = Checkpoints(workdir.path, train.keep_last, train.keep_best, group)
    restored = self.checkpoints.restore(abstract)
    self.step, self.elapsed_before = 0, 0.0
    ema, ema_updates = None, 0
    if restored is None:
      self.state = init()
      if train.init:
        self.state = begin_lib.begin(self.state, cfg)
        ui.note(f"begins with the parameters of {train.init}")
    else:
      self.state, ema, meta = restored
      self.step, self.elapsed_before = meta["step"], meta["elapsed_s"]
      ema_updates = meta.get("ema_updates", 0)
      if meta["iterator"] is not None:  # a converted model has seen no data
        self.batches.set_state(meta["iterator"])
      ui.note(f"going on from step {self.step:,} of {self.schedule.total_steps:,}")
    if self.step < self.schedule.total_steps:
      self.batches.start()
    self.ema = (HostEma(cfg.optim.ema_decay, cfg.optim.ema_every, ema, ema_updates)
                if cfg.optim.ema_decay else None)
    self.metrics = (metrics_lib.Metrics(workdir.path, self.step, config_lib.to_dict(cfg))
                    if group.first else metrics_lib.Unwritten())
    if workdir.changed and self.step:
      self.metrics.write({"kind": "config", "step": self.step, "changed": workdir.changed})
      ui.note("changed since the last start: " + ", ".join(
          f"{key} from {old} to {new}" for key, (old, new) in workdir.changed.items()))
    if cfg.optim.warmup_steps >= self.schedule.total_steps:
      ui.note(f"warning: optim.warmup_steps={cfg.optim.warmup_steps} leaves none of the run's "
              f"{self.schedule.total_steps} steps at optim.lr={cfg.optim.lr:g}; lower it")
    self.last_eval: dict[str, Any] | None = None
    self.saved = self.step if restored is not None else -1
    self.was_finished = self.step >= self.schedule.total_steps
    self.state_bytes = state_lib.bytes_per_device(abstract)
    self.fits_one_device = self._fits_one_device()
    self.flops_per_token = counts_lib.flops_per_token(cfg.model, cfg.data.sequence_length)
    jax.block_until_ready(self.state)  # or it would be measured beside the initialisation
    self.peak = metrics_lib.peak_flops(1 if self.mesh is None else self.mesh.size)
    self.validation_host = (corpus.validation_batches(self.rows, train.eval_batches)
                            if train.eval_every else [])
    self.validation_bytes = sum(
        evaluate_lib.target_bytes(b, corpus.tokenizer.token_bytes_V) for b in self.validation_host)
    self.evaluates = self.validation_bytes > 0
    if train.eval_every and not self.evaluates:
      ui.note("no text is held out (data.validation_fraction): the run is not evaluated")
    where = one if alone else sharding.batch_sharding(self.mesh, ndim=2)
    self.validation = [hosts.put(b, where) for b in self.validation_host]
    self._balances = [name for name, kind in loss_lib.BALANCES.items() if getattr(cfg.loss, kind)]
    self.numerics = (numerics_lib.make_capture(self.graphdef, cfg)
                     if train.numerics_every and self.fits_one_device else None)
    self._last_batch: dict[str, jax.Array] = {}
    self._rates: list[float] = []
    self._first = True

  def _fits_one_device(self) -> bool:
    """Whether samples and numerics can have the whole model on one device; says so if not."""
    params = 4 * sum(counts_lib.parameters(self.cfg.model)[k] for k in ("main", "mtp"))
    stats = jax.local_devices()[0].memory_stats() or {}
    fits = self.mesh is None or params < 0.5 * stats.get("bytes_limit", 2 * params + 1)
    fits = json.loads(self.group.share("fits", json.dumps(fits)))
    train = self.cfg.train
    if not fits and (train.sample_tokens or train.numerics_every):
      self.ui.note(f"warning: the weights, {params / 2**30:,.0f} GiB in fp32, do not fit one "
                   "device beside the state: no samples and no numerics (train.sample_tokens, "
                   "train.numerics_every)")
    return fits

  def describe_mesh(self) -> str:
    """One line: devices along each axis, the schedule, and what the state takes."""
    here, whole = (self.state_bytes[k] / 2**20 for k in ("device", "whole"))
    runtime = self.cfg.runtime
    axes = " x ".join(f"{a} {n}" for a, n in self.mesh.shape.items() if n > 1) or "one device"
    return (f"mesh: {axes}" +
            (f", {runtime.schedule} pipeline" if runtime.schedule != "none" else "") +
            f"; weights and moments take {here:,.1f} MiB a device of {whole:,.1f}" +
            (" (ZeRO-1)" if runtime.zero else ", each the whole but for experts elsewhere; "
             "runtime.zero=1 cuts them over all devices"))

  # --- parts of the loop

  def dispatch(self) -> dict[str, Any]:
    """Starts the next step; returns its metrics (futures) and host-side numbers."""
    index, number = self.step, self.step + 1
    tokens = self.schedule.tokens_before(index)
    size = self.schedule(index)
    scheduled = {"lr": self.lr(tokens, number), "bias_speed": self.bias_speed(tokens),
                 "mtp_weight": self.mtp_weight(tokens)}
    padded = self.micros > 1 and self.cfg.runtime.schedule == "none"
    micros = np.int32(size // self.rows) if padded else None
    hyper = state_lib.Hyper(*map(np.float32, scheduled.values()), micros)
    self.batches.follow(self.state)
    batch = next(self.batches)
    said = self.batches.said()
    if padded:
      batch = step_lib.pad_micro_batches(batch, self.micros)
    # To the devices explicitly: implicit transfers are forbidden in the loop.
    hyper = hosts.put(hyper, self._replicated)
    batch = hosts.put_rows(batch, self._batch_sharding, self.held, self.rows, 1)
    self._last_batch = batch if self.numerics is not None else {}
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
      self.state, metrics = self.train_step(self.state, batch, hyper)
    self.step = number
    if self.ema is not None:
      self.ema.submit(number, self.state.params, metrics["bad"])
    host = {"step": number, "tokens": self.schedule.tokens_before(number), **scheduled,
            "batch_size": size}
    return {"host": host, "metrics": metrics, "said": said}

  def log(self, pending: dict[str, Any], seconds: float) -> None:
    """Waits for a dispatched step and writes its line; stops a run that diverged."""
    host, found = pending["host"], jax.device_get(pending["metrics"])
    if found["bad"] and int(found["bad_steps"]) >= self.cfg.train.max_bad_steps:
      last = self.checkpoints.steps()[-1:]
      raise DivergedError(
          f"stopped at step {host['step']}: the loss or the gradient was not finite "
          f"{int(found['bad_steps'])} steps in a row (train.max_bad_steps). The parameters were "
          "left as they were before. Look at the data, or lower optim.lr or lengthen "
          "optim.warmup_steps in a new --workdir. " +
          (f"The checkpoint of step {last[0]} is whole." if last
           else "No checkpoint was written yet."))
    if host["step"] % self.cfg.train.log_every and host["step"] != self.schedule.total_steps:
      return
    rate = host["batch_size"] * self.cfg.data.sequence_length / seconds
    max_vio_L = found["max_vio_L"]
    record = self.metrics.write({
        "kind": "train", "step": host["step"], "tokens": host["tokens"],
        **{k: found[k] for k in ("loss", "mtp_loss", "accuracy", *self._balances)},
        "lr": host["lr"], "bias_speed": host["bias_speed"], "mtp_weight": host["mtp_weight"],
        "grad_norm": found["grad_norm"], "max_vio": max(max_vio_L.tolist(), default=None),
        "max_vio_L": max_vio_L, "batch_size": host["batch_size"], "skipped": found["skipped"],
        **pending["said"], **found["more"],
        **({"dropped": found["dropped"]} if self.cfg.runtime.dispatch.overflow == "drop" else {}),
        "time": {"tokens_per_s": rate, "step_s": seconds,
                 "mfu": rate * self.flops_per_token / self.peak, "elapsed_s": self.elapsed()}})
    self._rates = [*self._rates[-19:], seconds]
    usual = sorted(self._rates)[len(self._rates) // 2]  # the median: the first step compiles
    eta = None if self._first else (self.schedule.total_steps - host["step"]) * usual
    self._first = False
    self.ui.progress(metrics_lib.progress_line(record, self.schedule.total_steps, eta),
                     host["step"] / self.schedule.total_steps)

  def elapsed(self) -> float:
    """Seconds of this run, its earlier parts included."""
    return self.elapsed_before + time.monotonic() - self.began

  def validate(self, params: Any) -> dict[str, Any]:
    """Validation numbers of some parameters."""
    params = evaluate_lib.collected(params, self.mesh, self.cfg.runtime)  # once for all batches
    found = evaluate_lib.evaluate(self.sums, params, self.state.buffers, self.validation,
                                  self.validation_bytes)
    if not self.of_text:
      del found["bits_per_byte"]
    return found

  def evaluate(self) -> None:
    """Validates the current parameters and writes the lines."""
    found = self.validate(self.state.params)
    counts_LE = found.pop("counts_LE")
    where = {"step": self.step, "tokens": self.schedule.tokens_before(self.step)}
    self.last_eval = self.metrics.write({"kind": "eval", **where, **found})
    self.metrics.write({"kind": "load", **where, "load_LE": metrics_lib.load_of(counts_LE)})
    self.ui.note(f"step {self.step:,}: validation loss {found['loss']:.4f}, " +
                 (f"{found['bits_per_byte']:.3f} bits per byte" if self.of_text
                  else f"accuracy {found['accuracy']:.3f}"))

  def measure(self) -> None:
    """Writes statistics of the linear layers' FP8 numerics on the last step's first micro-batch."""
    runtime = self.cfg.runtime
    tokens = self.schedule.tokens_before(self.step)
    batch, params, buffers, history = hosts.whole(
        (self._last_batch, self.state.params, self.state.buffers, self.state.amax), self.mesh)
    if not self.group.first:
      return
    batch = {k: v[0] for k, v in batch.items()}
    taps = self.numerics(params, buffers, batch, np.float32(self.mtp_weight(tokens)))
    found = numerics_lib.operators(params, taps, self.cfg.model, delayed.assumed(history))
    recipe = "v3" if runtime.recipe == "none" else runtime.recipe
    self.metrics.write({"kind": "numerics", "step": self.step, "tokens": tokens,
                        **numerics_lib.record(found, recipe, runtime)})

  def save(self) -> None:
    """Starts a checkpoint of the current step."""
    if self.saved == self.step:
      return
    self.metrics.sync()
    iterator = self.group.gather(f"iterator/{self.step}", json.dumps(self.batches.get_state()))
    evaluated = self.last_eval is not None and self.last_eval["step"] == self.step
    meta = {"step": self.step, "tokens": self.schedule.tokens_before(self.step),
            "elapsed_s": self.elapsed(), "val_loss": self.last_eval["loss"] if evaluated else None,
            "iterator": _merged(iterator), "config": config_lib.to_dict(self.cfg)}
    self.checkpoints.save(self.state, meta, None if self.ema is None else self.ema.result())
    self.saved = self.step

  # --- the loop

  def train(self, signals: host.Signals) -> None:
    """Steps until the run's tokens are seen or a signal came to any process; leaves a checkpoint
    either way."""
    train, total = self.cfg.train, self.schedule.total_steps
    pending: dict[str, Any] | None = None
    profiling = False
    last = time.perf_counter()

    def drain() -> None:
      nonlocal pending, last
      if pending is not None:
        done, pending = pending, None
        jax.block_until_ready(done["metrics"])
        now = time.perf_counter()
        self.log(done, now - last)
        last = now

    def stop_profile() -> None:
      nonlocal profiling
      if profiling:
        jax.profiler.stop_trace()
        profiling = False
        self.ui.note(f"profile up to step {self.step:,} is in {self.workdir.file('profile')}; open "
                     "the trace.json.gz in it with Perfetto, or the folder with xprof")

    if self.step < total:
      if train.profile_from and not self.step < train.profile_from <= total:
        self.ui.note(f"train.profile_from={train.profile_from} is not among the steps to come, "
                     f"{self.step + 1:,} to {total:,}: nothing is profiled")
      self.ui.progress("compiling the training step (seconds, where the cache has it)",
                       self.step / total)
    with contextlib.ExitStack() as stack:
      stack.callback(stop_profile)
      # Whatever crosses between host and devices in a step does so on purpose.
      stack.enter_context(jax.transfer_guard("disallow"))
      while self.step < total and not self.group.stop(self.step, signals.received):
        if train.profile_from and self.step + 1 == train.profile_from:
          drain()
          jax.profiler.start_trace(self.workdir.file("profile"), profiler_options=_traced())
          profiling = True
        begun = self.dispatch()
        drain()
        pending = begun
        self.checkpoints.poll()
        step = self.step
        if profiling and step + 1 >= train.profile_from + train.profile_steps:
          drain()
          stop_profile()
        evaluating = self.evaluates and (step % train.eval_every == 0 or step == total)
        saving = step % train.checkpoint_every == 0 or step == total
        measuring = self.numerics is not None and step % train.numerics_every == 0
        if evaluating or saving or measuring:
          drain()
          with jax.transfer_guard("allow"):
            if measuring:
              self.measure()
            if evaluating:
              self.evaluate()
            if saving:
              self.save()
          last = time.perf_counter()
      if self.step < total:
        name = signal.Signals(self.group.received).name
        self.ui.note(f"{name}: finishing the step and saving; a second signal ends the run at "
                     "once, without saving")
      drain()
    self.save()
    self.checkpoints.wait()

  def summarize(self) -> dict[str, Any]:
    """Final numbers, baselines and samples; writes summary.json.

    All processes compute the numbers; process 0 does the rest, and the others return nothing.
    """
    cfg = self.cfg
    parameters = counts_lib.parameters(cfg.model)
    final: dict[str, Any] = {"step": self.step,
                             "tokens": self.schedule.tokens_before(self.step),
                             "skipped_steps": int(jax.device_get(self.state.skipped))}
    baselines, samples = {}, []
    if self.evaluates:
      found = self.last_eval or {}
      if found.get("step") != self.step:
        found = self.validate(self.state.params)
      final |= {k: found[k] for k in ("loss", "mtp_loss", "bits_per_byte", "accuracy", "max_vio")
                if k in found}
      if self.ema is not None:
        average, updates = self.ema.result().result()
        if updates:
          averaged = self.validate(hosts.join(average, self.state.params))
          final |= {f"ema_{k}": averaged[k] for k in ("loss", "bits_per_byte") if k in averaged}
      model = (hosts.whole((self.state.params, self.state.buffers), self.mesh)
               if cfg.train.sample_tokens and self.fits_one_device else None)
      if not self.group.first:
        return {}
      # As much text as the validation batches hold, so that all numbers are of the same text.
      text = self.corpus.validation_text(self.validation_bytes)
      baselines = self._baselines(text) if self.of_text else {}
      if model is not None:
        samples = self._samples(text, *model)
    if not self.group.first:
      return {}
    summary = metrics_lib.plain({
        "config_hash": config_lib.fingerprint(cfg),
        "commit": host.commit(), "versions": _versions(), "device": _device(),
        "parameters": parameters["main"] + parameters["mtp"],
        "activated_parameters": sum(counts_lib.activated_parameters(cfg.model).values()),
        "parameters_by_part": parameters, "wall_s": self.elapsed(), "final": final,
        "state_bytes": self.state_bytes,
        "baselines": baselines, "samples": samples})
    files.write_atomic(self.workdir.file("summary.json"), json.dumps(summary, indent=2) + "\n")
    return summary

  def _baselines(self, text: bytes) -> dict[str, float]:
    """Bits per byte without a language model: see `data.baselines`."""
    from dsv3_jax.data import baselines

    targets = np.concatenate([
        b["tokens"][:, 1:][b["mask"][:, 1:] > 0] if "mask" in b else b["tokens"][:, 1:].ravel()
        for b in self.validation_host])
    batches = self.corpus.train_iterator(self.schedule)  # from the start of the training data
    sample, size = [], 0
    while size < min(_UNIGRAM_TOKENS, self.schedule.tokens_before(self.schedule.total_steps)):
      sample.append(next(batches)["tokens"].reshape(-1))
      size += sample[-1].size
    batches.close()
    unigram = baselines.unigram(np.concatenate(sample), targets, self.cfg.model.vocab_size,
                                self.validation_bytes)
    return {"unigram": unigram, **baselines.compression(text)}

  def _samples(self, text: bytes, params: Any, buffers: Any) -> list[dict[str, Any]]:
    tokenizer = self.corpus.tokenizer
    sampler = sample_lib.make_sampler(self.graphdef, self.cfg.runtime, tokenizer.vocab_size)
    try:
      return sample_lib.report_samples(sampler, params, buffers, tokenizer, text,
                                       self.cfg.data.sequence_length,
                                       self.cfg.train.sample_tokens, self.cfg.train.seed)
    except Exception as e:  # the training is done: its summary and report are worth more
      self.ui.note(f"no samples: {type(e).__name__}: {e}")
      return []

  def close(self) -> None:
    with contextlib.suppress(CheckpointError):  # raised where it was waited for, or less urgent
      self.checkpoints.close()
    self.batches.close()
    if self.ema is not None:
      self.ema.close()
    self.metrics.close()


def _merged(states: list[str]) -> dict[str, Any] | None:
  """The data iterator's state of all processes' states; process 0 alone has them."""
  if len(states) < 2:
    return json.loads(states[0]) if states else None
  from dsv3_jax.data import loader

  return loader.merge_states([json.loads(state) for state in states])


def _versions() -> dict[str, str]:
  names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  return {"python": platform.python_version()} | {n: importlib.metadata.version(n) for n in names}


def _device() -> str:
  device = jax.devices()[0]
  kind = device.device_kind
  if device.platform == "cpu":
    kind = f"{platform.machine()} CPU, {os.cpu_count()} cores"
  return f"{jax.device_count()} x {kind}" if jax.device_count() > 1 else kind


def _preparing(ui: metrics_lib.Silent) -> Callable[[str, int, int], None]:
  """Shows how far the data are."""
  def progress(stage: str, done: int, total: int) -> None:
    share = done / total if total else 0.0
    ui.progress(f"{stage}: {done / 1e6:,.0f} MB" + (f" of {total / 1e6:,.0f}" if total else ""),
                min(share, 0.999))

  return progress


def run(config: config_lib.Config, workdir: str, *, ui: metrics_lib.Silent | None = None,
        corpus: Any = None, launch: launch_lib.Launch | None = None,
        loss_fn: Callable = loss_lib.loss_fn, eval_fn: Callable = loss_lib.loss_fn) -> RunResult:
  """Trains until `config.train.tokens`, going on from what the workdir holds.

  Args:
    config: the whole run.
    workdir: its folder; made if it does not exist. Several processes must all see it.
    ui: where progress is shown; the terminal where None (`metrics.Silent()` shows nothing), of
      process 0.
    corpus: prepared data (see `data.pipeline.Corpus`) in place of `config.data`'s sources.
    launch: of `launch.find`, where the other processes are; this one is alone where None, unless
      jax.distributed is initialized already.
    loss_fn: of the training step, as `loss.loss_fn`; its metrics may have "more", a dictionary of
      additive fp32 scalars for the step's line.
    eval_fn: of validation, in its form; another than `loss.loss_fn` counts something else than
      text, so that there are no bits per byte and no baselines.

  Returns:
    How it ended, the same in all processes. An interrupted run (SIGINT, SIGTERM) has saved a
    checkpoint; the same call goes on from there.

  Raises:
    WorkdirError: the workdir cannot be written, is in use, or was made by another config.
    ConfigError: the data or the mesh cannot be had.
    CheckpointError: a checkpoint could not be written, or none that is there is whole.
    DivergedError: train.max_bad_steps steps in a row were not finite.
    ProcessError: the processes do not come together. One that is lost later ends the others
      (`processes.py`).
  """
  host.keep_memory()  # before the first question to jax
  use_compilation_cache()
  with launch_lib.join(launch) as group:
    ui = ui or (metrics_lib.terminal() if group.first else metrics_lib.Silent())
    try:
      return _run(begin_lib.with_tokenizer(config), workdir, ui, corpus, group, loss_fn,
                  eval_fn)
    finally:
      ui.close()


def _check_devices(config: config_lib.Config) -> None:
  """Raises ConfigError for what these devices cannot run, before the data are prepared."""
  runtime = config.runtime
  mesh_lib.make_mesh(runtime.mesh)
  if runtime.schedule != "none":  # every batch of a ramp
    rows = config.data.micro_batch
    sizes = schedules.batch_schedule(config.data, config.train.tokens).sizes
    for size in sorted(set(sizes)):
      pipelined.plan(config, size // rows)
  if runtime.dispatch.transport == "ragged" and jax.default_backend() == "cpu":
    raise config_lib.ConfigError(
        "runtime.dispatch.transport='ragged' needs lax.ragged_all_to_all, which XLA does not have "
        "on a CPU; use 'dense' there")


def _run(config: config_lib.Config, workdir: str, ui: metrics_lib.Silent, corpus: Any,
         group: processes.Alone, loss_fn: Callable, eval_fn: Callable) -> RunResult:
  trainer = None
  try:
    with Workdir(workdir, config, group) as folder, warnings.catch_warnings():
      warnings.simplefilter("always", UserWarning)
      warnings.showwarning = lambda message, *rest, **more: ui.note(f"warning: {message}")
      _check_devices(config)
      if corpus is None:
        corpus = _prepared(config, folder.path, ui, group)
        ui.note(corpus.describe())
      trainer = _Trainer(config, folder, corpus, ui, group, loss_fn, eval_fn)
      ui.note(f"{counts_lib.parameters(config.model)['main'] / 1e6:,.1f} million parameters, "
              f"{trainer.schedule.total_steps:,} steps of {config.data.batch_size} x "
              f"{config.data.sequence_length} tokens, {_device()}")
      if trainer.mesh is not None:
        ui.note(trainer.describe_mesh())
      with host.Signals() as signals:
        trainer.train(signals)
      finished = trainer.step >= trainer.schedule.total_steps
      tokens = trainer.schedule.tokens_before(trainer.step)
      if not finished:
        ui.note(f"saved step {trainer.step:,}; run the same command to go on")
        return RunResult(folder.path, trainer.step, tokens, False, 128 + group.received, {},
                         group.first)
      if signals.received is not None and group.count == 1:  # in the last step, or its checkpoint
        ui.note("all steps are saved; run the same command for what comes after them")
        return RunResult(folder.path, trainer.step, tokens, True, 128 + signals.received, {}, True)
      path = folder.file("summary.json")
      known = trainer.was_finished and os.path.exists(path)
      if json.loads(group.share("summarized", json.dumps(known))):
        with open(path) as f:
          summary = json.load(f)
      else:
        summary = json.loads(group.share("summary", json.dumps(trainer.summarize())))
      return RunResult(folder.path, trainer.step, tokens, True, 0, summary, group.first)
  except BaseException as e:
    group.fail(e)
    if not isinstance(e, OSError) or e.errno not in (errno.ENOSPC, errno.EDQUOT):
      raise
    raise CheckpointError(f"the disk of {workdir} is full; free some space and run the same "
                          "command to go on from the newest checkpoint") from e
  finally:
    if trainer is not None and not group.failed:
      trainer.close()


def _prepared(config: config_lib.Config, workdir: str, ui: metrics_lib.Silent,
              group: processes.Alone) -> Any:
  """The corpus: process 0 prepares it, the others open what it made."""
  from dsv3_jax.data import apart, pipeline  # after the workdir is known to be ours

  if group.first:
    corpus = apart.prepare(config.data, config.model.vocab_size, workdir, _preparing(ui))
    inside = os.path.join(workdir, "")
    folders = [os.path.abspath(f).removeprefix(inside) for f in corpus.folders]
    group.share("corpus", json.dumps([corpus.fingerprint, folders]))
  else:
    fingerprint, folders = json.loads(group.share("corpus", None))
    corpus = pipeline.reopen(config.data, config.model.vocab_size, workdir, folders)
    if corpus.fingerprint != fingerprint:
      raise config_lib.ConfigError(f"process {group.index} reads corpus {corpus.fingerprint} under "
                                   f"{workdir} and process 0 made {fingerprint}; the workdir must "
                                   "be one folder, on a file system that all processes share")
  return corpus
