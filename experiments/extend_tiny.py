"""Does YaRN carry a model from 256 tokens to 8,192?  (report 4.3, figure 8, small)

The report pretrains at 4K and extends to 32K and 128K: 8 and 32 times. So do we from 256, to 2,048
and 8,192, with the report's form: as many tokens in both phases, the batch a quarter where the
length is four times, one rate. The text tells values of words and asks for them later, between
sentences that say nothing, so that a model of 0.7M parameters learns to recall.

Run:      dsv3 train --config=experiments/extend_tiny.py
          python -m benchmarks.extension     all arms, needles over length and depth, the figure
Arg:      no_yarn   the same training, plain RoPE throughout
          untrained   YaRN put on the pretrained model, without further training
Cost:     10 minutes on a CPU core for an arm, 20 for all, which share the pretraining
Expected: as pretrained every needle up to 512 tokens and half of them at 8,192; with YaRN nearly
          all, trained or not; trained without it 80 %. See LOG.md and figures/extension.png.

A needle is the only value in its haystack. Which of several values belongs to a word the model does
not learn in so few tokens: between two it guesses.

YaRN's s is the report's, 40: there too the lengths end at 32 times the pretrained one. So is alpha,
1: a pair that never turned once in pretraining has to be slowed at any scale. beta is 32 in the
report, where the fastest pair turns 652 times in 4,096 tokens; in 256 tokens it turns 41 times, and
with 8 the share of pairs that are left alone is about the report's (6 of 16, there 11 of 32). The
base is 100: with 10,000 most pairs would not turn once in 256 tokens; now 3 of 16 do not, in the
report 9 of 32.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dsv3_jax.config import (
  Attention,
  Config,
  ConfigError,
  Data,
  Loss,
  Model,
  MoE,
  Optim,
  Runtime,
  Train,
)

KEYS = tuple("""ant bat bear bee boar bull calf cat clam cod cow crab crow deer dog duck elk fox
frog goat hare hen horse lamb lion mole mouse owl pig ram seal wolf""".split())
VALUES = tuple("""amber black blue brown gold green grey ivory navy olive orange pink red teal
violet white""".split())
TEMPLATE = "{key} {value}"
LENGTHS = (256, 2048, 8192)
TOKENS = 8192  # of a step, in all stages
TEXT = (6_000_000, 3_000_000, 3_000_000)  # tokens that are generated for each stage


def get_config(arg: str | None = None) -> Config:
  """The pretraining; `arg` may be "no_yarn" or "untrained"."""
  if arg not in (None, "no_yarn", "untrained"):
    raise ConfigError(f"experiments/extend_tiny.py:{arg}: the argument is no_yarn or untrained")
  attention = Attention(heads=4, q_rank=0, kv_rank=64, nope_dim=32, rope_dim=32, v_dim=32,
                        rope_theta=100.0)
  return Config(
      model=Model(vocab_size=1024, dim=128, layers=2, dense_layers=1, dense_ffn_dim=256,
                  attention=attention, mtp_depth=0, init_std=0.08,
                  moe=MoE(experts=8, active=2, ffn_dim=64, groups=4, active_groups=2)),
      runtime=Runtime(layer_unroll=0),
      optim=Optim(lr=2e-3, warmup_steps=50, lr_constant_until=0.7, lr_cosine_until=1.0,
                  lr_final=2e-4, lr_last_from=1.0),
      loss=Loss(bias_until=1.0),
      data=Data(sources=(_text(0),), sequence_length=LENGTHS[0], batch_size=16, isolate=True,
                fim_rate=0.0, split_rate=0.0, validation_fraction=0.02),
      train=Train(tokens=6e6, eval_every=500, checkpoint_every=500, sample_tokens=0))


def stages(arg: str | None = None) -> Iterator[dict[str, Any]]:
  """Pretraining and two extensions, or YaRN alone."""
  yarn = {} if arg == "no_yarn" else {
      "model.attention.yarn": {"factor": 40.0, "original_length": LENGTHS[0], "beta_fast": 8.0}}
  yield {"stage": "pretrain"}
  still = {"optim.warmup_steps": 0, "loss.bias_speed": 0.0}
  if arg == "untrained":  # a step at a rate of 0: the parameters with another config
    rates = {f"optim.{name}": 0.0 for name in ("lr", "lr_final", "lr_last")}
    yield {"stage": "extend", "train.tokens": TOKENS, "train.eval_every": 0, **rates, **still,
           **yarn, **_long(1)}
    return
  for i, name in ((1, "extend_1"), (2, "extend_2")):
    yield {"stage": name, "train.tokens": 40 * TOKENS, "train.eval_every": 20, "optim.lr": 5e-4,
           "optim.lr_constant_until": 1.0, **still, **yarn, **_long(i)}


def _long(i: int) -> dict[str, Any]:
  """What a phase's length changes."""
  return {"data.sources": (_text(i),), "data.sequence_length": LENGTHS[i],
          "data.batch_size": TOKENS // LENGTHS[i], "train.eval_batches": 2,
          "runtime.remat": "report"}


def _text(i: int) -> str:
  return f"python:experiments/extend_tiny.py:documents:{i}"


def documents(stage: str) -> Iterator[str]:
  """The text of a stage: sentences between which values are told, each asked for once later.

  Documents have between 1/16 and 3/2 of the stage's sequence, evenly by logarithm, and from one
  value on up to one for six tokens. Whoever repeats a word repeats its value: what is asked looks
  like what was told.
  """
  from dsv3_jax.evals import needle

  length, left = LENGTHS[int(stage)], TEXT[int(stage)]
  sentences = needle.plain_filler().splitlines()
  rng = np.random.default_rng([7, int(stage)])
  while left > 0:
    tokens = round(length * np.exp(rng.uniform(np.log(1 / 16), np.log(3 / 2))))
    most = min(max(tokens // 6, 1), len(KEYS) // 2)
    told = round(np.exp(rng.uniform(0, np.log(most))))
    keys, values = rng.permutation(KEYS)[:told], rng.choice(VALUES, told)
    facts = [TEMPLATE.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    places = np.sort(rng.random((told, 2)), 1)
    lines = [(p, f) for pair, f in zip(places, facts, strict=True) for p in pair]
    plain = int(rng.integers(2)) * max((tokens - 6 * told) // 13, 0)
    which = rng.integers(len(sentences), size=plain)
    lines += [(p, sentences[i]) for p, i in zip(rng.random(plain), which, strict=True)]
    yield "".join(f"{line}\n" for _, line in sorted(lines))
    left -= 6 * told + 13 * plain
