"""Attention at 8,192 tokens: blockwise against the naive form, forward and backward.

Peak temporary memory is the compiler's own figure (`compiled.memory_analysis()`), inputs and
outputs left out, of a function that gives output and all three gradients. Heads have the widths
48 / 32 of the tiny model, fp32, causal.

    python -m benchmarks.attention
"""

import os

from benchmarks import common

TOKENS, HEADS, WIDTH_QK, WIDTH_V = 8192, 2, 48, 32


def make(impl: str, tokens: int, heads: int, block: int):
  """(forward and backward, bytes of temporary memory)."""
  import jax
  import jax.numpy as jnp

  from dsv3_jax import ops

  keys = jax.random.split(jax.random.key(0), 4)
  widths = (WIDTH_QK, WIDTH_QK, WIDTH_V, WIDTH_V)
  q_BTHK, k_BTHK, v_BTHU, do_BTHU = (
      jax.random.normal(key, (1, tokens, heads, width), jnp.float32)
      for key, width in zip(keys, widths, strict=True))

  def both(q_BTHK, k_BTHK, v_BTHU, do_BTHU):
    def forward(q, k, v):
      return ops.attention(q, k, v, scale=WIDTH_QK**-0.5, impl=impl, block=block)

    o_BTHU, back = jax.vjp(forward, q_BTHK, k_BTHK, v_BTHU)
    return o_BTHU, back(do_BTHU)

  args = (q_BTHK, k_BTHK, v_BTHU, do_BTHU)
  compiled = jax.jit(both).lower(*args).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  return lambda: jax.block_until_ready(compiled(*args)), memory


def main(argv: list[str] | None = None) -> None:
  from dsv3_jax import config

  p = common.parser(__doc__, rounds=5)
  p.add_argument("--tokens", type=int, default=TOKENS)
  p.add_argument("--heads", type=int, default=HEADS)
  p.add_argument("--block", type=int, default=config.Runtime().attention_block)
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  naive, naive_bytes = make("reference", args.tokens, args.heads, args.block)
  ours, ours_bytes = make("xla", args.tokens, args.heads, args.block)
  times = common.alternate({"naive": naive, "ours": ours}, args.rounds)
  speed = common.paired(times["naive"], times["ours"])
  what = f"attention, {args.tokens} tokens, {args.heads} heads"
  lines = [
      common.Line(f"{what}: memory", f"{naive_bytes / 2**20:.0f} MiB",
                  f"{ours_bytes / 2**20:.1f} MiB", naive_bytes / ours_bytes,
                  "under 1/10 (> 10x)", naive_bytes > 10 * ours_bytes,
                  {"peer_bytes": naive_bytes, "ours_bytes": ours_bytes, "block": args.block}),
      common.Line(f"{what}: time", common.times_text(times["naive"]),
                  common.times_text(times["ours"]), speed, "not slower (>= 1x)", speed >= 1,
                  {"peer": common.summary(times["naive"]), "ours": common.summary(times["ours"])}),
  ]
  common.report("attention", lines, args.save)


if __name__ == "__main__":
  main()
