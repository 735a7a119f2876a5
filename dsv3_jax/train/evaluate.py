"""Validation loss, bits per byte and expert load.

Bits per byte: the summed cross-entropy of all targets over the UTF-8 bytes they stand for. Special
tokens have no bytes, but their loss counts, so the number is never flattered; it does not depend on
the tokenizer and compares with compressors.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from dsv3_jax import config
from dsv3_jax.data import pipeline
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.model import routing
from dsv3_jax.parallel import mesh as mesh_lib
from dsv3_jax.parallel import placement, sharding
from dsv3_jax.train import checkpoint, state


class Trained(NamedTuple):
  """A run that has a checkpoint, without its parameters."""

  workdir: str
  config: config.Config
  corpus: pipeline.Corpus  # what it was trained on and what was held out
  meta: dict[str, Any]  # of the checkpoint


def find(workdir: str, step: int | None = None) -> Trained:
  """Opens the workdir of a run for evaluation.

  Args:
    workdir: its folder.
    step: which checkpoint; the newest where None.

  Raises:
    ConfigError: its text is no longer what the run was trained on.
    CheckpointError: there is no such checkpoint.
  """
  meta = checkpoint.load_meta(workdir, step)
  cfg = config.from_dict(meta["config"])
  corpus = pipeline.prepare(cfg.data, cfg.model.vocab_size, workdir)
  trained_on = (meta["iterator"] or {}).get("corpus", corpus.fingerprint)
  if corpus.fingerprint != trained_on:
    raise config.ConfigError(
        f"{workdir} was trained on corpus {trained_on}, its data now give {corpus.fingerprint}: "
        "the files of data.sources or the tokenizer changed, so that held-out text may have been "
        "trained on; bring them back")
  return Trained(workdir, cfg, corpus, meta)


def load(run: Trained, ema: bool = False) -> tuple[Callable, Any, Any]:
  """(`make_evaluate`'s function on one device, params, buffers) of a run's checkpoint."""
  params, buffers, _ = checkpoint.load_params(run.workdir, run.meta["step"], ema)
  model = nnx.eval_shape(lambda: state.build_model(run.config.model, seed=0))
  return make_evaluate(state.split(model)[0], run.config), params, buffers


def make_evaluate(graphdef: nnx.GraphDef, cfg: config.Config,
                  mesh: jax.sharding.Mesh | None = None,
                  loss_fn: Callable = loss_lib.loss_fn) -> Callable:
  """`sums(params, buffers, batch)`: the statistics of `loss.loss_fn` over one batch [B, T+1].

  On a mesh every rank of a pipeline computes the same.
  """
  axes = mesh_lib.several(mesh, mesh_lib.TOKENS)

  def local(params, buffers, batch):
    model = nnx.merge(graphdef, params, buffers)
    _, aux = loss_fn(model, batch, loss=cfg.loss, mtp_weight=1.0, runtime=cfg.runtime,
                     denominator=1.0, share=1.0, axes=axes)
    return jax.lax.psum(aux, axes) if axes else aux

  if mesh is None:
    return jax.jit(local)
  rep, where = PartitionSpec(), sharding.batch_sharding(mesh, ndim=2)

  def sums(params, buffers, batch):
    experts = placement.specs(placement.places(params, mesh, cfg.runtime, zero=False))
    return jax.shard_map(local, mesh=mesh, out_specs=rep,
                         in_specs=(experts, rep, where.spec))(params, buffers, batch)

  return jax.jit(sums)


def collected(params: Any, mesh: jax.sharding.Mesh | None, runtime: config.Runtime) -> Any:
  """Parameters for `make_evaluate`'s function: on each device all but what stays cut in use.

  Without ZeRO-1 they are so already.
  """
  if mesh is None or not runtime.zero:
    return params
  homes = placement.places(params, mesh, runtime, zero=False)
  return jax.jit(lambda params: params, out_shardings=placement.shardings(homes, mesh))(params)


def target_bytes(batch: dict[str, np.ndarray], token_bytes_V: np.ndarray) -> int:
  """UTF-8 bytes of a batch's targets; numpy on the host."""
  _, weight_BT = loss_lib.targets({k: jnp.asarray(v) for k, v in batch.items()}, 0)
  return int((token_bytes_V[batch["tokens"][:, 1:]] * np.asarray(weight_BT)).sum())


def evaluate(sums: Callable, params: Any, buffers: Any, batches: Sequence[dict[str, jax.Array]],
             bytes_in_targets: int, each: bool = False) -> dict[str, Any]:
  """Averages over fixed batches.

  Args:
    sums: of `make_evaluate`.
    params, buffers: the model's variables.
    batches: on the device already.
    bytes_in_targets: UTF-8 bytes of all targets.
    each: whether to return the counts of each batch too.

  Returns:
    loss and mtp_loss (nats a token), bits_per_byte, accuracy, max_vio, counts_LE (numpy); tokens
    and batch_counts, numpy [batches, L, E], where `each`.
  """
  total, batch_counts = None, []
  for batch in batches:
    found = sums(params, buffers, batch)
    if each:
      batch_counts.append(np.asarray(found["counts_LE"]))
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  total = jax.device_get(total)
  tokens = max(float(total["tokens"]), 1.0)
  counts_LE = np.asarray(total["counts_LE"])
  return {
      "loss": float(total["loss_sum"]) / tokens,
      "mtp_loss": (total["mtp_loss_sum"] / np.maximum(total["mtp_tokens"], 1)).tolist(),
      "bits_per_byte": float(total["loss_sum"]) / math.log(2) / max(bytes_in_targets, 1),
      "accuracy": float(total["correct"]) / tokens,
      "max_vio": float(np.max(routing.max_vio(counts_LE))) if counts_LE.size else 0.0,
      "counts_LE": counts_LE,
      **({"tokens": tokens, "batch_counts": np.stack(batch_counts)} if each else {}),
  }
