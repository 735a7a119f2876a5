# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/6_cost.ipynb)
#
# # Cost and scaling
#
# What does it take to train the 671B model, and what would it take elsewhere? The cost model
# ([dsv3_jax/cost](https://github.com/dsv3-jax/dsv3-jax/tree/main/dsv3_jax/cost)) answers from a
# configuration alone: it lists every kernel of a layer, gives each the rate that published
# measurements reached, runs the pipeline's schedule with these times, and adds what the links
# carry. Nothing in it was fitted to the report's step time or GPU-hours, so that they can test it.
# No jax is needed, and no GPU.

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

import matplotlib.pyplot as plt
from IPython.display import Markdown, display

from dsv3_jax import config, cost
from dsv3_jax.analysis import plots
from dsv3_jax.cost import budget, check, cluster, hardware, needed, plan, whatif

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
  """Markdown of rows of cells, the first of them the head; long texts to the left."""
  widths = [max(len(str(cell)) for cell in column) for column in zip(*rows[1:])]
  sides = ["---", *("---:" if width < 26 else "---" for width in widths[1:])]
  lines = [f"| {' | '.join(map(str, row))} |" for row in (rows[0], sides, *rows[1:])]
  return Markdown("\n".join(lines))


def bars(rows, unit, colours=plots.SERIES, height=0.5):
  """Stacked horizontal bars: {bar: {part: value}}."""
  figure = plots.new_figure(plots.WIDE, 1.1 + height * len(rows))
  axes = figure.subplots()
  plots.style(axes)
  axes.grid(axis="y", visible=False)
  parts = list(dict.fromkeys(part for row in rows.values() for part in row))
  palette = [*colours, *plt.colormaps["Set2"].colors]
  for part, colour in zip(parts, palette):
    starts = [sum(row.get(p, 0) for p in parts[:parts.index(part)]) for row in rows.values()]
    axes.barh(list(rows), [row.get(part, 0) for row in rows.values()], left=starts, color=colour,
              label=part, height=0.62)
  axes.invert_yaxis()
  axes.tick_params(axis="y", length=0, labelcolor=plots.TEXT)
  axes.set_xlabel(unit, color=plots.TEXT)
  figure.legend(loc="outside lower center", ncols=len(parts), frameon=False, fontsize=8.5,
                labelcolor=plots.TEXT)
  return figure


# %% [markdown]
# ## The report's run
#
# 2,048 H800 GPUs in nodes of eight: a pipeline of 16 ranks under DualPipe, experts spread over 64
# GPUs on 8 nodes, two data-parallel groups, ZeRO-1, FP8 matmuls; batches of 15,360 sequences of
# 4,096 tokens ([section 3](https://arxiv.org/html/2412.19437#S3),
# [4.2](https://arxiv.org/html/2412.19437#S4.SS2)).

# %%
h800 = hardware.get("h800")
v3 = cluster.reported()
found = cost.estimate(v3, h800)
mesh = found.config.runtime.mesh
sizes = " x ".join(map(str, (mesh.pipe, mesh.data, mesh.node, mesh.gpu)))
table(("", ""), ("GPUs: pipeline x data x node x GPU", f"{found.devices:,} = {sizes}"),
      ("micro-batches of a step", found.microbatches), ("tokens of a step", f"{found.tokens:,}"),
      ("GFLOP to train on a token, causal", f"{found.flops_per_token() / 1e9:.1f}"),
      ("seconds of a step", f"{found.step:.1f}"),
      ("tokens/s a GPU", f"{found.tokens_per_second:,.0f}"),
      ("MFU, causal", f"{found.mfu():.1%}"))

# %% [markdown]
# ## A step, and where it goes
#
# The authors published how a step of theirs divides ([arXiv
# 2505.09343](https://arxiv.org/abs/2505.09343), table 4). 1F1B is the time in overlapped pairs,
# where the forward pass of one micro-batch runs beside the backward pass of another and each
# computes while the other's tokens travel; 1F, 1B and 1W is what stands alone at the ends of a
# batch.

# %%
measured = {"1F": 1.13, "1B": 1.99, "1W": 0.48, "1F1B": 13.95, "bubble": 2.06, "optimizer": 0.29}
bars({"measured": measured, "predicted": {k: found.breakdown[k] for k in measured}},
     "seconds of a step")

# %% [markdown]
# All numbers that can be compared, with the error and what it comes from:

# %%
rows = check.rows()
assert all(row.within for row in rows)
table(("", "report", "here", "error", "why"), *(
    (f"{r.what}, {r.unit}", f"{r.report:,.5g}", f"{r.ours:,.5g}",
     "given" if r.given else f"{r.error:+.1%}", r.why) for r in rows))

# %% [markdown]
# ## What hides behind what
#
# One MoE layer, one micro-batch of one sequence a GPU. Tokens travel to their experts (dispatch)
# and back (combine), in both passes: over the slow links between nodes at most once to each of four
# nodes, and from there over the fast links. Alone, they would travel half as long as the layer
# computes; in the authors' trace, where both share the memory and the processors, about as long.
# Not overlapped, all of that would be added to the step.

# %%
sent = sum(e.seconds for e in found.exchange.values())
computed = sum(found.compute.values())
display(table(("one layer, one micro-batch", "ms", "MB over slow links", "MB over fast links"),
              ("computing, forward and backward", f"{1e3 * computed:.2f}", "", ""),
              *((name.replace("_", " "), f"{1e3 * e.seconds:.2f}", f"{e.slow / 1e6:.0f}",
                 f"{e.fast / 1e6:.0f}") for name, e in found.exchange.items())))
print(f"all-to-alls: {sent / computed:.0%} of the computing")

# %% [markdown]
# ## Memory
#
# What a plan needs on each pipeline rank: weights in 16 bits for computing, their gradients, and
# this GPU's share of the fp32 masters and moments (ZeRO-1); activations of the micro-batches in
# flight. The outer ranks have the embedding and the heads. 80 GB is what there is.

# %%
memory = needed.estimate(v3)
bars({f"rank {i}": {k: v / 1e9 for k, v in rank.parts.items() if v > 1e8}
      for i, rank in enumerate(memory.ranks)}, "GB", height=0.24)

# %% [markdown]
# ## GPU-hours and dollars
#
# Table 1 of the report: 2,664K hours of pre-training, 119K of context extension, 5K after that, at
# $2 each.

# %%
phases = budget.training(v3, h800, extended=True)
table(("", "tokens", "steps", "days", "thousand GPU-hours", "million dollars"), *(
    (p.name, f"{p.tokens:.3g}" if p.tokens else "", f"{p.steps:,.0f}" if p.steps else "",
     f"{p.seconds / 86400:.1f}", f"{p.gpu_hours / 1e3:,.0f}" + (" (given)" if p.given else ""),
     f"{p.dollars / 1e6:.2f}") for p in phases))

# %% [markdown]
# ## What if
#
# The report closes its section on infrastructure with wishes for hardware ([section
# 3.5](https://arxiv.org/html/2412.19437#S3.SS5)). Each is a switch here. More than all others a
# processor of its own for communication would help, since 20 of the 132 SMs do that work.

# %%
changes = whatif.changes(v3, h800, [*whatif.SUGGESTED, "slow=2"])
table(("change", "step, s", "gain", "meaning"), *(
    (f"`{c.name}`", f"{c.step:.2f}", f"{c.gain / found.step:.1%}", c.meaning) for c in changes))

# %% [markdown]
# ## Other clusters
#
# The same plan with 1 to 4 data-parallel groups, on other GPUs. Hours grow with the number of GPUs,
# for each group then gets fewer micro-batches and idles a larger share; days shrink. H800 and H100
# differ in the links within a node alone, and those hide behind computing here.

# %%
figure = plots.new_figure(plots.WIDE, 3.2)
left, right = figure.subplots(1, 2)
for axes, label in ((left, "days of pre-training"), (right, "thousand GPU-hours")):
  plots.style(axes)
  axes.set_xscale("log", base=2)
  axes.set_xlabel("GPUs", color=plots.TEXT)
  axes.set_title(label, loc="left", fontsize=9.5, color=plots.TEXT)
counts = [1024, 2048, 3072, 4096]
for name, colour in zip(("h800", "h100", "h200", "b200"), plots.SERIES):
  phases = [budget.pretraining(cluster.on(v3, n), hardware.get(name)) for n in counts]
  left.plot(counts, [p.seconds / 86400 for p in phases], color=colour, marker="o", markersize=3.5,
            label=hardware.get(name).name)
  right.plot(counts, [p.gpu_hours / 1e3 for p in phases], color=colour, marker="o", markersize=3.5)
for axes in (left, right):
  axes.set_xticks(counts, [f"{n:,}" for n in counts])
  axes.minorticks_off()
  axes.set_ylim(0)
plots.finish(left)


# %% [markdown]
# ## Try it

# %%
def draw(device="h800", schedule="dualpipe", recipe="v3", slow_links=1.0, communication_sms=20):
  hw = hardware.get(device)
  changed = dataclasses.replace(hw, slow=hw.slow * slow_links,
                                comm_sms=communication_sms if hw.sms else 0)
  layers = (4,) * 15 + (1,) if schedule != "dualpipe_v" else ()
  cfg = config.replace(v3, **{"runtime.recipe": recipe, "runtime.pipeline.schedule": schedule,
                              "runtime.pipeline.layers": layers})
  now = cost.estimate(cfg, changed)
  return bars({"the report's, measured": measured,
               f"this: {now.step:.1f} s": {k: now.breakdown.get(k, 0) for k in measured}},
              "seconds of a step")


play(draw, device=list(hardware.HARDWARE), recipe=["v3", "bf16"],
     schedule=["1f1b", "zb1p", "dualpipe", "dualpipe_v"], slow_links=(0.25, 4.0, 0.25),
     communication_sms=(0, 40, 4))


# %% [markdown]
# ## Is there a better plan?
#
# `dsv3 plan` searches meshes, schedules, micro-batches, remat and ZeRO for the fastest plan that
# fits, and says why the others lose; it does not know what the report chose. Here a part of the
# search, with one sequence in a micro-batch of each GPU, and 3 % of the memory left free. The
# report's own plan is 16 x 2 x 64 under DualPipe.

# %% tags=["varies"]
def considered(choice):
  return (choice.sequences == 1 and choice.zero == 1 and choice.remat == "report"
          and choice.pipe in ((16,) if MODE == "fast" else (4, 8, 16, 32)))


search = plan.Search(v3, 2048, h800, reserve=0.03, keep=considered)
table(("pipeline x data x experts", "schedule", "step, s", "GB a GPU"), *(
    (f"{p.choice.pipe} x {p.choice.data} x {p.choice.experts}", p.choice.schedule,
     f"{p.step:.1f}", f"{p.memory.total / 1e9:.0f}") for p in search.best(5)))

# %% [markdown]
# From the command line: `dsv3 cost --config=experiments/v3_671b.py --what-if`, and `dsv3 plan
# --config=experiments/v3_671b.py --gpus=2048 --hardware=h800`. The figures of the hardware and
# where they come from are in
# [cost/hardware.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/cost/hardware.py).
