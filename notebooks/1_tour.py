# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/1_tour.ipynb)
#
# # A tour: build, look, train, sample
#
# DeepSeek-V3 ([the report](https://arxiv.org/abs/2412.19437)) at the size of a laptop, with every
# mechanism on: latent attention, sparse experts chosen in groups, balancing by bias, multi-token
# prediction. It takes a minute or two on two CPU cores. The same code and the same kind of
# configuration describe the 671B model.

# %%
# Installs what is missing, on Colab for one; where dsv3_jax can be imported nothing happens.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dsv3_jax") is None:
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet",
                  "dsv3-jax[notebooks] @ git+https://github.com/dsv3-jax/dsv3-jax"], check=True)

# %% tags=["parameters"]
import os

# live: with sliders; static: pictures in their place; fast: small as well, for the tests.
MODE = os.environ.get("DSV3_NOTEBOOK", "live")

# %%
import os
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import treescope
from flax import nnx
from IPython.display import HTML, Markdown

from dsv3_jax import config, counts
from dsv3_jax.analysis import plots, workdir
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.train import evaluate, metrics, run, sample, state

# %matplotlib inline
plt.rcParams["figure.dpi"] = 100  # a figure on a cell's last line is shown
FAST = MODE == "fast"


def table(*rows):
  """Markdown of rows of cells, the first of them the head."""
  lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
  lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
  return Markdown("\n".join(lines))


# %% [markdown]
# ## A configuration
#
# One frozen dataclass says everything about a run
# ([config.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/config.py) has every key, its
# default and its meaning). `model` fixes the parameters, `runtime` how they are computed, and the
# rest is the training. Combinations that cannot run die here, with a message that says what would:

# %%
model = config.Model(
    vocab_size=1024, dim=128, layers=3, dense_layers=1, dense_ffn_dim=384, init_std=0.02,
    attention=config.Attention(heads=4, q_rank=64, kv_rank=32, nope_dim=32, rope_dim=16, v_dim=32),
    moe=config.MoE(experts=16, active=4, shared=1, ffn_dim=64, groups=4, active_groups=2),
    mtp_depth=1)
try:
  config.replace(model, **{"moe.active": 12})
except config.ConfigError as error:
  print(error)


# %% [markdown]
# ## The model
#
# Parameters are named after what the report calls them, and end in their shape: `w_dkv_DZ` is the
# down-projection to the latent, from D channels to Z = C + R numbers. Layers of a kind are stacked
# along a leading axis and run by one loop, so that there are few arrays, however deep the model.
# Click to unfold (in Jupyter and Colab; the table below is for readers without scripts).

# %%
def build(cfg=model):
  return Transformer(cfg, rngs=nnx.Rngs(0))


transformer = nnx.jit(build)()
HTML(treescope.render_to_html(nnx.eval_shape(build)))

# %%
_, params, biases = state.split(transformer)
sizes = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in params.items()}
table(("part", "parameters", "arrays"), *(
    (f"`{part}`", f"{size:,}", len(jax.tree.leaves(params[part]))) for part, size in sizes.items()))

# %% [markdown]
# Closed forms count them without building anything, for the 671B model too: of its parameters a
# token meets one in eighteen. And the model itself can be built without memory, as shapes alone:

# %%
v3 = config.preset("v3_671b")
here, there = counts.parameters(model), counts.parameters(v3)
assert sum(here.values()) == sum(sizes.values()) + sum(x.size for x in jax.tree.leaves(biases))
assert there["main"] == 671_026_419_200
shapes = nnx.eval_shape(lambda: build(v3))
print(f"{len(jax.tree.leaves(nnx.state(shapes)))} arrays hold the 671B model")
table(("", "this one", "671B"),
      ("parameters", f"{here['main']:,}", f"{there['main']:,}"),
      ("activated by a token", f"{counts.activated_parameters(model)['main']:,}",
       f"{counts.activated_parameters(v3)['main']:,}"),
      ("more, in the MTP module", f"{here['mtp']:,}", f"{there['mtp']:,}"),
      ("FLOPs to train on a token of 4K", f"{counts.flops_per_token(model, 4096):.3g}",
       f"{counts.flops_per_token(v3, 4096):.3g}"))

# %% [markdown]
# ## Before training
#
# A forward pass gives logits for the next token, those of the MTP module for the token after it,
# and how many tokens each expert got. A model that knows nothing spreads its bets evenly: its loss
# is the logarithm of the vocabulary.

# %%
tokens_BT = jax.random.randint(jax.random.key(0), (2, 64), 0, model.vocab_size)
out = transformer(tokens_BT)
log_p = jax.nn.log_softmax(out.logits_BTV[:, :-1])
loss = -jnp.take_along_axis(log_p, tokens_BT[:, 1:, None], -1).mean()
print("logits", out.logits_BTV.shape, "  MTP", out.mtp_logits[0].shape,
      "  tokens of each layer's experts", out.counts_LE.shape)
print(f"loss {loss:.2f}, ln {model.vocab_size} = {np.log(model.vocab_size):.2f}")
assert abs(float(loss) - np.log(model.vocab_size)) < 0.1

# %% [markdown]
# ## Train
#
# The text is part of Python's own standard library, so nothing is downloaded. `run` prepares it (a
# byte-level BPE tokenizer is trained first), trains, evaluates, and leaves everything in a folder:
# checkpoints, `metrics.jsonl`, TensorBoard files. The same call goes on with an interrupted run. It
# is the one training loop of this code base; `dsv3 train` calls it too.

# %% tags=["varies"]
library = os.path.dirname(os.__file__)
folders = ("json",) if FAST else ("asyncio", "email", "http", "json", "logging", "unittest")
steps, batch, length = (4, 2, 32) if FAST else (240, 8, 128)
cfg = config.Config(
    model=model, runtime=config.Runtime(layer_unroll=0),
    optim=config.Optim(lr=3e-3, warmup_steps=0 if FAST else 24, lr_final=3e-4, lr_last=1e-4,
                       lr_constant_until=0.5, lr_cosine_until=0.95, lr_last_from=0.97,
                       ema_decay=0.95, ema_every=2),
    loss=config.Loss(bias_speed=0.01),
    data=config.Data(sources=tuple(f"{library}/{folder}/*.py" for folder in folders),
                     sequence_length=length, batch_size=batch),
    train=config.Train(tokens=steps * batch * length, eval_every=max(steps // 4, 2), eval_batches=2,
                       checkpoint_every=steps, sample_tokens=0))
folder = tempfile.mkdtemp()
result = run(cfg, folder, ui=None if MODE == "live" else metrics.Silent())
final = result.summary["final"]
print(f"{result.step} steps; validation loss {final['loss']:.2f} nats a token, "
      f"{final['bits_per_byte']:.2f} bits a byte")

# %% [markdown]
# ## Curves
#
# Everything that a run writes can be read back; these are the figures of `dsv3 report`.

# %%
found = workdir.read(folder)
assert found.finished and found.train[-1]["loss"] < found.train[0]["loss"]
plots.loss(found)

# %% [markdown]
# Beside it, what compressors make of the same held-out text. A unigram model knows how often a
# token occurs and nothing else; gzip and xz saw the same text and had no training.

# %%
plots.compression(found)

# %% [markdown]
# The MTP module predicts the token after the next one, from the main model's representation and the
# next token. With that token given it knows as much as the main model does one position later, so
# the losses are comparable:

# %%
plots.mtp_loss(found)

# %% [markdown]
# Loads of the experts. **MaxVio** is the busiest expert's load above the mean: the bias that each
# expert's selection has (notebook 3) brings it down while the model learns. Below, the load of each
# expert at the end.

# %%
plots.max_violation(found)

# %%
plots.expert_load(found)

# %% [markdown]
# ## Sample
#
# The averaged parameters (EMA) of the last checkpoint go on with a beginning of our own. A model of
# 1.4 million parameters that has read a quarter of a million tokens writes something that looks
# like Python from afar.

# %% tags=["varies"]
at = evaluate.find(folder)
_, params, biases = evaluate.load(at, ema=True)
tokenizer = at.corpus.tokenizer
sampler = sample.make_sampler(state.split(transformer)[0], cfg.runtime, tokenizer.vocab_size)
prompts = ["def __init__(self, ", "class Test", "    for key in "]
steps = 4 if FAST else 60
texts = sample.generate(sampler, params, biases,
                        [[tokenizer.bos, *tokenizer.encode(p)] for p in prompts], steps,
                        temperature=0.6, stop=(tokenizer.eos,))
for prompt, text in zip(prompts, texts):
  print(f"{prompt}\033[34m{tokenizer.decode(text)}\033[0m\n{'-' * 60}")

# %% [markdown]
# ## Where to go on
#
# * `dsv3 train --config=experiments/tiny.py` trains a 10M-parameter model for five minutes and ends
#   with a page;
#   [experiments](https://github.com/dsv3-jax/dsv3-jax/tree/main/experiments) has larger ones, and
#   the report's ablations.
# * Notebooks 2 to 5 take the mechanisms one by one: latent attention, routing, FP8, pipelines.
#   Notebook 6 asks what training at scale costs, and 7 compares runs.
