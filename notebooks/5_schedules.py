# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/5_schedules.ipynb)
#
# # Pipeline schedules, drawn
#
# A model that is cut into stages, one a device, keeps its devices busy only if several
# micro-batches are under way at once, and never at the beginning and the end of a batch: that idle
# time is the *bubble*. The report's answer is DualPipe ([section
# 3.2.1](https://arxiv.org/html/2412.19437#S3.SS2.SSS1), figure 5, table 2). Here it is drawn beside
# what came before it, out of the orders that the training code executes
# ([parallel/schedules](https://github.com/dsv3-jax/dsv3-jax/tree/main/dsv3_jax/parallel/schedules)).
# Nothing below needs jax or a GPU.

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
import matplotlib.pyplot as plt
from IPython.display import display

from dsv3_jax.analysis import plots, schedule_plot
from dsv3_jax.parallel import schedules
from dsv3_jax.parallel.schedules import formulas

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


def picture(name, ranks, microbatches, **durations):
  plan = schedules.make(name, ranks, microbatches)
  found = plan.simulate(**durations)
  share = max(found.bubble) / found.makespan
  title = (f"{name}: {found.makespan:.4g} units of time, "
           f"bubble {max(found.bubble):.3g} ({share:.0%})")
  return schedule_plot.draw(schedule_plot.bars(plan, found), title)


# %% [markdown]
# ## Three pieces of work
#
# One micro-batch on one stage is a unit of work with three parts: the forward pass **F**; the
# backward pass for the input, **I**, which the stage before waits for; and the backward pass for
# the weights, **W**, which nobody waits for. **B** is I and W at once. Each takes one unit of time
# here unless said otherwise.
#
# GPipe does all forward passes and then all backward passes. With R ranks the last one waits for R
# - 1 forward passes before it has anything to do, and the first one for R - 1 backward passes in
# the middle. White is idle; the numbers are micro-batches.

# %%
picture("gpipe", ranks=4, microbatches=8)

# %% [markdown]
# **1F1B** turns to backward passes as soon as there are any. The bubble is the same, but a rank
# holds the activations of at most R micro-batches, not of all.

# %%
picture("1f1b", ranks=4, microbatches=8)

# %% [markdown]
# **ZB1P** (of the [Zero Bubble paper](https://arxiv.org/abs/2401.10241)) cuts B in two. The stage
# before gets its input's gradient after I alone, and the W's, which can wait, go where the bubble
# was.

# %%
picture("zb1p", ranks=4, microbatches=8)

# %% [markdown]
# ## DualPipe
#
# DualPipe feeds micro-batches from *both* ends: rank r holds stage r for one direction and stage R
# - 1 - r for the other. In the middle of the batch every rank has a forward pass of one direction
# and a backward pass of the other to do, which know nothing of each other. It does them as one
# piece of work (a frame around two colours), so that one computes while the all-to-alls of the
# other's experts travel. With 8 ranks and 20 micro-batches this is figure 5 of the report.

# %%
picture("dualpipe", ranks=8, microbatches=20)

# %% [markdown]
# The price is a second copy of every stage's parameters. **DualPipeV**, which came with the
# [authors' code](https://github.com/deepseek-ai/DualPipe), needs only one: the model is cut into 2R
# stages in the shape of a V, down the ranks and back up, so that the way back is the other
# direction. It is what this code base runs by default, because first and last stage share a rank.

# %%
picture("dualpipe_v", ranks=4, microbatches=10)

# %% [markdown]
# ## Table 2, found again
#
# The report's table 2 has formulas for the bubble and for the activations that a rank holds. The
# simulation executes every operation as soon as its inputs are there and knows nothing of them.
# With W taking 0.8 of a forward pass and an overlapped pair 2.5, not the 2.8 of its parts:

# %%
durations = dict(forward=1.0, backward_input=1.0, backward_weight=0.8, overlapped=2.5)
print(f"{'':11} {'bubble':>7} {'formula':>8}   activations  formula   parameters")
for name in schedules.NAMES:
  found = schedules.make(name, ranks=8, microbatches=20).simulate(**durations)
  row = formulas.row(name, ranks=8, microbatches=20, **durations)
  print(f"{name:11} {max(found.bubble):7.2f} {row.bubble:8.2f} {max(found.peak_activations):13} "
        f"{row.activations:8} {row.parameters:11}x")
  assert abs(max(found.bubble) - row.bubble) < 1e-9, name
  assert max(found.peak_activations) == row.activations, name

# %% [markdown]
# (A stage of `dualpipe_v` is half of one of the others, there being 16 on 8 ranks: its 17
# activations weigh as much as 8.5 of theirs, and its bubble is to be halved likewise. Where I takes
# longer than F the formula is a little too high for the two dualpipes: some of the waiting that it
# counts is filled.)
#
# ## What the overlap is for
#
# A shorter bubble is the smaller half of the gain. With experts spread over nodes, the report puts
# the ratio of computation to communication at about 1 : 1. Say that all-to-alls take 1.5 of a
# forward pass's time in each direction, where computing takes 1 + 2. Done one after the other they
# double everything; in an overlapped pair they vanish behind the 3 units of computing, and only the
# beginning and the end of the batch still wait for them.

# %%
compute, travel = (1.0, 1.0, 1.0), 1.5
exposed = dict(forward=compute[0] + travel, backward_input=compute[1] + travel,
               backward_weight=compute[2])
print("time of a batch on 8 ranks, over the time of its computing alone\n")
print(f"{'micro-batches':14} {20:6} {120:6}")
for name in ("1f1b", "zb1p", "dualpipe"):
  times = []
  for m in (20, 120):
    found = schedules.make(name, 8, m).simulate(
        **exposed, overlapped=max(sum(compute), 2 * travel))
    times.append(found.makespan / (m * sum(compute)))
  print(f"{name:14} {times[0]:6.2f} {times[1]:6.2f}")

# %% [markdown]
# ## Longer batches
#
# None of these bubbles grows with the number of micro-batches, so its share of a batch falls. The
# report's pipeline has 16 ranks and, by arithmetic from its batch of 15,360 sequences, about 120
# micro-batches.

# %%
figure = plots.new_figure(6.8, 3.2)
axes = figure.subplots()
plots.style(axes)
counts = [16, 24, 32, 48, 64, 96, 128, 192, 256]
for name, colour in zip(schedules.NAMES, plots.SERIES):
  if name == "gpipe":  # as 1f1b
    continue
  possible = [m for m in counts if m >= (32 if name.startswith("dualpipe") else 1)]
  shares = []
  for m in possible:
    found = schedules.make(name, 16, m).simulate()
    shares.append(100 * max(found.bubble) / found.makespan)
  axes.plot(possible, shares, color=colour, marker="o", markersize=3.5, label=name)
axes.set_xscale("log", base=2)
axes.set_xticks(counts, counts)
axes.minorticks_off()
axes.set_ylim(0)
axes.set_xlabel("micro-batches on 16 ranks", color=plots.TEXT)
axes.set_ylabel("bubble, % of the time", color=plots.TEXT)
plots.finish(axes)


# %% [markdown]
# ## Try it
#
# `weights` is the duration of W where F and I take 1, `overlap` what a pair saves of the sum of its
# parts, `latency` what a message to the next rank takes. With `weights` at 0 ZB1P has nothing left
# to fill its bubble with; with `latency` above 0 every schedule starts to stretch where ranks wait
# for each other. Not every schedule exists for all numbers; the message then says what would do.

# %%
def draw(name="dualpipe", ranks=4, microbatches=12, weights=1.0, overlap=0.2, latency=0.0):
  try:
    return picture(name, ranks, microbatches, backward_weight=weights,
                   overlapped=(1 - overlap) * (2 + weights), comm=latency)
  except ValueError as error:
    print(error)


play(draw, name=list(schedules.NAMES), ranks=(1, 16), microbatches=(1, 48),
     weights=(0.0, 2.0, 0.1), overlap=(0.0, 0.5, 0.05), latency=(0.0, 1.0, 0.05))

# %% [markdown]
# The same from the command line: `dsv3 schedule --name=dualpipe --ranks=8 --microbatches=20
# --plot=dualpipe.svg`. How a schedule becomes one program on all ranks is in
# [parallel/pipeline.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/parallel/pipeline.py);
# that its gradients are those of one device is
# [tested](https://github.com/dsv3-jax/dsv3-jax/blob/main/tests/parallel/test_pipeline.py).
