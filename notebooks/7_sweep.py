# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/7_sweep.ipynb)
#
# # Analysing a sweep
#
# An ablation asks one question of many runs. Here it is the report's about balancing ([sections
# 4.5.2 and 4.5.3](https://arxiv.org/html/2412.19437#S4.SS5), table 5): does steering experts by a
# bias cost less than an auxiliary loss? The runs are those of
# [experiments/ablate_balance.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/experiments/ablate_balance.py)
# at the size that a laptop trains, each kept as one small JSON file in
# [experiments/results](https://github.com/dsv3-jax/dsv3-jax/tree/main/experiments/results). The
# same functions read the folders of your own sweeps.

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
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display

from dsv3_jax.analysis import statistics
from dsv3_jax.analysis.comparison import compare, document, doubts, figures, gather
from dsv3_jax.cli import configs

# %matplotlib inline
plt.rcParams["figure.dpi"] = 100  # a figure on a cell's last line is shown

# The experiments and their results lie beside the package, not in it.
root = next((p for p in (Path.cwd(), Path.cwd().parent) if (p / "experiments").is_dir()), None)
if root is None:
  root = Path("dsv3-jax")
  subprocess.run(["git", "clone", "--quiet", "--depth=1", "https://github.com/dsv3-jax/dsv3-jax",
                  str(root)], check=True)
sys.path.insert(0, str(root))


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


# %% [markdown]
# ## The question
#
# A sweep is an experiment file with a function that yields its arms: what each changes of a common
# parent. Seeds are an axis like any other. An arm's id is the fingerprint of its whole
# configuration, and that is how its result is found again, whoever ran it.

# %%
sweep = configs.load_sweep(str(root / "experiments/ablate_balance.py") + ":cpu")
print(sweep.text.split("\n\n")[0], end="\n\n")
changes = {arm.name: {k: v for k, v in arm.overrides.items() if k != "train.seed"}
           for arm in sweep.arms}
seeds = {name: sorted(arm.seed for arm in sweep.arms if arm.name == name) for name in changes}
table(("arm", "changes", "seeds"), *(
    (name, ", ".join(f"`{k} = {v}`" for k, v in made.items()) or "none: the baseline",
     ", ".join(map(str, seeds[name]))) for name, made in changes.items()))

# %% [markdown]
# ## The answer in a table
#
# Means and standard deviations over seeds. The difference to the baseline is taken seed by seed:
# seed 1 of two arms starts from the same weights and reads the same batches, so what a seed adds is
# common to both and drops out. `p` is that of a paired t test, adjusted for there being several
# arms (Holm).

# %%
question, _, text = sweep.text.partition("\n")
plan = gather.Plan("ablate_balance", sweep.experiment, question, text.strip(), tuple(
    gather.Planned(arm.name, arm.seed, arm.id) for arm in sweep.arms))
found = compare.make(gather.collect([root / "experiments/results"], plan))
Markdown(document.table(found))

# %%
figures.forest(found)

# %% [markdown]
# Does pairing matter? Below, by hand for each arm: the standard error of the difference of means if
# the runs were unrelated, and that of the mean of differences. Their ratio, squared, is by how much
# pairing multiplies the seeds.

# %%
base = found.arm(found.baseline).values(found.metric)
rows = [("arm", "difference", "error, unrelated", "error, paired")]
for name in found.differences:
  values = found.arm(name).values(found.metric)
  common = sorted(values.keys() & base.keys())
  x, y = (np.array([v[seed] for seed in common]) for v in (values, base))
  paired = statistics.paired(values, base)
  assert np.isclose(paired.mean, (x - y).mean())
  n = max(len(common), 2)
  rows.append((name, f"{paired.mean:+.4f}", f"{np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / n):.4f}",
               f"{(x - y).std(ddof=1) / np.sqrt(n):.4f}"))
table(*rows)

# %% [markdown]
# ## Curves
#
# Smoothed training loss; the band is one standard deviation over seeds. Curves that lie on each
# other are told apart by their difference to the baseline, seed by seed.

# %%
figures.loss(found)

# %%
figures.loss_difference(found)

# %% [markdown]
# ## Balance
#
# Loss is half of the question. An arm that does nothing for balance may have a low loss and experts
# that idle; on a cluster the busiest expert sets the pace. **MaxVio** is its load above the mean.

# %%
figures.max_violation(found)

# %%
figures.expert_load(found)

# %% [markdown]
# ## What to doubt
#
# A difference means something only if nothing else differs than what was meant to. The report looks
# through all that is kept of the runs, good news included:

# %%
Markdown("\n".join(f"* **{d.about}** ({d.level}): {d.text}" for d in doubts.find(found)))

# %% [markdown]
# Every number can be traced to a run: its configuration, the commit of the code, when and where.

# %%
head, runs = doubts.trace_table(found)
print(f"{len(runs)} runs; the first:")
record = found.arms[0].first
table(("", ""), *((name, value) for name, value in (
    ("id", f"`{record['id']}`"), ("arm, seed", f"{found.arms[0].name}, {record['seed']}"),
    ("commit", f"`{record['commit']}`"), ("device", record["device"]),
    ("parameters, activated", f"{record['parameters']:,}, {record['activated_parameters']:,}"),
    ("tokens", f"{record['tokens']:,}"), ("validation loss", f"{record['final']['loss']:.4f}"))))

# %% [markdown]
# ## Try it
#
# Another baseline, metric or figure:

# %%
FIGURES = {"differences": figures.forest, "loss": figures.loss,
           "loss, less the baseline's": figures.loss_difference,
           "validation": figures.validation, "loss over FLOPs": figures.compute,
           "MaxVio": figures.max_violation}


def draw(figure="differences", baseline=found.baseline, metric="smoothed"):
  again = compare.make(gather.collect([root / "experiments/results"], plan), baseline, metric)
  return FIGURES[figure](again)


play(draw, figure=list(FIGURES), baseline=[arm.name for arm in found.shown],
     metric=["loss", "bits_per_byte", "smoothed"])

# %% [markdown]
# From the command line: `dsv3 report experiments/results --sweep=experiments/ablate_balance.py:cpu`
# writes all of this as one page, and `dsv3 sweep --config=experiments/ablate_balance.py:cpu
# --workdir=runs/ablations` runs it again. What the whole suite found, where it agrees with the
# report and where it does not, is in
# [experiments/RESULTS.md](https://github.com/dsv3-jax/dsv3-jax/blob/main/experiments/RESULTS.md).
