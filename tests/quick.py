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


def generation(patch):
  """Lets `infer.decode` compile its functions like this, for a `pytest.MonkeyPatch`."""
  from dsv3_jax.infer import decode, spmd

  for name, static, donated in (("prefill", "fresh", "cache"), ("run", "most", "state")):
    patch.setattr(decode, name, jit(getattr(decode, name).__wrapped__, donate_argnames=(donated,),
                                    static_argnames=(*decode.STATIC, static)))
  patch.setattr(spmd, "jit", lambda f, mesh, planned, **kwargs: jit(f, **kwargs))
