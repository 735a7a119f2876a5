"""`jax.jit` that compiles in a quarter of the time: the tests run tiny programs once each.

The program is the same; only code generation is told not to optimise.
"""

import functools

import jax

_OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def options():
  """Those of the options that this jaxlib knows."""
  known = {}
  for key, value in _OPTIONS.items():
    try:
      jax.jit(lambda x: x, compiler_options={key: value}).lower(0.0).compile()
    except Exception:  # an unknown option: slower tests, nothing else
      continue
    known[key] = value
  return known


def jit(f, **kwargs):
  return jax.jit(f, compiler_options=options(), **kwargs)
