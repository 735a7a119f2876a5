"""The training state: plain nested dictionaries of arrays in one dataclass.

`nnx.split` gives the graph definition and the variables; the variables are kept as pure
dictionaries, so that jit dispatch, checkpoints and the host EMA see ordinary pytrees.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dsv3_jax import config
from dsv3_jax.fp8 import delayed, recipe
from dsv3_jax.fp8.qtensor import QTensor
from dsv3_jax.model.routing import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel import placement, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """Everything on the devices that a step changes.

  Attributes:
    params: nested dict of fp32 master weights, the paths of the model's attributes.
    buffers: nested dict of router biases, fp32.
    opt_state: of `optim.make_optimizer`.
    step: int32, steps taken, skipped ones included.
    bad_steps: int32, skipped steps in a row up to now.
    skipped: int32, skipped steps of the whole run.
    amax: history of delayed FP8 scaling (`fp8.delayed`); None under recipes that have none.

  Tokens seen are exact integers on the host (`schedules.BatchSchedule.tokens_before`): they
  outgrow int32, and the devices need only what the schedules make of them.
  """

  params: Any
  buffers: Any
  opt_state: Any
  step: jax.Array
  bad_steps: jax.Array
  skipped: jax.Array
  amax: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hyper:
  """Scheduled numbers of one step, arguments of the compiled step; fp32 scalars.

  Attributes:
    lr: learning rate.
    bias_speed: gamma of the router-bias update.
    mtp_weight: lambda of the MTP loss.
    micro_batches: int32, how many of the batch's leading axis to use (the rest is padding), so
      that one compiled step serves every stage of the batch ramp; None uses all.
  """

  lr: Any
  bias_speed: Any
  mtp_weight: Any
  micro_batches: Any = None


def build_model(model_config: config.Model, seed: int) -> Transformer:
  """The model with fp32 parameters drawn from `seed`."""
  return Transformer(model_config, rngs=nnx.Rngs(seed), dtype=jnp.float32)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Any, Any]:
  """(graph definition, parameters, router biases), the last two as pure dictionaries."""
  graphdef, params, buffers = nnx.split(model, nnx.Param, RouterBias)
  return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(buffers)


def make_state(params: Any, buffers: Any, optimizer: optax.GradientTransformation,
               runtime: config.Runtime = config.Runtime()) -> TrainState:
  """The state before the first step; `runtime` tells whether FP8 scaling has a history."""
  zero = lambda: jnp.zeros([], jnp.int32)
  return TrainState(params, buffers, optimizer.init(params), zero(), zero(), zero(),
                    delayed.init(params, recipe.resolve(runtime)))


def initializer(
    build: Callable[[], nnx.Module], optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None, runtime: config.Runtime = config.Runtime(),
) -> tuple[nnx.GraphDef, TrainState, Callable[[], TrainState]]:
  """What is needed to begin or to restore a run.

  Args:
    build: constructs the model; traced, never run eagerly.
    optimizer: of `optim.make_optimizer`.
    mesh: where the state lives, as `shardings` says; one device where None.
    runtime: of the run.

  Returns:
    The graph definition, the abstract state (shapes, dtypes, shardings), and a function
    that makes the initial state.
  """
  graphdef = split(nnx.eval_shape(build))[0]

  def init() -> TrainState:
    _, params, buffers = split(build())
    return make_state(params, buffers, optimizer, runtime)

  shapes = jax.eval_shape(init)
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    where = jax.tree.map(lambda _: one, shapes)
  else:
    where = shardings(shapes, optimizer, mesh, runtime)
  abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes,
                          where)
  # The generator draws the same numbers however its result is cut.
  # What runs once is not worth optimising: code generation at level 0 saves seconds.
  compiled = jax.jit(init, out_shardings=where,
                     compiler_options={"xla_backend_optimization_level": 0})
  return graphdef, abstract, compiled


def shardings(state: TrainState, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh,
              runtime: config.Runtime) -> TrainState:
  """Where each array of the state lives, `NamedSharding`s (`parallel/placement.py`).

  Parameters and their moments are cut alike; all else is replicated, FP8 moments too.
  """
  homes = placement.places(state.params, mesh, runtime)
  rep = sharding.replicated(mesh)
  cut = placement.shardings(homes, mesh)
  all_rep = lambda tree: jax.tree.map(lambda _: rep, tree)

  def moment(x, where):
    return all_rep(x) if isinstance(x, QTensor) else where

  opt_state = optax.tree.map_params(
      optimizer, moment, state.opt_state, cut, transform_non_params=lambda _: rep,
      is_leaf=lambda x: isinstance(x, QTensor))
  return dataclasses.replace(all_rep(state), params=cut, opt_state=opt_state)


def bytes_per_device(abstract: TrainState) -> dict[str, int]:
  """Bytes of the state: {"device": of the part on each, "whole": of all of it, once}."""
  leaves = jax.tree.leaves(abstract)
  size = lambda shape, x: math.prod(shape) * np.dtype(x.dtype).itemsize
  return {"device": sum(size(x.sharding.shard_shape(x.shape), x) for x in leaves),
          "whole": sum(size(x.shape, x) for x in leaves)}
