"""Training step on the CPU: ours against transformers' DeepseekV3ForCausalLM in torch.

Both take the same shapes, fp32, batch 8 x 256, next-token loss, AdamW with decoupled decay and
clipping of the global norm at 1. Ours is the trainer's own compiled step with donated state: it
also has the sequence-wise balance loss, the router-bias update, the statistics and the check for
NaN, which the peer lacks; MTP is off, because the peer has none. The peer runs with its fastest
settings, found on this machine first: expert implementation (its own loop, or grouped matmul),
attention (scaled-dot-product or eager) and AdamW (fused or foreach).

    python -m benchmarks.train_step                 both shapes
    python -m benchmarks.train_step --shape a --ours --profile    where our step's time goes
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable

from benchmarks import common, trace

BATCH, LENGTH, VOCAB = 8, 256, 8192
LR, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0
PEAK_SIZE = 2048  # of the square matmul that stands for the machine's peak
SHAPES = {
    "a": dict(experts=16, active=4, groups=4, active_groups=2, ffn_dim=128),
    "b": dict(experts=64, active=8, groups=8, active_groups=4, ffn_dim=64),
}


def model_config(shape: str):
  """Our model section of a shape; MTP off."""
  from dsv3_jax import config
  return config.Model(vocab_size=VOCAB, dim=256, layers=4, dense_layers=1, dense_ffn_dim=768,
                      attention=config.Attention(heads=8, q_rank=128, kv_rank=64, nope_dim=32,
                                                 rope_dim=16, v_dim=32),
                      moe=config.MoE(**SHAPES[shape]), mtp_depth=0)


def step_flops(shape: str) -> float:
  """Floating-point operations a step needs: forward and twice that backward, nothing recomputed."""
  from dsv3_jax import counts
  return BATCH * LENGTH * counts.flops_per_token(model_config(shape), LENGTH)


def batches(count: int = 8):
  """An endless cycle of random token batches, numpy int32 [B, T + 1]."""
  import numpy as np
  rng = np.random.default_rng(0)
  # Zipf-like frequencies, so that routing has something to learn from.
  weight = 1 / np.arange(1, VOCAB + 1)
  made = [rng.choice(VOCAB, (BATCH, LENGTH + 1), p=weight / weight.sum()).astype(np.int32)
          for _ in range(count)]
  return itertools.cycle(made)


# --- ours ---------------------------------------------------------------------------------------


def ours(shape: str, **runtime) -> tuple[Callable[[], float], Callable[[], str]]:
  """(one step that returns its loss, the compiled step's HLO text)."""
  import jax
  import numpy as np

  from dsv3_jax import config
  from dsv3_jax.train import optim, state, step

  cfg = config.Config(
      model=model_config(shape), runtime=config.Runtime(**{"layer_unroll": 0, **runtime}),
      optim=config.Optim(lr=LR, weight_decay=WEIGHT_DECAY, clip_norm=CLIP),
      data=config.Data(batch_size=BATCH, sequence_length=LENGTH))
  optimizer = optim.make_optimizer(cfg.optim)
  graphdef, _, init = state.initializer(lambda: state.build_model(cfg.model, 0), optimizer)
  train_step = step.make_train_step(graphdef, cfg, optimizer)
  hyper = state.Hyper(lr=np.float32(LR), bias_speed=np.float32(1e-3), mtp_weight=np.float32(0))
  feed, held = batches(), {"state": init()}

  def run() -> float:
    batch = {"tokens": next(feed)[None]}
    held["state"], metrics = train_step(held["state"], batch, hyper)
    jax.block_until_ready(held["state"])
    return float(metrics["loss"])

  def hlo() -> str:
    lowered = train_step.lower(held["state"], {"tokens": next(feed)[None]}, hyper)
    return lowered.compile().as_text()

  return run, hlo


# --- peer ---------------------------------------------------------------------------------------


def peer(shape: str, experts: str, attention: str, adamw: str) -> Callable[[], float]:
  """One step of the peer with the given settings, as a function that returns its loss."""
  import torch
  from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

  torch.manual_seed(0)
  torch.set_num_threads(common.cores())
  m = model_config(shape)
  a, e = m.attention, m.moe
  cfg = DeepseekV3Config(
      vocab_size=VOCAB, hidden_size=m.dim, intermediate_size=m.dense_ffn_dim,
      moe_intermediate_size=e.ffn_dim, num_hidden_layers=m.layers, num_attention_heads=a.heads,
      num_key_value_heads=a.heads, n_shared_experts=e.shared, n_routed_experts=e.experts,
      routed_scaling_factor=e.scale, kv_lora_rank=a.kv_rank, q_lora_rank=a.q_rank,
      qk_rope_head_dim=a.rope_dim, v_head_dim=a.v_dim, qk_nope_head_dim=a.nope_dim,
      n_group=e.groups, topk_group=e.active_groups, num_experts_per_tok=e.active,
      first_k_dense_replace=m.dense_layers, max_position_embeddings=LENGTH,
      initializer_range=m.init_std, use_cache=False, num_mtp_layers=0,
      attn_implementation=attention, experts_implementation=experts)
  model = DeepseekV3ForCausalLM(cfg).float().train()
  used = (model.config._attn_implementation, model.config._experts_implementation)
  assert used == (attention, experts), (used, attention, experts)
  matrices = [p for p in model.parameters() if p.ndim > 1]
  vectors = [p for p in model.parameters() if p.ndim == 1]
  optimizer = torch.optim.AdamW(
      [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=LR, betas=(0.9, 0.95),
      eps=1e-8, weight_decay=WEIGHT_DECAY, **{adamw: True})
  feed = batches()

  def run() -> float:
    tokens = torch.from_numpy(next(feed)).long()
    optimizer.zero_grad(set_to_none=True)
    labels = tokens[:, 1:].contiguous()
    loss = model(input_ids=tokens[:, :-1], labels=labels, shift_labels=labels, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, foreach=True)
    optimizer.step()
    return loss.item()

  return run


def fastest_peer(shape: str) -> tuple[Callable[[], float], str]:
  """The peer with the settings that are fastest here, and their description.

  Its third expert implementation, batched_mm, copies one weight matrix for every token and choice
  (gigabytes a layer here), so it is not a candidate.
  """
  candidates = {" ".join(c): peer(shape, *c) for c in itertools.product(
      ("eager", "grouped_mm"), ("sdpa", "eager"), ("fused",))}
  times = common.alternate(candidates, 3)
  best = min(times, key=lambda name: min(times[name]))
  experts, attention, fused = best.split()
  optimizers = {fused: candidates[best], "foreach": peer(shape, experts, attention, "foreach")}
  times |= common.alternate({"foreach": optimizers["foreach"]}, 3)
  for name, found in times.items():
    print(f"  peer {name}: {common.times_text(found)}")
  adamw = "foreach" if min(times["foreach"]) < min(times[best]) else fused
  return optimizers[adamw], f"experts {experts}, attention {attention}, AdamW {adamw}"


# --- peak ---------------------------------------------------------------------------------------


def peaks() -> dict[str, Callable[[], object]]:
  """Large square matmuls of both libraries."""
  import jax
  import jax.numpy as jnp
  import torch

  x = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32)
  matmul = jax.jit(lambda a: a @ a)
  t = torch.ones((PEAK_SIZE, PEAK_SIZE))
  return {"matmul jax": lambda: matmul(x).block_until_ready(), "matmul torch": lambda: t @ t}


def profile(shape: str, steps: int, top: int, hlo_path: str | None, **runtime) -> None:
  """Prints where our step's time goes, by operation."""
  run, hlo = ours(shape, **runtime)
  for _ in range(3):
    run()
  start = time.perf_counter()
  for _ in range(steps):
    run()
  wall = (time.perf_counter() - start) / steps
  text = hlo()
  if hlo_path:
    with open(hlo_path, "w", encoding="utf-8") as file:
      file.write(text)
  with trace.capture() as found:
    for _ in range(steps):
      run()
  print(f"shape ({shape}): {common.seconds(wall)} a step untraced")
  print(trace.table(found.events(), text, steps, top))


def compare(shape: str, rounds: int, **runtime) -> list[common.Line]:
  """Times both sides of one shape."""
  print(f"shape ({shape})")
  theirs, settings = fastest_peer(shape)
  mine, _ = ours(shape, **runtime)
  first = theirs(), mine()
  assert max(first) - min(first) < 1 and 7 < first[0] < 11, f"losses do not look alike: {first}"
  times = common.alternate({"peer": theirs, "ours": mine, **peaks()}, rounds, warmup=8)
  flops = step_flops(shape)
  rates = {name: 2 * PEAK_SIZE**3 / statistics.median(times[name])
           for name in ("matmul jax", "matmul torch")}
  peak = max(rates.values())
  ratio = common.paired(times["peer"], times["ours"])
  part = {side: flops / statistics.median(times[side]) / peak for side in ("peer", "ours")}
  print(f"  peer: {settings}")
  print(f"  {flops / 1e9:.1f} GFLOP a step; matmul of {PEAK_SIZE}: "
        + ", ".join(f"{n.split()[1]} {r / 1e9:.0f} GFLOP/s" for n, r in rates.items()))
  details = {"peer": common.summary(times["peer"]), "ours": common.summary(times["ours"]),
             "pairs": list(zip(times["peer"], times["ours"], strict=True)),
             "peer_settings": settings, "flops": flops, "matmul_flops_per_s": rates,
             "fraction_of_peak": part,
             "tokens_per_s": {s: BATCH * LENGTH / statistics.median(times[s]) for s in part}}
  return [
      common.Line(f"train step ({shape}) {model_config(shape).moe.experts} experts",
                  common.times_text(times["peer"]), common.times_text(times["ours"]), ratio,
                  ">= 1.8x, aim 2.3x", ratio >= 1.8, details),
      common.Line(f"train step ({shape}) fraction of matmul peak", f"{part['peer']:.1%}",
                  f"{part['ours']:.1%}", part["ours"] / part["peer"], "aim > 60 %",
                  part["ours"] > 0.6),
  ]


def only_ours(shape: str, rounds: int, **runtime) -> list[common.Line]:
  """Times our step alone, for work on it."""
  mine, _ = ours(shape, **runtime)
  peak = peaks()["matmul jax"]
  times = common.alternate({"ours": mine, "peak": peak}, rounds, warmup=2)
  part = step_flops(shape) / (2 * PEAK_SIZE**3) * common.paired(
      times["peak"], times["ours"])
  return [common.Line(f"train step ({shape}), ours alone", "-", common.times_text(times["ours"]),
                      None, f"{part:.1%} of matmul peak",
                      details={"ours": common.summary(times["ours"])})]


def _runtime(settings: list[str]) -> dict:
  """key=value arguments as fields of `config.Runtime`."""
  values = dict(s.split("=", 1) for s in settings)
  return {k: int(v) if v.isdigit() else v for k, v in values.items()}


def main(argv: list[str] | None = None) -> None:
  parser = common.parser(__doc__, rounds=10)
  parser.add_argument("--shape", choices=(*SHAPES, "both"), default="both")
  parser.add_argument("--ours", action="store_true", help="leave the peer out")
  parser.add_argument("--runtime", nargs="*", default=[], metavar="KEY=VALUE",
                      help="fields of config.Runtime, for example head_chunk=2048")
  parser.add_argument("--profile", action="store_true", help="time by operation of our step")
  parser.add_argument("--steps", type=int, default=5, help="steps in the profile")
  parser.add_argument("--top", type=int, default=30, help="operations in the profile")
  parser.add_argument("--hlo", metavar="FILE", help="with --profile: write the optimised HLO")
  args = parser.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from dsv3_jax import host
  host.keep_memory()  # as the trainer does, before any thread starts; the peer gains from it too
  runtime = _runtime(args.runtime)
  shapes = tuple(SHAPES) if args.shape == "both" else (args.shape,)
  if args.profile:
    for shape in shapes:
      profile(shape, args.steps, args.top, args.hlo, **runtime)
    return
  lines = []
  for shape in shapes:
    lines += (only_ours if args.ours else compare)(shape, args.rounds, **runtime)
  common.report("train_step", lines, args.save)


if __name__ == "__main__":
  main()
