# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dsv3-jax/dsv3-jax/blob/main/notebooks/4_fp8.ipynb)
#
# # FP8 numerics
#
# DeepSeek-V3 was trained with matmuls in 8-bit floating point ([section 3.3 of the
# report](https://arxiv.org/html/2412.19437#S3.SS3)). Two things make that work: scales for small
# tiles instead of whole tensors, and sums that leave the tensor core before its short accumulator
# spoils them. This notebook shows both, emulated to the bit on a CPU by the functions that training
# uses ([dsv3_jax/fp8](https://github.com/dsv3-jax/dsv3-jax/tree/main/dsv3_jax/fp8)).

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
from dsv3_jax.fp8 import accumulate, formats, measure, quantize, recipe, study

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


@functools.partial(jax.jit, static_argnames=("format", "tile", "scale"))
def quantized(x, format=formats.E4M3, tile=(1, 128), scale="fp32"):
  """`x` after a round trip through a format, with a scale for each tile; 0 covers an axis whole."""
  return quantize.quantize(x, format, tile, scale=scale).dequantize()


def error(y, x):
  """Relative, in the Frobenius norm."""
  return float(np.linalg.norm(np.asarray(y, np.float64) - x) / np.linalg.norm(x))


# %% [markdown]
# ## The formats, on a line
#
# A floating-point format spends its bits on exponent (how far it reaches) and mantissa (how fine it
# is). Each tick is a number that the format has. Above: between 1 and 4, where the step doubles at
# each power of two. Below: all positive numbers, on a logarithmic axis. E4M3 has 8 steps a doubling
# over 2^15 of normal range; E5M2 trades half of the steps for twice the exponents. E5M6, 12 bits,
# is the report's own, for one cache that wants more precision.

# %%
decode = jax.jit(formats.decode, static_argnums=(1, 2))
values = {}
for name, f in formats.FORMATS.items():
  code = np.arange(2 ** (f.bits - 1))  # the positive ones
  code = formats.pack(jnp.array(code)) if f.packed else code.astype(np.uint8).view(f.dtype)
  decoded = np.asarray(decode(code, f, 2 ** (f.bits - 1)))
  values[name] = decoded[np.isfinite(decoded)]

figure = plots.new_figure(plots.WIDE, 3.6)
axes_of = figure.subplots(2, 1)
for axes, (low, high) in zip(axes_of, ((0.98, 4.02), (2.0**-23, 2.0**17))):
  plots.style(axes)
  axes.grid(False)
  for row, (all_values, colour) in enumerate(zip(values.values(), plots.SERIES)):
    shown = all_values[(all_values >= low) & (all_values <= high)]
    axes.vlines(shown, row - 0.35, row + 0.35, color=colour, linewidth=0.9)
  axes.set_yticks(range(len(values)), list(values))
  axes.set_ylim(len(values) - 0.5, -0.5)
  axes.set_xlim(low, high)
axes_of[1].set_xscale("log", base=2)
figure

# %%
table(("format", "bits", "largest", "smallest normal", "smallest", "step after 1"),
      *((name, f.bits, f"{f.max:g}", f"2^{np.log2(f.tiny):.0f}",
         f"2^{np.log2(values[name][1]):.0f}", f"2^-{f.mantissa}")
        for name, f in formats.FORMATS.items()))

# %% [markdown]
# Rounding to nearest makes a relative error of at most half a step: 1/16 with three mantissa bits.
# Nothing of that depends on the size of the number, until it is too small or too large for the
# exponent. Integers have that flat stretch nowhere: their step is the same for all sizes.

# %%
round_trip = jax.jit(lambda x, f: formats.decode(formats.encode(x, f), f, x.size), static_argnums=1)
x = np.geomspace(2.0**-18, 2.0**13, 2**14).astype(np.float32)
figure = plots.new_figure(6.8, 3.2)
axes = figure.subplots()
plots.style(axes)
for (name, f), colour in zip(list(formats.FORMATS.items()), plots.SERIES):
  found = np.asarray(round_trip(x, f))
  worst = np.maximum.reduceat(np.abs(found / x - 1), np.arange(0, x.size, 64))
  axes.plot(x[::64], worst, color=colour, linewidth=1.5, label=name)
integer = np.clip(np.round(x), None, 127)
worst = np.maximum.reduceat(np.abs(integer / x - 1), np.arange(0, x.size, 64))
axes.plot(x[::64], worst, color=plots.MUTED, linewidth=1.2, label="int8, step 1")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_ylim(3e-4, 1.3)
axes.set_xlabel("number", color=plots.TEXT)
axes.set_ylabel("largest relative error", color=plots.TEXT)
plots.finish(axes)

# %% [markdown]
# ## Tiles and outliers
#
# Before rounding, a tensor is divided by a scale that brings its largest magnitude to the format's:
# 448. One scale for all means that one outlier decides for all. The report gives activations a
# scale for each token and 128 channels (1x128) and weights one for each 128x128 block, so that an
# outlier is a matter of its own tile ([section
# 3.3.2](https://arxiv.org/html/2412.19437#S3.SS3.SSS2)).
#
# Below, one channel in 512 of an activation is `outlier` times as large as the others. The error is
# that of all the *other* numbers.

# %%
random = np.random.default_rng(0)
TILES = {"whole tensor": (0, 0), "1x128": (1, 128), "1x32": (1, 32)}
x_PD = random.normal(size=(16, 512)).astype(np.float32)
others = np.arange(512) != 200


def others_error(outlier, tile, integers=False):
  given = x_PD * np.where(others, 1, outlier).astype(np.float32)
  if integers:
    scale = np.abs(given).max() / 127
    found = np.round(given / scale) * scale
  else:
    found = np.asarray(quantized(given, tile=tile))
  return error(found[:, others], given[:, others])


outliers = 4.0 ** np.arange(0, 13)
figure = plots.new_figure(6.8, 3.2)
axes = figure.subplots()
plots.style(axes)
for (name, tile), colour in zip(TILES.items(), plots.SERIES):
  axes.plot(outliers, [others_error(o, tile) for o in outliers], color=colour, marker="o",
            markersize=3.5, label=f"e4m3, {name}")
axes.plot(outliers, [others_error(o, None, True) for o in outliers], color=plots.MUTED, marker="o",
          markersize=3.5, linewidth=1.2, label="int8, whole tensor")
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xlabel("outlier, times the others", color=plots.TEXT)
axes.set_ylabel("error of the others", color=plots.TEXT)
plots.finish(axes)

# %% [markdown]
# Two readings. Floating point is patient: an outlier of some thousands costs nothing, where 8-bit
# integers lost everything to one of some hundreds. And when it is not, a tile confines the damage:
# with 1x128 a quarter of the channels are lost, with 1x32 a sixteenth. The errors that remain when
# those are all zero are the square roots of 1/4 and 1/16:

# %%
last = {name: others_error(outliers[-1], tile) for name, tile in TILES.items()}
assert abs(last["1x128"] - 0.5) < 0.02 and abs(last["1x32"] - 0.25) < 0.02
table(("error of the others at 2^24", *last), ("", *(f"{e:.3f}" for e in last.values())))

# %% [markdown]
# A picture of it: what became exactly zero (dark) where an outlier of 2^24 stands in one channel,
# and each of three tokens has another in a channel of its own.

# %%
given = x_PD * np.where(others, 1, 2.0**24).astype(np.float32)
for token, channel in ((3, 40), (7, 300), (12, 450)):
  given[token, channel] = 2.0**24
figure = plots.new_figure(plots.WIDE, 3.4)
for axes, (name, tile) in zip(figure.subplots(3, 1, sharex=True), TILES.items()):
  plots.style(axes, grid=False)
  lost = np.asarray(quantized(given, tile=tile)) == 0
  axes.imshow(lost, aspect="auto", cmap="Greys", vmin=0, vmax=1.4, interpolation="nearest")
  axes.set_ylabel("token", color=plots.TEXT)
  axes.set_title(f"{name}: {lost.mean():.0%} of the numbers became 0", loc="left", fontsize=9.5,
                 color=plots.TEXT)
axes.set_xlabel("channel", color=plots.TEXT)
figure


# %% [markdown]
# ## Try it
#
# Power-of-two scales (`pow2`) can be multiplied without rounding, but may leave up to half of the
# format's range unused; the error changes little, since a floating-point format is as fine there.

# %%
def draw(outlier_log2=20, tile_columns=128, scale="fp32", format="e4m3"):
  f = formats.get(format)
  given = x_PD * np.where(others, 1, 2.0**outlier_log2).astype(np.float32)
  found = np.asarray(quantized(given, f, (1, tile_columns), scale))
  figure = plots.new_figure(6.8, 2.6)
  axes = figure.subplots()
  plots.style(axes)
  relative = np.linalg.norm(found - given, axis=0) / np.linalg.norm(given, axis=0)
  axes.plot(relative, color=plots.BLUE, linewidth=0.9)
  axes.axvline(200, color=plots.ORANGE, linewidth=0.8)
  axes.set_ylim(0, 1.05)
  axes.set_xlabel("channel (the outlier's is marked)", color=plots.TEXT)
  axes.set_ylabel("relative error", color=plots.TEXT)
  return figure


play(draw, outlier_log2=(0, 24), tile_columns=[16, 32, 64, 128, 256, 512], scale=["fp32", "pow2"],
     format=["e4m3", "e5m2"])

# %% [markdown]
# ## Fourteen bits
#
# A product of two E4M3 numbers is short, and a tensor core forms it exactly. The sum is the
# problem. Hopper's tensor cores add 32 products and the running sum at a time, aligned to the
# largest exponent among them, and keep about 14 bits: what lies lower falls off. As the sum grows,
# ever more of each product does. The report's remedy is *promotion*: every 128 values of k the
# partial sum is added to an fp32 register outside and begins again from zero
# ([fp8/accumulate.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/dsv3_jax/fp8/accumulate.py)
# has the arithmetic).
#
# The error is the largest one of the product, over the product's root mean square; the exact
# product is that of the same FP8 codes in float64, so that only the summation is measured.

# %%
SIZE, ROWS = 4096, 16
a_MK, b_KN = study.codes("normal", (ROWS, SIZE), 0), study.codes("normal", (SIZE, ROWS), 1)


@functools.partial(jax.jit, static_argnames=("interval", "bits"))
def product(a_MK, b_KN, interval, bits):
  return accumulate.matmul(a_MK, b_KN, interval=interval, bits=bits)


def accumulated(K, interval, bits):
  """Error of a product over the first K values of k; zeros after them add nothing."""
  a = np.where(np.arange(SIZE) < K, a_MK, 0).astype(np.float32)
  exact = a.astype(np.float64) @ b_KN.astype(np.float64)
  return study.errors(product(a, b_KN, interval, bits), exact)["max_over_rms"]


lengths = (4096,) if MODE == "fast" else (128, 256, 512, 1024, 2048, 4096)
ways = {"14 bits": (0, 14), "14 bits, promoted every 128": (128, 14), "fp32": (0, 0)}
errors = {name: [accumulated(K, *way) for K in lengths] for name, way in ways.items()}
figure = plots.new_figure(6.8, 3.2)
axes = figure.subplots()
plots.style(axes)
for (name, found), colour in zip(errors.items(), (plots.ORANGE, plots.BLUE, plots.GREEN)):
  axes.plot(lengths, found, color=colour, marker="o", markersize=3.5, label=name)
axes.set_xscale("log", base=2)
axes.set_yscale("log")
axes.set_xticks(lengths, [f"{K:,}" for K in lengths])
axes.minorticks_off()
axes.set_xlabel("K, values summed", color=plots.TEXT)
axes.set_ylabel("largest error / RMS of product", color=plots.TEXT)
plots.finish(axes)

# %%
table(("K = 4,096", *errors), ("largest error / RMS", *(f"{100 * e[-1]:.2g} %"
                                                        for e in errors.values())))

# %% [markdown]
# The report says "nearly 2 %" of two random matrices with K = 4096, without saying how they are
# drawn or what the error is relative to. Larger matrices have a larger largest error, and what
# cutting does depends on the draw: with all numbers positive every cut goes the same way, and the
# error is not noise but drift. `dsv3 numerics --study=accumulation` makes the whole table.

# %%
rows = [("draw, 14 bits, no promotion", "largest error / RMS", "mean error / RMS")]
for draw_name in study.DRAWS:
  a, b = study.codes(draw_name, (ROWS, SIZE), 0), study.codes(draw_name, (SIZE, ROWS), 1)
  exact = a.astype(np.float64) @ b.astype(np.float64)
  found = np.asarray(product(a, b, 0, 14), np.float64)
  rms = np.sqrt(np.mean(exact**2))
  rows.append((draw_name, f"{100 * np.abs(found - exact).max() / rms:.2g} %",
               f"{100 * np.mean(found - exact) / rms:+.2g} %"))
table(*rows)

# %% [markdown]
# ## A layer under a recipe
#
# A *recipe* says for each of a linear layer's three matmuls (forward, gradient of the input,
# gradient of the weights) how its operands are held. `v3` is the report's; per-tensor scaling is
# what most FP8 training did before; `hybrid_e5m2` gives gradients fewer mantissa bits. The same
# layer, once as it comes and once with an outlier channel, gradients spread over many magnitudes as
# they are after a loss:

# %%
M, K, N = 256, 256, 128
x_MK = random.normal(size=(M, K)).astype(np.float32)
spiky_MK = x_MK * np.where(np.arange(K) == 100, 2.0**14, 1).astype(np.float32)
w_KN = (random.normal(size=(K, N)) / np.sqrt(K)).astype(np.float32)
dy_MN = (random.normal(size=(M, N)) * 10 ** random.uniform(-9, -3, (M, 1))).astype(np.float32)
rows = [("", "forward", "input's gradient", "weights' gradient", "x lost", "dy lost")]
for name in ("v3", "per_tensor_current", "hybrid_e5m2"):
  chosen = recipe.resolve(config.Runtime(recipe=name))
  for kind, x in (("", x_MK), (", outlier", spiky_MK)):
    found = measure.layer(x, w_KN, dy_MN, name="w_up_DF", recipe=chosen)
    rows.append((f"`{name}`{kind}",
                 *(f"{100 * float(found['error'][gemm]):.1f} %" for gemm in measure.GEMMS),
                 *(f"{100 * float(found['underflow'][z]):.1f} %" for z in ("x", "dy"))))
table(*rows)

# %% [markdown]
# A norm hides small numbers behind large ones, which is why the last columns count those that
# became zero. One scale for all tokens loses an outlier's neighbours and the gradients of the
# quieter tokens. Two mantissa bits reach further but are coarse: the gradients' error is half as
# large again.

# %% [markdown]
# `dsv3 numerics runs/tiny --recipes=v3,hybrid_e5m2` measures the same in every layer of a trained
# model, and
# [experiments/ablate_fp8.py](https://github.com/dsv3-jax/dsv3-jax/blob/main/experiments/ablate_fp8.py)
# asks the question that counts: what it does to the loss.
