# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/3_routing.ipynb)
#
# # Routing, and balancing without a loss
#
# In a mixture of experts every token is computed by a few of many feed-forward networks, and a
# router chooses which. Left alone, routers favour some experts. The usual remedy, a loss that
# punishes imbalance, pulls the model away from predicting text. DeepSeek-V3 adds a *bias* to the
# choice instead, and moves it by hand ([section 2.1.2 of the
# report](https://arxiv.org/html/2412.19437#S2.SS1.SSS2), equations 12 to 20; [arXiv
# 2408.15664](https://arxiv.org/abs/2408.15664)). The code is
# [model/routing.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/model/routing.py), one
# page long.

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
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from dsv3_jax import config
from dsv3_jax.analysis import plots
from dsv3_jax.model import routing

# %matplotlib inline
plt.rcParams["figure.dpi"] = 100  # a figure on a cell's last line is shown
route = jax.jit(routing.route, static_argnames="cfg")
select = jax.jit(routing.select, static_argnames="cfg")


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


def panel(axes, title):
  plots.style(axes)
  axes.set_title(title, loc="left", fontsize=9.5, color=plots.TEXT)
  return axes


# %% [markdown]
# ## One token chooses
#
# Here 16 routed experts lie in 4 groups; a group is the experts of one node. The token's *affinity*
# to each expert is the sigmoid of a dot product (eq. 15). The choice has two stages, so that a
# token travels to few nodes: each group's score is the sum of its two best experts, the best 2
# groups stay, and the 4 best experts in them are chosen. Both stages look at affinity *plus bias*;
# it is zero here except for two experts, of which one has been too popular and one neglected.

# %%
cfg = config.MoE(experts=16, active=4, groups=4, active_groups=2)
E, D = cfg.experts, 16
random = np.random.default_rng(1)
w_router_DE = (random.normal(size=(D, E)) / np.sqrt(D)).astype(np.float32)
x_PD = random.normal(size=(1, D)).astype(np.float32)
bias_E = np.zeros(E, np.float32)
bias_E[[5, 15]] = -0.25, 0.2

found = route(x_PD, w_router_DE, bias_E, cfg=cfg)
chosen_A, affinity_E = np.asarray(found.expert_PA[0]), np.asarray(found.affinity_PE[0])
biased_E = affinity_E + bias_E
score_G = np.sort(biased_E.reshape(cfg.groups, -1), axis=1)[:, -cfg.group_top:].sum(1)
kept_G = np.sort(np.argsort(-score_G)[:cfg.active_groups])
assert set(chosen_A // (E // cfg.groups)) <= set(kept_G)

figure = plots.new_figure(plots.WIDE, 2.9)
first, second = figure.subplots(1, 2, sharey=True)
group_E = np.arange(E) // (E // cfg.groups)
panel(first, "affinities, and with the bias added (outlined)")
first.bar(range(E), affinity_E, color=[plots.SERIES[g] for g in group_E], alpha=0.55)
first.bar(range(E), biased_E, fill=False, edgecolor=plots.TEXT, linewidth=0.8)
panel(second, "affinity + bias: groups that stay, and the experts chosen (full colour)")
second.bar(range(E), biased_E, color=[plots.SERIES[g] if e in chosen_A else plots.GRID
                                      for e, g in enumerate(group_E)])
for axes in (first, second):
  axes.set_xticks(range(E))
  axes.set_xlabel("expert", color=plots.TEXT)
for g, score in enumerate(score_G):
  second.text(4 * g + 1.5, 1.12, f"{score:.2f}" + (" stays" if g in kept_G else ""), ha="center",
              fontsize=9, color=plots.TEXT)
second.set_ylim(0, 1.2)
figure

# %% [markdown]
# The gates (eq. 13, 16) that weigh the experts' outputs are the affinities *without* the bias,
# divided by their sum, times a factor of 2.5 that the released configuration has. So the bias
# steers who computes and never what comes out. Nor does a gradient reach it:

# %%
gates_A = np.asarray(found.gate_PA[0])
np.testing.assert_allclose(gates_A, cfg.scale * affinity_E[chosen_A] / affinity_E[chosen_A].sum(),
                           rtol=1e-5)
gradient_E = jax.grad(lambda b: route(x_PD, w_router_DE, b, cfg=cfg).gate_PA[0, 0])(bias_E)
assert not np.any(gradient_E)
table(("expert", *chosen_A), ("affinity", *(f"{affinity_E[e]:.3f}" for e in chosen_A)),
      ("affinity + bias", *(f"{biased_E[e]:.3f}" for e in chosen_A)),
      ("gate", *(f"{g:.3f}" for g in gates_A)))

# %% [markdown]
# ## What the groups save
#
# With 256 experts on 8 nodes and 8 experts a token, as in the 671B model, a free choice would send
# a token to more than 5 nodes, over the slow links between them. The limit of 4 costs some
# affinity, less than one might expect: the best experts of four groups out of eight.

# %%
logits = np.random.default_rng(0).normal(size=(4096, 256)).astype(np.float32)
tokens = 1 / (1 + np.exp(-logits))
big = config.preset("v3_671b").moe
free = config.replace(big, groups=1, active_groups=1)
rows = [("experts chosen", "nodes a token visits", "most", "affinity of those chosen")]
for name, moe in (("freely", free), ("within 4 of 8 groups", big)):
  expert_PA = np.asarray(select(tokens, np.zeros(256, np.float32), cfg=moe))
  nodes_P = [len(set(row // 32)) for row in expert_PA]
  affinity = np.take_along_axis(tokens, expert_PA, 1).mean()
  rows.append((name, f"{np.mean(nodes_P):.2f}", max(nodes_P), f"{affinity:.3f}"))
table(*rows)


# %% [markdown]
# ## Balancing, step by step
#
# Tokens have much in common, and so a router prefers the same experts for all of them. Below, token
# vectors are random around a common direction; `skew` is how far they share it. After every step an
# expert's bias rises by `speed` if it got less than the mean load, and falls if it got more: no
# more than that.
#
# **MaxVio** is the load of the busiest expert above the mean, relative to the mean: 0 is perfect,
# and with 3 one expert does the work of four. Halfway through, the common direction changes, as
# when the data do.

# %%
@functools.partial(jax.jit, static_argnames=("cfg", "steps", "tokens"))
def train_bias(speed, skew, seed=0, cfg=cfg, steps=400, tokens=512):
  """Loads [steps, E], MaxVio [steps] and biases [steps, E] of a router that sees new tokens."""
  key = jax.random.key(seed)
  w_DE = jax.random.normal(jax.random.fold_in(key, 1), (D, cfg.experts)) / jnp.sqrt(D)
  common_2D = jax.random.normal(jax.random.fold_in(key, 2), (2, D))

  def step(bias_E, t):
    noise_PD = jax.random.normal(jax.random.fold_in(key, 3 + t), (tokens, D))
    x_PD = noise_PD + skew * common_2D[2 * t // steps]
    load_E = routing.expert_counts(routing.route(x_PD, w_DE, bias_E, cfg).expert_PA, cfg.experts)
    after_E = routing.update_bias(bias_E, load_E, speed)
    return after_E, (load_E / load_E.mean(), routing.max_vio(load_E), bias_E)

  return jax.lax.scan(step, jnp.zeros(cfg.experts), jnp.arange(steps))[1]


without, balanced = train_bias(0.0, 1.0), train_bias(0.005, 1.0)
figure = plots.new_figure(plots.WIDE, 5.4)
(left, right), bottom = figure.subplots(2, 2)
for axes, (load_TE, _, _), title in ((left, without, "without: speed 0"),
                                     (right, balanced, "with: speed 0.005")):
  panel(axes, f"load of each expert over the mean, {title}")
  axes.grid(False)
  image = axes.imshow(np.asarray(load_TE).T, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2,
                      interpolation="nearest")
  axes.set_ylabel("expert", color=plots.TEXT)
figure.colorbar(image, ax=(left, right), extend="max", pad=0.01, aspect=12)
panel(bottom[0], "MaxVio")
for (_, vio_T, _), name, colour in ((without, "without", plots.ORANGE),
                                    (balanced, "with", plots.BLUE)):
  bottom[0].plot(vio_T, color=colour, linewidth=1.4, label=name)
bottom[0].set_ylim(0)
plots.finish(bottom[0])
panel(bottom[1], "biases that did it")
bottom[1].plot(balanced[2], linewidth=1)
for axes in bottom:
  axes.set_xlabel("step", color=plots.TEXT)
figure


# %% [markdown]
# What is left after balancing is mostly chance: 512 tokens that choose 4 of 16 experts at random
# are uneven too. Averaged over the last 50 steps before the change:

# %%
def settled(vio_T, steps=400):
  return float(vio_T[steps // 2 - 50:steps // 2].mean())


lots_TPE = jax.random.uniform(jax.random.key(0), (50, 512, E))
drawn_TPA = jax.lax.top_k(lots_TPE, cfg.active)[1]
chance = jax.vmap(lambda e: routing.max_vio(routing.expert_counts(e, E)))(drawn_TPA).mean()
speeds = (0.0, 0.0002, 0.001, 0.005, 0.025, 0.125)
final = {speed: settled(train_bias(speed, 1.0)[1]) for speed in speeds}
assert final[0.005] < 0.2 < final[0.0]
table(("speed", *(f"{s:g}" for s in speeds), "chance alone"),
      ("MaxVio", *(f"{v:.2f}" for v in final.values()), f"{chance:.2f}"))


# %% [markdown]
# Too slow, and 200 steps do not suffice to bring the biases to where they must be; too fast, and
# they overshoot at every step, for the rule looks at the sign of the error and not at its size. The
# report's 0.001 has some 200,000 steps, and is set to 0 for the last 500 billion tokens.
#
# ## Try it

# %%
def draw(speed=0.001, skew=1.0, seed=0):
  figure = plots.new_figure(plots.WIDE, 2.8)
  left, right = figure.subplots(1, 2)
  vio_T = np.asarray(train_bias(0.0, skew, seed)[1])
  panel(left, "MaxVio")
  left.plot(vio_T, color=plots.ORANGE, linewidth=1.2, label="speed 0")
  load_TE, vio_T, bias_TE = map(np.asarray, train_bias(speed, skew, seed))
  left.plot(vio_T, color=plots.BLUE, linewidth=1.2, label=f"speed {speed:g}")
  left.set_ylim(0)
  left.set_xlabel("step", color=plots.TEXT)
  plots.finish(left)
  panel(right, "load over the mean: first step, before the change, last step")
  for i, (t, colour) in enumerate(((0, plots.ORANGE), (199, plots.GREEN), (399, plots.BLUE))):
    right.bar(np.arange(E) + 0.27 * (i - 1), load_TE[t], width=0.27, color=colour)
  right.axhline(1, color=plots.TEXT, linewidth=0.8)
  right.set_xticks(range(E))
  right.set_xlabel("expert", color=plots.TEXT)
  return figure


play(draw, speed=list(speeds), skew=(0.0, 2.0, 0.1), seed=(0, 5))


# %% [markdown]
# ## The small loss that remains
#
# Over a batch the bias balances; a single long sequence may still favour few experts. For that case
# the report keeps a loss with a tiny weight, 0.0001 (eq. 17 to 20): for each sequence $\sum_i f_i
# P_i$, where $f_i$ counts the tokens of which expert i is among the best, without bias and without
# groups, and $P_i$ is its mean share of affinity. It is 1 when all experts get the same, and grows
# as choice and affinity agree on few of them; only $P_i$ has a gradient.

# %%
@jax.jit
def loss(x_BTD):
  affinity_BTE = routing.affinities(x_BTD, w_router_DE, "sigmoid")
  return routing.sequence_balance(affinity_BTE, cfg.active, jnp.ones(x_BTD.shape[:2]))


own_BTD, shared_D = random.normal(size=(1, 512, D)), random.normal(size=D)
skews = (0.0, 0.5, 1.0, 2.0)
table(("skew of one sequence", *skews),
      ("loss before its weight", *(f"{loss(own_BTD + skew * shared_D):.2f}" for skew in skews)))

# %% [markdown]
# ## A trap
#
# Experts outside the chosen groups must be masked with minus infinity. Code that multiplies by a
# mask, or writes 0 in their place, works until biases go negative, for then a 0 beats an expert
# that was allowed:

# %%
affinity_1E = np.full((1, E), 0.1, np.float32)
affinity_1E[0, :2] = 0.6
bias_E = np.full(E, -0.3, np.float32)
right_A = np.sort(select(affinity_1E, bias_E, cfg=cfg)[0])
biased_E = affinity_1E[0] + bias_E
score_G = np.sort(biased_E.reshape(4, 4), 1)[:, -2:].sum(1)
keep_E = np.repeat(np.isin(np.arange(4), np.argsort(-score_G, kind="stable")[:2]), 4)
wrong_A = np.sort(np.argsort(-np.where(keep_E, biased_E, 0.0), kind="stable")[:4])
print(f"groups that stay: experts {np.flatnonzero(keep_E)}")
print(f"minus infinity chooses {right_A}, zero chooses {wrong_A}")
assert keep_E[right_A].all() and not keep_E[wrong_A].all()

# %% [markdown]
# In training, counts are summed over every device and micro-batch of a step before the bias moves
# ([train/step.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/train/step.py)), and
# MaxVio is logged for every layer. Notebook 1 shows it in a model that learns; the balancing
# ablations of the report's tables are in
# [experiments](https://github.com/dsv3-jax/dsv3-jax/tree/main/experiments).
