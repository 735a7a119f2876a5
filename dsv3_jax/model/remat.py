"""Which activations of a block the backward pass keeps (report 3.2.3, facts 2.4).

    none    everything that differentiation asks for
    report  the latents before their norms, attention's output and log-sum-exp, the residual after
            attention, the rows sent to experts and the SwiGLU inputs; recomputed are every RMSNorm,
            the up-projections of MLA, RoPE and the SwiGLU outputs, as in the report
    layer   the block's input alone; the whole block runs again
"""

from collections.abc import Callable

import jax
from flax import nnx

SAVED_IN_REPORT = (
    "q_latent", "kv_latent", "attention_out", "attention_lse", "attention_residual",
    "dispatched", "expert_gate_up", "ffn_gate", "ffn_up",
)


def wrap_step(step: Callable, policy: str) -> Callable:
  """A scan's `step(module, carry, x) -> (carry, y)` under the named policy.

  Raises:
    ValueError: an unknown policy.
  """
  if policy == "none":
    return step
  policies = {"layer": None,
              "report": jax.checkpoint_policies.save_only_these_names(*SAVED_IN_REPORT)}
  if policy not in policies:
    raise ValueError(f"remat={policy!r} must be one of none, {', '.join(policies)}")

  def wrapped(module, carry, x):
    graphdef, state = nnx.split(module)

    def pure(state, carry, x):
      return step(nnx.merge(graphdef, state), carry, x)

    # Inside a scan the compiler cannot merge the recomputation with the first pass anyway.
    return jax.checkpoint(pure, policy=policies[policy], prevent_cse=False)(state, carry, x)

  return wrapped
