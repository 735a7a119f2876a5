"""The load of experts while a model serves, window after window, and what follows of it."""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dsv3_jax.infer.balance import Balancer

_log = logging.getLogger(__name__)
ENOUGH = 4  # tokens that an expert must have had on average before anything follows of it


class Watch:
  """Looks at the load from time to time. What goes wrong here costs no request.

  Args:
    window: seconds between two looks; 0: none.
    take: gives the tokens that each expert had since it was asked last, fp64 [MoE layers, E].
    balancer: of the experts, or None.

  Attributes:
    on_load: called with the load of each window.
  """

  def __init__(self, window: float, take: Callable[[], np.ndarray], balancer: Balancer | None):
    self.on_load: Callable[[np.ndarray], Any] = lambda load_LE: None
    self._window, self._take, self._balancer = window, take, balancer
    self._gathered: np.ndarray | None = None  # of windows that were too short to tell
    self.start()

  def start(self) -> None:
    """Begins the first window now."""
    self._since = time.monotonic()

  def step(self) -> bool:
    """Lets the balancer go on by a round, or looks at the load if it is time; between two steps of
    the engine. Whether experts moved."""
    if self._balancer is not None and self._balancer.busy:
      return self._balancer.step()
    if self._window and time.monotonic() >= self._since + self._window:
      self._look()
    return False

  def finish(self) -> None:
    """Tells of the last window; the engine does not step any more."""
    if self._window:
      self._tell(self._take())
    if self._balancer is not None:
      self._balancer.close()

  def _look(self) -> None:
    load_LE = self._take()
    self.start()
    self._tell(load_LE)
    if self._balancer is None:
      return
    if self._gathered is not None:
      load_LE = load_LE + self._gathered
    few = load_LE.size and load_LE.mean() < ENOUGH  # a placement by these would follow chance
    self._gathered = load_LE if few else None
    if not few:
      self._balancer.rebalance(load_LE)

  def _tell(self, load_LE: np.ndarray) -> None:
    try:
      self.on_load(load_LE)
    except Exception:
      _log.exception("the load of a window is lost")
