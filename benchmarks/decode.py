"""Decoding on the CPU against transformers' DeepseekV3ForCausalLM: the same weights, greedy, fp32.

Shapes are those of `benchmarks.train_step` (a). A call of `generate` takes a batch of prompts and
writes new tokens; both sides write the same ones, which is checked. The peer runs with the faster
of its expert implementations. The limit is what reading every weight once a step takes, at the
bandwidth of a copy in memory.

    python -m benchmarks.decode
"""

import os
import tempfile
import time

from benchmarks import common, train_step

BATCH, PROMPT, NEW, LONG = 4, 128, 64, 2048
CONTEXTS = (512, 4096)


def sides():
  """(our generator, the peer by expert implementation) with one set of weights."""
  import torch
  from flax import nnx
  from transformers import DeepseekV3ForCausalLM

  from dsv3_jax.infer.generate import Generator
  from dsv3_jax.interop import huggingface
  from dsv3_jax.model.routing import RouterBias
  from dsv3_jax.train import state

  torch.set_num_threads(common.cores())
  cfg = train_step.model_config("a")
  model = state.build_model(cfg, 0)
  with tempfile.TemporaryDirectory() as folder:
    huggingface.save(model, folder)
    peers = {}
    for experts in ("eager", "grouped_mm"):
      peers[experts] = DeepseekV3ForCausalLM.from_pretrained(
          folder, dtype=torch.float32, experts_implementation=experts,
          attn_implementation="sdpa").eval()
  _, params, buffers = nnx.split(model, nnx.Param, RouterBias)
  return Generator(cfg, params, buffers), peers


def prompts(count: int, length: int):
  import numpy as np

  return np.random.default_rng(0).integers(2, train_step.VOCAB, (count, length)).astype(np.int32)


def bandwidth() -> float:
  """Bytes a second that a copy reads, the best of several."""
  import numpy as np

  source = np.ones(2**26, np.float32)
  target, best = np.empty_like(source), 0.0
  for _ in range(5):
    start = time.perf_counter()
    np.copyto(target, source)
    best = max(best, source.nbytes / (time.perf_counter() - start))
  return best


def peer_generate(model, tokens):
  """New tokens of transformers' generate."""
  import torch

  ids = torch.from_numpy(tokens).long()

  def run():
    with torch.inference_mode():
      out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
                           pad_token_id=0, eos_token_id=None)
    return out[:, tokens.shape[1]:].tolist()

  return run


def peer_prefill(model, tokens):
  """The last logits of a prompt, and its cache."""
  import torch

  ids = torch.from_numpy(tokens).long()

  def run():
    with torch.inference_mode():
      return model(ids, use_cache=True, logits_to_keep=1).logits

  return run


def prefill(generator, tokens):
  """The first token after prompts, over a new cache."""
  return lambda: generator(tokens.tolist(), 1)


def step_at(generator, context: int, steps: int = 32):
  """Calls of `steps` decode steps at a batch of 4 with `context` tokens in the cache of each."""
  import jax
  import numpy as np

  from dsv3_jax.infer import cache as cache_lib
  from dsv3_jax.infer import decode, sampler

  r = sampler.rows([sampler.GREEDY] * BATCH)
  cache = cache_lib.make(generator.cfg, BATCH, context + 64)
  length_B = np.full(BATCH, context, np.int32)

  def run():
    held = jax.tree.map(lambda x: x.copy(), cache)
    state = decode.State(cache_lib.Cache(held.layers, jax.numpy.asarray(length_B)),
                         jax.numpy.zeros(BATCH, "int32"), jax.numpy.full(BATCH, 99, "int32"), None,
                         None, jax.numpy.zeros((generator.cfg.moe_layers,
                                                generator.cfg.moe.experts)))
    jax.block_until_ready(state)
    start = time.perf_counter()
    made = decode.run(generator.weights, state, np.ones(BATCH, bool), r, None,
                      np.zeros(0, np.int32), np.int32(steps), most=steps, drafts=0,
                      cfg=generator.cfg, runtime=generator.runtime)
    jax.block_until_ready(made)
    return (time.perf_counter() - start) / steps

  return run


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=7)
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("HF_HUB_OFFLINE", "1")
  import jax
  generator, peers = sides()
  short, long = prompts(BATCH, PROMPT), prompts(1, LONG)

  def ours():
    return [c.tokens for c in generator(short.tolist(), NEW)]

  made = {name: peer_generate(model, short) for name, model in peers.items()}
  found = ours()
  assert all(run() == found for run in made.values())
  trial = common.alternate(made, 2)
  name = min(trial, key=lambda n: min(trial[n]))
  times = common.alternate({"peer": made[name], "ours": ours}, args.rounds)
  ratio = common.paired(times["peer"], times["ours"])
  weights = sum(x.nbytes for x in jax.tree.leaves(generator.weights._replace(embedding_VD=())))
  copy = bandwidth()
  limit = BATCH * copy / weights
  speed = lambda seconds: BATCH * NEW / min(seconds)
  text = lambda seconds: f"{BATCH * NEW / sorted(seconds)[len(seconds) // 2]:.0f} tokens/s"
  lines = [common.Line(
      f"generate: batch {BATCH}, prompt {PROMPT}, {NEW} new, greedy", text(times["peer"]),
      text(times["ours"]), ratio, "at least 5x", ratio >= 5,
      {"peer": common.summary(times["peer"]), "ours": common.summary(times["ours"]),
       "experts": name, "weights_bytes": weights, "copy_bytes_per_s": copy,
       "limit_tokens_per_s": limit, "share_of_limit": speed(times["ours"]) / limit})]
  made = {name: peer_prefill(model, long) for name, model in peers.items()}
  trial = common.alternate(made, 2)
  name = min(trial, key=lambda n: min(trial[n]))
  times = common.alternate({"peer": made[name], "ours": prefill(generator, long)}, args.rounds)
  ratio = common.paired(times["peer"], times["ours"])
  lines.append(common.Line(
      f"prefill of {LONG} tokens", common.times_text(times["peer"]),
      common.times_text(times["ours"]), ratio, "at least 3x", ratio >= 3,
      {"peer": common.summary(times["peer"]), "ours": common.summary(times["ours"]),
       "experts": name}))
  steps = {str(c): step_at(generator, c) for c in CONTEXTS}
  took = {c: [] for c in steps}
  for turn in range(args.rounds + 1):
    for c, run in steps.items():
      seconds = run()
      if turn:
        took[c].append(seconds)
  near, far = (took[str(c)] for c in CONTEXTS)
  growth = common.paired(far, near)
  lines.append(common.Line(
      f"a decode step at {CONTEXTS[1]} tokens over {CONTEXTS[0]}", common.times_text(near),
      common.times_text(far), growth, "under 2x", growth < 2,
      {"near": common.summary(near), "far": common.summary(far)}))
  print(f"weights {weights / 1e6:.1f} MB, copy {copy / 1e9:.1f} GB/s: reading them once a step "
        f"allows {limit:.0f} tokens/s")
  common.report("decode", lines, args.save)


if __name__ == "__main__":
  main()
