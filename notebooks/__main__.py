"""Executes the notebooks and writes their outputs: `make notebooks`, or `python -m notebooks`.

    python -m notebooks                execute all
    python -m notebooks 2_mla 5        those whose names begin so
    python -m notebooks --text         only Markdown changed: keep the outputs, execute nothing

NAME.py is the source. NAME.ipynb is made from it: the same cells, their outputs, and in its
metadata a fingerprint of the cells that were executed, by which the tests see that the outputs
belong to them. What would differ from run to run without a reason (ids, times) is not kept.

The tests execute each notebook in fast mode and compare what it prints with what is committed;
cells with the tag "varies" are left out: what they print depends on the machine or on the mode.

The address of the repository, in badges, links and the cell that installs, is that of `url` in
setup.cfg: change it there and execute again.
"""

import argparse
import base64
import configparser
import hashlib
import io
import os
import re
import sys
import time
from pathlib import Path

import jupytext
import nbclient
import nbformat
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
_ADDRESS = re.compile(r"(github(?:\.com)?)/[\w-]+/dsv3-jax\b")


def names() -> list[str]:
  """All notebooks, in their order."""
  return sorted(path.stem for path in HERE.glob("[0-9]*.py"))


def address() -> str:
  """OWNER/NAME of the repository, from setup.cfg."""
  settings = configparser.ConfigParser()
  settings.read(ROOT / "setup.cfg")
  return settings["metadata"]["url"].removeprefix("https://github.com/")


def source(name: str) -> nbformat.NotebookNode:
  """The notebook of NAME.py, with the ids and metadata that its .ipynb has."""
  text = (HERE / f"{name}.py").read_text(encoding="utf-8")
  notebook = jupytext.reads(text, fmt="py:percent")
  for number, cell in enumerate(notebook.cells):
    cell.id = f"cell-{number:02}"
    cell.metadata = {"tags": tags} if (tags := cell.metadata.get("tags")) else {}
  notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
  return notebook


def script(notebook: nbformat.NotebookNode) -> str:
  """The text of its .py, as jupytext writes it."""
  bare = nbformat.v4.new_notebook(cells=notebook.cells, metadata={"jupytext": {
      "notebook_metadata_filter": "-all", "cell_metadata_filter": "tags,-all"}})
  return jupytext.writes(bare, fmt="py:percent")


def committed(name: str) -> nbformat.NotebookNode:
  """NAME.ipynb."""
  return nbformat.read(HERE / f"{name}.ipynb", as_version=4)


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str, list[str]]]:
  """(type, source, tags) of each cell: all that the two files have in common."""
  return [(c.cell_type, c.source, list(c.metadata.get("tags", []))) for c in notebook.cells]


def fingerprint(notebook: nbformat.NotebookNode) -> str:
  """Of the sources and tags of all code cells, in 16 hexadecimal digits."""
  code = [cell for cell in cells(notebook) if cell[0] == "code"]
  return hashlib.sha256(repr(code).encode()).hexdigest()[:16]


def execute(notebook: nbformat.NotebookNode, mode: str, timeout: float = 3600, flags: str = ""
            ) -> nbformat.NotebookNode:
  """The notebook with its outputs, from a fresh kernel in the notebooks' folder.

  Args:
    notebook: of `source`; changed in place and returned.
    mode: live: with sliders; static: pictures in their place; fast: small as well.
    timeout: seconds that a cell may take.
    flags: XLA_FLAGS of the kernel.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell raised.
  """
  paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  environment = os.environ | {"DSV3_NOTEBOOK": mode, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags,
                              "PYTHONPATH": os.pathsep.join(paths)}
  client = nbclient.NotebookClient(
      notebook, timeout=timeout, record_timing=False, coalesce_streams=True,
      resources={"metadata": {"path": str(HERE)}})
  client.execute(env=environment)
  notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
  return notebook


def printed(cell: nbformat.NotebookNode) -> str:
  """What a cell printed, and what it showed in Markdown or as nothing but text."""
  texts = []
  for output in cell.outputs:
    if output.output_type == "stream" and output.name == "stdout":
      texts.append(output.text)
    elif output.output_type in ("execute_result", "display_data"):
      if "text/markdown" in output.data:
        texts.append(output.data["text/markdown"] + "\n")
      elif set(output.data) == {"text/plain"}:
        texts.append(output.data["text/plain"] + "\n")
  return "".join(texts)


def smaller(png: str) -> str:
  """A picture (base64) with 128 colours: a third of the bytes, and no difference to the eye."""
  buffer = io.BytesIO()
  picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
  picture.quantize(128, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
  return base64.b64encode(buffer.getvalue()).decode()


def stamp() -> None:
  """Writes the repository's address wherever it stands in this folder."""
  for path in (*HERE.glob("*.py"), HERE / "README.md"):
    text = path.read_text(encoding="utf-8")
    if (stamped := _ADDRESS.sub(rf"\1/{address()}", text)) != text:
      path.write_text(stamped, encoding="utf-8")


def with_outputs(notebook: nbformat.NotebookNode, name: str) -> nbformat.NotebookNode:
  """The notebook with the committed outputs; the process ends where they are of other code."""
  known = committed(name)
  if known.metadata["dsv3"]["fingerprint"] != fingerprint(notebook):
    sys.exit(f"{name}: code cells changed; execute it, without --text")
  outputs = iter([c for c in known.cells if c.cell_type == "code"])
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.outputs = next(outputs).outputs
  return notebook


def refresh(name: str, text: bool) -> None:
  """Executes a notebook and writes its .ipynb; its .py gets jupytext's form."""
  (HERE / f"{name}.py").write_text(script(source(name)), encoding="utf-8")
  notebook = source(name)
  notebook = with_outputs(notebook, name) if text else execute(notebook, "static")
  for cell in notebook.cells:
    if cell.cell_type == "code":
      cell.execution_count = None
      for output in cell.outputs:
        if "execution_count" in output:
          output.execution_count = None
        if "image/png" in output.get("data", {}):
          output.data["image/png"] = smaller(output.data["image/png"])
        if output.output_type == "stream" and output.name == "stderr":
          sys.exit(f"{name}: a cell wrote to stderr:\n{output.text}")
  notebook.metadata["dsv3"] = {"fingerprint": fingerprint(notebook)}
  nbformat.validate(notebook)
  nbformat.write(notebook, HERE / f"{name}.ipynb")


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__.split("\n")[0])
  parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of names; default: all")
  parser.add_argument("--text", action="store_true", help="only Markdown changed: keep outputs")
  args = parser.parse_args()
  chosen = tuple(args.names)
  stamp()
  for name in names():
    if not chosen or name.startswith(chosen):
      began = time.monotonic()
      refresh(name, args.text)
      size = (HERE / f"{name}.ipynb").stat().st_size
      print(f"{name}: {time.monotonic() - began:.0f} s, {size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
  main()
