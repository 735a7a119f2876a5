"""Speculative decoding with the MTP module on a trained model: drafts kept, and time.

Prompts are beginnings of held-out documents of each domain (code, docstrings, tests, tables). Kept
drafts are counted by place and domain, greedy and drawn at temperature 1; greedy text is checked to
be the same with drafts and without. Times are of one request at a time, greedy, plain and with K
drafts taking turns. What a round costs beside a plain step says which gain is possible at all.

    make train
    python -m benchmarks.speculative --workdir=runs/tiny
"""

import os

from benchmarks import common

PROMPT, NEW, PROMPTS, DRAFTS = 64, 128, 8, (1, 2, 3)


def prompts(workdir: str):
  """(generator, tokenizer, {domain: prompts of PROMPT tokens})."""
  from dsv3_jax.data.domains import DEFAULT
  from dsv3_jax.infer.generate import Generator
  from dsv3_jax.train import checkpoint, domains, evaluate

  run = evaluate.find(workdir, None)
  params, buffers, _ = checkpoint.load_params(workdir)
  tokenizer, found = run.corpus.tokenizer, {}
  for domain in domains.collect([run], DEFAULT):
    ids = [tokenizer.encode(d.text[:20 * PROMPT]) for d in domain.documents]
    ids = [[tokenizer.bos, *i][:PROMPT] for i in ids if len(i) >= PROMPT]
    if ids:
      found[domain.name] = ids[:PROMPTS]
  return Generator(run.config.model, params, buffers), tokenizer, found


def kept(done) -> str:
  """Shares of kept drafts by place, and tokens a pass."""
  rounds = sum(c.rounds for c in done)
  shares = [sum(c) / rounds for c in zip(*(c.accepted for c in done), strict=True)]
  return f"{' '.join(f'{s:.0%}' for s in shares)}, {1 + sum(shares):.2f} a pass"


def main(argv: list[str] | None = None) -> None:
  p = common.parser(__doc__, rounds=7)
  p.add_argument("--workdir", default="runs/tiny", help="of a trained model with MTP")
  args = p.parse_args(argv)
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from dsv3_jax.infer.sampler import Sampling

  generator, _, by_domain = prompts(args.workdir)
  lines = []
  for name, found in by_domain.items():
    plain = generator(found, NEW)
    for K in DRAFTS:
      drafted = generator(found, NEW, drafts=K)
      assert [c.tokens for c in drafted] == [c.tokens for c in plain], "drafts changed the text"
      warm = generator(found, NEW, [Sampling(1.0, seed=i) for i in range(len(found))], drafts=K)
      lines.append(common.Line(
          f"{name}: {K} drafts kept, greedy / temperature 1", kept(drafted), kept(warm), None, "",
          None, {"greedy": [c.accepted for c in drafted], "greedy_rounds": [
              c.rounds for c in drafted], "drawn": [c.accepted for c in warm],
              "drawn_rounds": [c.rounds for c in warm]}))
  singles = [[found[0]] for found in by_domain.values()]  # one request at a time, of each domain
  each = lambda K: [generator(one, NEW, drafts=K)[0] for one in singles]
  sides = {str(K): lambda K=K: each(K) for K in (0, *DRAFTS)}
  times = common.alternate(sides, args.rounds)
  steps = sum(len(c.tokens) - 1 for c in each(0))
  step = min(times["0"]) / steps
  gains = {K: common.paired(times["0"], times[str(K)]) for K in DRAFTS}
  for K, gain in gains.items():
    rounds = sum(c.rounds for c in each(K))
    best = gain == max(gains.values())
    lines.append(common.Line(
        f"one request at a time, {K} drafts: a token", common.seconds(step),
        common.seconds(min(times[str(K)]) / steps), gain,
        "at least 1.3x with the best number" if best else "", gain >= 1.3 if best else None,
        {"plain": common.summary(times["0"]), "drafted": common.summary(times[str(K)]),
         "tokens": steps, "rounds": rounds,
         "round_over_step": min(times[str(K)]) / rounds / step}))
    print(f"{K} drafts: {steps / rounds:.2f} tokens a round, which takes "
          f"{min(times[str(K)]) / rounds / step:.2f} plain steps")
  common.report("speculative", lines, args.save)


if __name__ == "__main__":
  main()
