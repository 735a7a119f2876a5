"""Results as tables (head and rows of words), and added up by task."""

from collections.abc import Sequence
from typing import Any

from dsv3_jax.evals import choice, generation

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, head, rows


def by_task(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """`summary` of each task and kind, in the order in which they first appear."""
  groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for one in found:
    groups.setdefault((one["task"], one["kind"]), []).append(one)
  add_up = {"choice": choice.summary, "generation": generation.summary}
  return [{"task": task, **add_up[kind](own)} for (task, kind), own in groups.items()]


def tables(results: dict[str, Any]) -> list[Table]:
  """What to show of `results`: text, tasks and needle where they are there."""
  found = []
  if "text" in results:
    found.append(_text(results["text"]))
  found += _tasks(results.get("tasks", []))
  if "needle" in results:
    found += _needle(results["needle"])
  return found


def _text(texts: Sequence[dict[str, Any]]) -> Table:
  rows = [(t["name"], f"{t['bits_per_byte']:.4f}" + _error(t["error"], "{:.4f}"),
           f"{t['loss']:.4f}", f"{t['perplexity']:,.1f}", f"{t['bytes']:,}", f"{t['tokens']:,}",
           f"{t['bytes'] / t['tokens']:.2f}") for t in texts]
  title = "text: windows of {window} tokens that predict {stride} each".format(**texts[0])
  return title, ("text", "bits per byte", "nats a token", "perplexity", "bytes", "tokens",
                 "bytes a token"), rows


def _tasks(tasks: Sequence[dict[str, Any]]) -> list[Table]:
  found: list[Table] = []
  chosen = [t for t in tasks if t["kind"] == "choice"]
  if chosen:
    found.append(("multiple choice", ("task", "records", "accuracy", "normalised", "chance"), [
        (t["task"], str(t["records"]), _share(t["accuracy"], t["accuracy_error"]),
         _share(t["accuracy_normalised"], t["accuracy_normalised_error"]), f"{t['chance']:.1%}")
        for t in chosen]))
  written = [t for t in tasks if t["kind"] == "generation"]
  if written:
    several = written[0]["samples"] > 1
    ks = list(written[0]["pass_at"]) if several else []
    found.append(("written answers", ("task", "records", *(
        ("samples", *(f"pass@{k}" for k in ks)) if several else ("exact",))), [
        (t["task"], str(t["records"]),
         *([str(t["samples"])] if several else [_share(t["exact"], t["exact_error"])]),
         *(_share(t["pass_at"][k], t["pass_at_error"][k]) for k in ks)) for t in written]))
  return found


def _needle(found: dict[str, Any]) -> list[Table]:
  head = ("depth", *(f"{n:,}" for n in found["lengths"]))
  grid = lambda key, form: [(f"{100 * y:.3g} %", *(form.format(row[i]) for row in
                                                   found["grid"][key]))
                            for i, y in enumerate(found["depths"])]
  number = f"{found['needles']} needle{'s' * (found['needles'] > 1)} a cell"
  rows = [(f"{o['length']:,}", _share(o["recall"], o["recall_error"]),
           _share(o["forced"], o["forced_error"]), f"{o['bits']:.2f}" + _error(
               o["bits_error"], "{:.2f}"), f"{o['gain']:+.2f}" + _error(o["gain_error"], "{:.2f}"))
          for o in found["by_length"]]
  return [(f"needle: recall by length in tokens, {number}", head, grid("recall", "{:.0%}")),
          ("needle: bits of the value", head, grid("bits", "{:.1f}")),
          ("needle: all depths", ("tokens", "recall", "forced", "bits", "gain in bits"), rows)]


def _share(value: float, error: float | None) -> str:
  return f"{value:.1%}" + _error(None if error is None else 100 * error, "{:.1f}")


def _error(error: float | None, form: str) -> str:
  return "" if error is None else " ± " + form.format(error)
