"""Experts placed anew while a model serves, after the load that they had (report 3.4).

A rebalancing has three parts, none of which stops the requests: the load of the last windows goes
to a thread that looks for a better placement (`placement.rebalance_experts`); what has to move is
fetched layer after layer, a round between two steps of decoding (`migrate`); and a layer's new
weights and tables take their place together. What is computed is the same before and after, but for
the order of sums.
"""

import collections
import logging
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np

from dsv3_jax import config
from dsv3_jax.infer import migrate, placement, slots
from dsv3_jax.infer.parameters import Experts, Parameters

_log = logging.getLogger(__name__)
MEMORY = 0.5  # what is left of a window's load in the next one's
SLACK = 0.01  # how much busier the busiest device may be for the sake of fewer experts moved


def groups(cfg: config.MoE, nodes: int) -> int:
  """Groups of experts to keep together on a node: the router's, where it limits by them."""
  return cfg.groups if cfg.active_groups < cfg.groups and cfg.groups % nodes == 0 else 1


def first(cfg: config.Model, mesh: jax.sharding.Mesh, redundant: int,
          load_LE: np.ndarray | None = None) -> np.ndarray:
  """A placement to begin with, int64 [L, I].

  Args:
    cfg: the model.
    mesh: `node` and `gpu` cut the experts.
    redundant: slots beyond one for each expert, I - E.
    load_LE: of the main model's MoE layers, as training has logged or a server has recorded it;
      None: equal.

  Raises:
    ConfigError: the model has no experts to cut, the slots do not divide among the devices, or the
      load is another model's.
  """
  if not cfg.moe_layers:
    raise config.ConfigError("a mesh cuts experts, and this model has none (model.dense_layers="
                             f"{cfg.dense_layers} of {cfg.layers}); serve it on one device")
  shape = (cfg.moe_layers, cfg.moe.experts)
  if load_LE is None:
    load_LE = np.ones(shape)
  elif load_LE.shape[0] < shape[0] or load_LE.shape[1] != shape[1]:
    raise config.ConfigError(f"the load is of {load_LE.shape[0]} layers with {load_LE.shape[1]} "
                             f"experts; the model has {shape[0]} with {shape[1]}")
  if redundant < 0:
    raise config.ConfigError(f"redundant={redundant} must not be negative")
  count = shape[1] + redundant
  slots.per_device(count, mesh)
  return _place(cfg.moe, mesh, load_LE[:shape[0]], count)


def _place(cfg: config.MoE, mesh: jax.sharding.Mesh, load_LE: np.ndarray, count: int, **how
           ) -> np.ndarray:
  nodes, gpus = mesh.shape["node"], mesh.shape["gpu"]
  return placement.rebalance_experts(load_LE, count, groups(cfg, nodes), nodes, nodes * gpus,
                                     **how)[0]


class Balancer:
  """Weights whose experts follow their load.

  What goes wrong in a rebalancing ends that rebalancing: the old weights are whole until the new
  ones take their place.

  Args:
    cfg: the model.
    weights: of `slots.place`.
    expert_LI: where they are.
    mesh: the devices.

  Attributes:
    weights: as they are now.
    expert_LI: where experts are now.
    load_LE: what the last placement was chosen by, older windows' share of it included.
    totals: "rebalanced" and "moved", experts that devices fetched from others.
  """

  def __init__(self, cfg: config.Model, weights: Parameters, expert_LI: np.ndarray,
               mesh: jax.sharding.Mesh):
    self.weights, self.expert_LI = weights, expert_LI.copy()
    self.load_LE = np.zeros((len(expert_LI), cfg.moe.experts))
    self.totals: collections.Counter[str] = collections.Counter()
    self._cfg, self._mesh = cfg, mesh
    self._share_LE: np.ndarray | None = None  # of the first placement's load
    self._devices = mesh.shape["node"] * mesh.shape["gpu"]
    self._moe = [i for i, w in enumerate(weights.layers) if isinstance(w.ffn, Experts)]
    self._pool = ThreadPoolExecutor(1, "placement")
    self._wanted: Future[np.ndarray] | None = None
    self._changes: list[tuple[int, np.ndarray]] = []  # layers to come and their placements
    self._move: tuple | None = None  # the one under way: arrays so far, rounds left

  @property
  def busy(self) -> bool:
    """Whether a rebalancing is under way."""
    return bool(self._wanted is not None or self._changes or self._move)

  @property
  def imbalance(self) -> float:
    """Max / mean load of the devices, mean over the layers: `load_LE` under today's placement."""
    if not self._moe:
      return 1.0
    return float(placement.imbalance(self.load_LE, self.expert_LI, self._devices).mean())

  def warm(self) -> None:
    """Compiles what moving experts needs."""
    if self._moe:
      size = self.expert_LI.shape[1]
      own_Wi, _ = migrate.plan(np.arange(size), np.arange(size), self._devices)
      nothing = np.full(self._devices, size // self._devices, np.int32)
      arrays = self._begin(self._moe[0], own_Wi)
      self._exchange(self._moe[0], arrays, migrate.Round(0, nothing * 0, nothing))

  def remember(self, load_LE: np.ndarray) -> None:
    """Lets a recorded load, which the first placement follows, count as the window before the
    first."""
    total_L1 = load_LE[:len(self.load_LE)].sum(1, keepdims=True)
    self._share_LE = load_LE[:len(self.load_LE)] / np.maximum(total_L1, 1e-30)

  def rebalance(self, load_LE: np.ndarray) -> None:
    """Begins to place experts after the load of another window; not while `busy`."""
    assert not self.busy
    if self._share_LE is not None:
      self.load_LE, self._share_LE = self._share_LE * load_LE.sum(1, keepdims=True), None
    self.load_LE = MEMORY * self.load_LE + load_LE
    if self._moe and self._devices > 1 and self.load_LE.any():
      self._wanted = self._pool.submit(
          _place, self._cfg.moe, self._mesh, self.load_LE, self.expert_LI.shape[1],
          previous=self.expert_LI.copy(), slack=SLACK)

  def step(self) -> bool:
    """Goes on by one round, if there is anything to do; whether experts moved."""
    if self._wanted is not None:
      self._decided()
      return False
    try:
      self._round()
      return True
    except Exception:
      _log.exception("experts could not be moved; they stay where they are")
      self._changes, self._move = [], None
      return False

  def _round(self) -> None:
    if self._move is not None:
      self._go_on()
    elif self._changes:
      layer, new_I = self._changes[0]
      own_Wi, rounds = migrate.plan(self.expert_LI[layer], new_I, self._devices)
      self._move = self._begin(self._moe[layer], own_Wi), rounds
      self._finish_layer()

  def close(self) -> None:
    """Ends the thread; a search that is under way is not waited for."""
    self._pool.shutdown(wait=False, cancel_futures=True)

  def _decided(self) -> None:
    wanted = self._wanted
    if not wanted.done():
      return
    self._wanted = None
    try:
      found_LI = wanted.result()
    except Exception:
      _log.exception("no placement was found; experts stay where they are")
      return
    self.totals["rebalanced"] += 1
    changed = np.flatnonzero((found_LI != self.expert_LI).any(1))
    self._changes = [(int(layer), found_LI[layer]) for layer in changed]

  def _go_on(self) -> None:
    arrays, rounds = self._move
    layer = self._moe[self._changes[0][0]]
    self._move = self._exchange(layer, arrays, rounds[0]), rounds[1:]
    self.totals["moved"] += int((rounds[0].to_W < self.expert_LI.shape[1] // self._devices).sum())
    self._finish_layer()

  def _finish_layer(self) -> None:
    """Puts a layer's new weights in place, if the last round was called."""
    arrays, rounds = self._move
    if rounds:
      return
    layer, new_I = self._changes.pop(0)
    self._move = None
    at, layers = self._moe[layer], list(self.weights.layers)
    tables = slots.tables(new_I, self._cfg.moe.experts)
    tables = jax.tree.map(lambda x: migrate.put(x, self._mesh), tables)
    ffn = layers[at].ffn._replace(w_in_EDF=arrays[0], w_out_EFD=arrays[1], slots=tables)
    layers[at] = layers[at]._replace(ffn=ffn)
    self.weights = self.weights._replace(layers=tuple(layers))
    self.expert_LI[layer] = new_I

  def _begin(self, layer: int, own_Wi: np.ndarray):
    return migrate.begin(self._experts(layer), migrate.put(own_Wi, self._mesh, cut=True),
                          mesh=self._mesh)

  def _exchange(self, layer: int, arrays, round: migrate.Round):
    put = lambda x, cut: migrate.put(np.asarray(x, np.int32), self._mesh, cut)
    return migrate.exchange(arrays, self._experts(layer), put(round.from_W, True),
                             put(round.to_W, True), put(round.distance, False), mesh=self._mesh)

  def _experts(self, layer: int):
    ffn = self.weights.layers[layer].ffn
    return ffn.w_in_EDF, ffn.w_out_EFD
