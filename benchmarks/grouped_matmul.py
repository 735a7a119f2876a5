"""Grouped matmul, forward and backward: ours, `lax.ragged_dot`, and torch's loop over experts.

8,192 rows of random uneven groups through 256 x 128 matrices, fp32, with the gradients of rows and
weights. Ours takes rows that are already sorted and padded to whole blocks, as the MoE layer makes
them, padding included in the time; the others take the same rows without padding. The peer is what
transformers' expert modules do on a CPU: one matmul a group.

    python -m benchmarks.grouped_matmul
"""

import os

import numpy as np

from benchmarks import common

ROWS, WIDTH_IN, WIDTH_OUT = 8192, 256, 128
GROUPS = (4, 16, 64)


def loads(groups: int, seed: int = 0) -> np.ndarray:
  """Rows of each group, int32, random and uneven, summing to ROWS."""
  rng = np.random.default_rng(seed)
  share = rng.dirichlet(np.full(groups, 4.0))
  return rng.multinomial(ROWS, share).astype(np.int32)


def make_ours(load: np.ndarray):
  """(forward and both gradients, padded rows)."""
  import jax
  import jax.numpy as jnp

  from dsv3_jax import ops
  from dsv3_jax.model import moe

  groups = len(load)
  expert_PA = jnp.asarray(np.repeat(np.arange(groups), load)[:, None], jnp.int32)
  plan = moe.plan(expert_PA, groups, moe.block_rows(ROWS, groups))
  rng = np.random.default_rng(1)
  x_PK = jnp.asarray(rng.standard_normal((ROWS, WIDTH_IN)), jnp.float32)
  w_GKN = jnp.asarray(rng.standard_normal((groups, WIDTH_IN, WIDTH_OUT)), jnp.float32)
  x_MK = jax.jit(moe.spread)(x_PK, plan)
  dy_MN = jnp.ones((x_MK.shape[0], WIDTH_OUT), jnp.float32)

  @jax.jit
  def both(x_MK, w_GKN, dy_MN):
    y, back = jax.vjp(lambda x, w: ops.grouped_gemm(x, w, plan.group_m, plan.used), x_MK, w_GKN)
    return y, back(dy_MN)

  used = int(plan.used) * (x_MK.shape[0] // len(plan.group_m))
  return lambda: jax.block_until_ready(both(x_MK, w_GKN, dy_MN)), used


def make_ragged_dot(load: np.ndarray):
  import jax
  import jax.numpy as jnp

  rng = np.random.default_rng(1)
  x_MK = jnp.asarray(rng.standard_normal((ROWS, WIDTH_IN)), jnp.float32)
  w_GKN = jnp.asarray(rng.standard_normal((len(load), WIDTH_IN, WIDTH_OUT)), jnp.float32)
  sizes, dy_MN = jnp.asarray(load), jnp.ones((ROWS, WIDTH_OUT), jnp.float32)

  @jax.jit
  def both(x_MK, w_GKN, dy_MN):
    y, back = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x_MK, w_GKN)
    return y, back(dy_MN)

  return lambda: jax.block_until_ready(both(x_MK, w_GKN, dy_MN))


def make_torch(load: np.ndarray):
  import torch

  torch.set_num_threads(common.cores())
  rng = np.random.default_rng(1)
  x = torch.tensor(rng.standard_normal((ROWS, WIDTH_IN)), dtype=torch.float32, requires_grad=True)
  w = torch.tensor(rng.standard_normal((len(load), WIDTH_OUT, WIDTH_IN)), dtype=torch.float32,
                   requires_grad=True)
  ends = np.cumsum(load)
  dy = torch.ones((ROWS, WIDTH_OUT))

  def both():
    x.grad = w.grad = None
    parts = [torch.nn.functional.linear(x[end - n:end], w[g])
             for g, (n, end) in enumerate(zip(load, ends, strict=True))]
    torch.cat(parts).backward(dy)

  return both


def main(argv: list[str] | None = None) -> None:
  args = common.parser(__doc__, rounds=9).parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # All group counts take turns too: the 64-to-4 ratio is then paired like the others.
  sides, padded = {}, {}
  for groups in GROUPS:
    load = loads(groups)
    sides[f"torch {groups}"] = make_torch(load)
    sides[f"ours {groups}"], padded[groups] = make_ours(load)
    sides[f"ragged_dot {groups}"] = make_ragged_dot(load)
  times = common.alternate(sides, args.rounds, warmup=2, least=0.05)

  few, many = GROUPS[0], GROUPS[-1]
  growth = common.paired(times[f"ours {many}"], times[f"ours {few}"])
  lines = []
  for peer, label in (("torch", "loop in torch"), ("ragged_dot", "ragged_dot")):
    for groups in GROUPS:
      theirs, mine = times[f"{peer} {groups}"], times[f"ours {groups}"]
      ratio = common.paired(theirs, mine)
      aimed = peer == "ragged_dot" and groups == many
      flops = 3 * 2 * ROWS * WIDTH_IN * WIDTH_OUT
      lines.append(common.Line(
          f"grouped matmul, {groups} groups, against {label}",
          common.times_text(theirs), common.times_text(mine), ratio,
          ">= 10x ragged_dot" if aimed else "-", ratio >= 10 if aimed else None,
          {"peer": common.summary(theirs), "ours": common.summary(mine),
           "ours_flops_per_s": flops / min(mine), "padded_rows": padded[groups]}))
  lines.append(common.Line(f"grouped matmul, {many} groups over {few}",
                           common.times_text(times[f"ours {few}"]),
                           common.times_text(times[f"ours {many}"]), growth,
                           "<= 2x the time", growth <= 2))
  common.report("grouped_matmul", lines, args.save)


if __name__ == "__main__":
  main()
