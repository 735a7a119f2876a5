"""Multiplications and additions of a traced program's matmuls."""

import math

from jax.extend import core


def flops(jaxpr) -> int:
  """Of all dot_generals, those in a scan as often as it runs, in a while once."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (inner, _), _ = eqn.params["dimension_numbers"]
      width = math.prod(eqn.invars[0].aval.shape[k] for k in inner)
      total += 2 * width * math.prod(eqn.outvars[0].aval.shape)
    times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    for value in eqn.params.values():
      for inside in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(inside, (core.Jaxpr, core.ClosedJaxpr)):
          total += times * flops(inside)
  return total


def loops(jaxpr) -> list[core.JaxprEqn]:
  """The scans and whiles of a program, those within a scan among them, outermost first."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  found = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("scan", "while"):
      found.append(eqn)
    if eqn.primitive.name != "while":
      for value in eqn.params.values():
        if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
          found += loops(value)
  return found
