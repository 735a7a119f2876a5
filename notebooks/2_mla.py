# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/2_mla.ipynb)
#
# # Multi-head latent attention and its cache
#
# At inference a Transformer keeps the keys and values of every token it has seen. Multi-head latent
# attention (MLA, [section 2.1.1 of the report](https://arxiv.org/html/2412.19437#S2.SS1.SSS1))
# keeps one short vector instead, from which the keys and values of all heads could be made again,
# and then never makes them. This notebook holds the report's equations 1 to 11 against the code
# ([model/mla.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/model/mla.py)), decodes
# from the cache, and counts bytes.

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
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import Markdown, display

from dsv3_jax import config, ops
from dsv3_jax.analysis import plots
from dsv3_jax.model import mla, rope

# %matplotlib inline
plt.rcParams["figure.dpi"] = 100  # a figure on a cell's last line is shown


def play(draw, **sliders):
  """Sliders over what `draw` shows, where someone can move them; else its picture as it stands."""
  if MODE == "live":
    try:
      from ipywidgets import interact
      interact(draw, **sliders)
      return
    except ImportError:
      print("ipywidgets is not installed: a picture in place of sliders")
  display(draw())


def table(*rows):
  """Markdown of rows of cells, the first of them the head."""
  lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
  lines.insert(1, "|---" + "|---:" * (len(rows[0]) - 1) + "|")
  return Markdown("\n".join(lines))


# %% [markdown]
# ## The parameters
#
# Names end in their shape, one letter an axis; the letters are the
# [house's](https://github.com/dsv3-jax/dsv3-jax/blob/main/CONTRIBUTING.md#names-and-shapes). Here a
# width D of 256, H = 4 heads, latents of Q = 96 for queries and C = 64 for keys and values. A query
# or key has N = 32 dimensions without position and R = 16 that are rotated by it, a value U = 32.

# %%
cfg = config.Model(dim=256, init_std=0.06, attention=config.Attention(
    heads=4, q_rank=96, kv_rank=64, nope_dim=32, rope_dim=16, v_dim=32))
layer = mla.MLA(cfg, rngs=nnx.Rngs(0))
names = {"w_dq_DQ": "$W^{DQ}$", "q_norm_Q": "norm of $c^Q$", "w_uq_QHK": "$W^{UQ}$ and $W^{QR}$",
         "w_dkv_DZ": "$W^{DKV}$ and $W^{KR}$", "kv_norm_C": "norm of $c^{KV}$",
         "w_ukv_CHW": "$W^{UK}$ and $W^{UV}$", "w_o_HUD": "$W^O$"}
params = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in names}
table(("parameter", "in the report", "shape"),
      *((f"`{name}`", names[name], " x ".join(map(str, w.shape))) for name, w in params.items()))

# %% [markdown]
# ## Equations 1 to 11, written out
#
# Plain numpy in float64, one line an equation. The report's text adds two things that the equations
# leave out: both latents are RMS-normalised before they are expanded, and the rotary key is not.
# $h$ is a sequence of T token vectors; `@` contracts as the einsum's letters say.

# %%
a, T = cfg.attention, 24
h_TD = np.random.default_rng(0).normal(size=(T, cfg.dim))


def norm(x, gain):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + a.latent_norm_eps) * gain


def rotate(x):
  """RoPE: adjacent pairs are complex numbers, turned by position times frequency."""
  pairs = x[..., 0::2] + 1j * x[..., 1::2]
  angle = np.arange(T)[:, None] * a.rope_theta ** (-np.arange(0, a.rope_dim, 2) / a.rope_dim)
  pairs = pairs * np.exp(1j * angle).reshape(T, *[1] * (x.ndim - 2), -1)
  return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


C, N = a.kv_rank, a.nope_dim
w_dkv, w_kr = params["w_dkv_DZ"][:, :C], params["w_dkv_DZ"][:, C:]
w_uk, w_uv = params["w_ukv_CHW"][..., :N], params["w_ukv_CHW"][..., N:]
w_uq, w_qr = params["w_uq_QHK"][..., :N], params["w_uq_QHK"][..., N:]

c_kv_TC = norm(h_TD @ w_dkv, params["kv_norm_C"])               # (1)
k_c_THN = np.einsum("tc,chn->thn", c_kv_TC, w_uk)               # (2)
k_r_TR = rotate(h_TD @ w_kr)                                    # (3)  one for all heads
k_THK = np.concatenate(                                         # (4)
    [k_c_THN, np.broadcast_to(k_r_TR[:, None], (T, a.heads, a.rope_dim))], -1)
v_THU = np.einsum("tc,chu->thu", c_kv_TC, w_uv)                 # (5)
c_q_TQ = norm(h_TD @ params["w_dq_DQ"], params["q_norm_Q"])     # (6)
q_c_THN = np.einsum("tq,qhn->thn", c_q_TQ, w_uq)                # (7)
q_r_THR = rotate(np.einsum("tq,qhr->thr", c_q_TQ, w_qr))        # (8)
q_THK = np.concatenate([q_c_THN, q_r_THR], -1)                  # (9)
scores_HTS = np.einsum("thk,shk->hts", q_THK, k_THK) / np.sqrt(N + a.rope_dim)
scores_HTS[:, np.triu(np.ones((T, T), bool), 1)] = -np.inf
weights_HTS = np.exp(scores_HTS - scores_HTS.max(-1, keepdims=True))
weights_HTS /= weights_HTS.sum(-1, keepdims=True)
o_THU = np.einsum("hts,shu->thu", weights_HTS, v_THU)           # (10)
u_TD = np.einsum("thu,hud->td", o_THU, params["w_o_HUD"])       # (11)

# %% [markdown]
# The code, in fp32, on the same parameters. This is the *expanded* form, which training uses: keys
# and values of every head exist.

# %%
graphdef, state = nnx.split(layer)


@jax.jit
def expanded(state, h_BTD):
  cos, sin = rope.rope_table(a, jnp.arange(h_BTD.shape[1])[None])
  return nnx.merge(graphdef, state)(h_BTD, cos, sin, None, config.Runtime())


u_code_TD = np.asarray(expanded(state, jnp.asarray(h_TD, jnp.float32)[None])[0])
error = np.abs(u_code_TD - u_TD).max() / np.abs(u_TD).max()
assert error < 1e-5
print(f"largest difference between the equations and the code, relative: below {1e-5:g}")


# %% [markdown]
# ## Absorbed: attention in the latent space
#
# A score is $q^C \cdot W^{UK} c^{KV} + q^R \cdot k^R$. The first product can be taken the other way
# round: $({W^{UK}}^\top q^C) \cdot c^{KV}$ folds the key's up-projection into the *query*, once a
# new token instead of once a cached token, and every head then reads the latent itself. In the same
# way the weighted sum of values is taken over latents, and expanded once afterwards. All heads
# share one "key" of C + R numbers, whose first C are also the "value": multi-query attention with
# long heads.
#
# The cache then holds $c^{KV}$ and $k^R$ and nothing else. Below, a first part of the sequence
# fills it, and the remaining tokens come one at a time, as in generation. `ops.mla_decode` is what
# serving uses, on a GPU with a kernel of its own.

# %%
@jax.jit
def cached(state, h_BTD):
  """What a cache keeps of tokens: [B, T, C + R]."""
  module = nnx.merge(graphdef, state)
  cos, sin = rope.rope_table(a, jnp.arange(h_BTD.shape[1])[None])
  return jnp.concatenate(module.latents(module.down(h_BTD)[1], cos, sin), -1)


@jax.jit
def decode(state, cache_BSZ, h_B1D, position):
  """The layer's output for one new token that stands in the cache already."""
  module = nnx.merge(graphdef, state)
  cos, sin = rope.rope_table(a, jnp.full((1, 1), position))
  q_B1HK = module.queries(module.down(h_B1D)[0], cos, sin)
  w_uk_CHN, w_uv_CHU = jnp.split(module.w_ukv_CHW[...], [a.nope_dim], axis=-1)
  folded_B1HC = jnp.einsum("bthn,chn->bthc", q_B1HK[..., :a.nope_dim], w_uk_CHN)
  q_B1HZ = jnp.concatenate([folded_B1HC, q_B1HK[..., a.nope_dim:]], -1)
  o_B1HC = ops.mla_decode(q_B1HZ, cache_BSZ, jnp.full((1,), position + 1),
                          scale=rope.softmax_scale(a), kv_rank=a.kv_rank)
  o_B1HU = jnp.einsum("bthc,chu->bthu", o_B1HC, w_uv_CHU)
  return jnp.einsum("bthu,hud->btd", o_B1HU, module.w_o_HUD[...])


h_BTD = jnp.asarray(h_TD, jnp.float32)[None]
cache_BTZ = cached(state, h_BTD)
for t in range(T - 8, T):
  visible_BTZ = cache_BTZ.at[:, t + 1:].set(jnp.nan)  # what is still to come cannot be read
  u_D = np.asarray(decode(state, visible_BTZ, h_BTD[:, t:t + 1], t)[0, 0])
  error = np.abs(u_D - u_TD[t]).max() / np.abs(u_TD).max()
  assert error < 1e-5
print(f"tokens {T - 8} to {T - 1}: absorbed equals expanded, on the same parameters")
print(f"a token in the cache: {cache_BTZ.shape[-1]} numbers; "
      f"its keys and values: {a.heads * (a.qk_dim + a.v_dim)}")

# %% [markdown]
# ## Bytes a token
#
# The same count for the 671B model, beside what other kinds of attention would keep with its heads:
# all 128 keys and values (multi-head, MHA), those of 8 groups (GQA), of one (MQA). All in bf16.

# %%
v3 = config.preset("v3_671b")


def kilobytes(kv_heads=None, layers=v3.layers):
  """A token's cache in all layers, bf16; MLA's where `kv_heads` is None."""
  attention = v3.attention if kv_heads is None else dataclasses.replace(
      v3.attention, kind="gqa", kv_heads=kv_heads)
  return layers * attention.cached * 2 / 1000


kinds = {"MLA": None, "MQA": 1, "GQA, 8 groups": 8, "GQA, 16 groups": 16, "MHA": 128}
sizes = {name: kilobytes(heads) for name, heads in kinds.items()}
assert sizes["MLA"] * 1000 == 70_272  # the number of arXiv 2505.09343, table 1
table(("attention of the 671B model", "kB a token", "of MLA's", "GB for 128K tokens"),
      *((name, f"{size:,.1f}", f"{size / sizes['MLA']:.2f}x", f"{size * 131_072 / 1e6:,.1f}")
        for name, size in sizes.items()))

# %% [markdown]
# MLA keeps less than two heads' keys and values. Two open dense models of the same time, from their
# published shapes (8 key-value heads of 128), keep 4.7 and 7.3 times as much:

# %%
others = {"Qwen2.5-72B (GQA)": 80, "Llama-3.1-405B (GQA)": 126}  # layers
bars = {"DeepSeek-V3 (MLA)": sizes["MLA"],
        **{name: layers * 2 * 8 * 128 * 2 / 1000 for name, layers in others.items()},
        "DeepSeek-V3, were it GQA of 8": sizes["GQA, 8 groups"],
        "DeepSeek-V3, were it MHA": sizes["MHA"]}
figure = plots.new_figure(6.8, 2.4)
axes = figure.subplots()
plots.style(axes)
axes.grid(axis="y", visible=False)
drawn = axes.barh(list(bars), list(bars.values()), height=0.62,
                  color=[plots.BLUE] + [plots.MUTED] * (len(bars) - 1))
axes.bar_label(drawn, fmt="{:,.0f}", padding=4, color=plots.TEXT, fontsize=9)
axes.set_xscale("log")
axes.set_xlim(20, 12_000)
axes.invert_yaxis()
axes.tick_params(axis="y", length=0, labelcolor=plots.TEXT)
axes.set_xlabel("kB of cache a token, bf16 (logarithmic)", color=plots.TEXT)
figure

# %% [markdown]
# ## What it costs to read
#
# To attend to one cached token, a layer of the 671B model reads its bytes and multiplies. Expanding
# the latent again for every new token would need four hundred times MHA's arithmetic; absorbing
# needs 3.4 times, on a 71st of the bytes. A GPU that decodes waits for memory, so that is a good
# trade: absorbed attention does over 200 operations for a byte it reads, near what a GPU can do in
# the time, where MHA does one.

# %%
b = v3.attention
H, Z, K, U = b.heads, b.kv_rank + b.rope_dim, b.qk_dim, b.v_dim
work = {  # FLOPs, bytes read: for one cached token, in one layer
    "MHA": (2 * H * (K + U), 2 * H * (K + U)),
    "MLA, expanded again": (2 * b.kv_rank * H * (b.nope_dim + U) + 2 * H * (K + U), 2 * Z),
    "MLA, absorbed": (2 * H * (Z + b.kv_rank), 2 * Z)}
flops, read = work["MHA"]
table(("one cached token, one layer", "FLOPs", "of MHA's", "bytes", "of MHA's", "FLOPs a byte"),
      *((name, f"{f:,}", f"{f / flops:.3g}x", f"{r:,}", f"1/{read / r:.3g}", f"{f / r:,.0f}")
        for name, (f, r) in work.items()))


# %% [markdown]
# ## Try it
#
# How many sequences fit beside the weights? The default is 8 GPUs of 141 GB that hold the 671B
# model in FP8, one byte a parameter. The latent's width is the dial: the report chose C = 512, four
# times a head's 128.

# %%
def draw(kv_rank=512, memory_gb=1128, weights_gb=671):
  free = memory_gb - weights_gb
  if free <= 0:
    return print(f"{weights_gb} GB of weights do not fit into {memory_gb} GB")
  layer_numbers = {"MLA": kv_rank + b.rope_dim, "MQA": K + U, "GQA, 8 groups": 8 * (K + U),
                   "MHA": H * (K + U)}
  figure = plots.new_figure(6.8, 3.2)
  axes = figure.subplots()
  plots.style(axes)
  context = 2.0 ** np.arange(10, 18)
  for (name, numbers), colour in zip(layer_numbers.items(), plots.SERIES):
    axes.plot(context, free * 1e9 / (v3.layers * numbers * 2 * context), color=colour, marker="o",
              markersize=3.5, label=name)
  axes.set_xscale("log", base=2)
  axes.set_yscale("log")
  axes.set_xticks(context, [f"{int(c) // 1024}K" for c in context])
  axes.minorticks_off()
  axes.set_xlabel("tokens of each sequence", color=plots.TEXT)
  axes.set_ylabel("sequences", color=plots.TEXT)
  axes.set_title(f"{free} GB for the cache", loc="left", fontsize=9.5, color=plots.TEXT)
  return plots.finish(axes)


play(draw, kv_rank=(64, 2048, 64), memory_gb=(8, 2560, 8), weights_gb=(0, 671))

# %% [markdown]
# Whether MLA's short cache costs quality is another question, which
# [experiments](https://github.com/dsv3-jax/dsv3-jax/tree/main/experiments) answers at small scale
# by training it against MHA, GQA and MQA (`model.attention.kind`); DeepSeek-V2's table 9 did so at
# 16B and 250B.
