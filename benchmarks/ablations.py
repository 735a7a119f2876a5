"""Remakes the tables and figures of experiments/RESULTS.md from the records of finished arms.

    python -m benchmarks.ablations                 every ablation that has records
    python -m benchmarks.ablations --check         say what is out of date; status 1 if anything is

Records are experiments/results/<id>.json, kept by `dsv3 sweep --records=experiments/results`. What
stands between `<!-- begin NAME -->` and `<!-- end NAME -->` is made; the readings around it are
written by hand. Figures go to experiments/figures/NAME.svg.
"""

import argparse
import re
from pathlib import Path

from dsv3_jax import files
from dsv3_jax.analysis import page, plots
from dsv3_jax.analysis.comparison import compare, document, doubts, figures, gather, tables
from dsv3_jax.cli import report

FOLDER = Path(__file__).parents[1] / "experiments"
RESULTS, RECORDS, FIGURES = FOLDER / "RESULTS.md", FOLDER / "results", FOLDER / "figures"
_BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.S)


def block(name: str, scale: str = "cpu") -> tuple[str, str]:
  """(Markdown, SVG of the forest plot or "") of one ablation."""
  spec = f"experiments/{name}.py:{scale}"
  plan = report.planned(f"{FOLDER / name}.py:{scale}", name)
  c = compare.make(gather.collect([str(RECORDS)], plan))
  figure = figures.forest(c)
  head, rows = doubts.trace_table(c)
  keep = [i for i, title in enumerate(head) if title != "from"]
  trace = page.markdown_table(tuple(head[i] for i in keep),
                              [tuple(row[i] for i in keep) for row in rows])
  parts = [f"`dsv3 sweep --config={spec} --workdir=runs/ablations --records=experiments/results`",
           document.table(c).rstrip(), tables.verdict(c)]
  if figure is not None:
    parts.append(f"![differences to the baseline](figures/{name}.svg)")
  parts.append(f"<details><summary>{len(rows)} runs</summary>\n\n{trace}\n\n</details>")
  return "\n\n".join(parts) + "\n", plots.to_svg(figure) if figure is not None else ""


def remade(text: str, figures: dict[str, str]) -> str:
  """RESULTS.md with its blocks made again; SVGs go into `figures`."""
  def make(match: re.Match) -> str:
    made, svg = block(match[2])
    if svg:
      figures[match[2]] = svg
    return f"{match[1]}{made}{match[3]}"

  return _BLOCK.sub(make, text)


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawTextHelpFormatter)
  parser.add_argument("--check", action="store_true", help="write nothing")
  args = parser.parse_args(argv)
  figures: dict[str, str] = {}
  old = RESULTS.read_text(encoding="utf-8")
  new = remade(old, figures)
  if args.check:
    print("up to date" if new == old else f"{RESULTS} is out of date: python -m {__spec__.name}")
    return int(new != old)
  FIGURES.mkdir(exist_ok=True)
  for name, svg in figures.items():
    files.write_atomic(FIGURES / f"{name}.svg", svg)
  files.write_atomic(RESULTS, new)
  print(RESULTS)
  return 0


if __name__ == "__main__":
  raise SystemExit(main())
