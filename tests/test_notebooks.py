"""Notebooks: both files agree, the committed outputs are those of the committed code, all run."""

import re
import types

import nbformat
import pytest

from notebooks import __main__ as notebooks
from tests import quick

NAMES = notebooks.names()
VARIES = "varies"  # tag of cells whose output depends on the machine or on the mode
# Not the digits of a word such as a commit's hash; an x may follow ("3.4x").
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?(?![\da-wyz])")


def codes(name):
  return [c for c in notebooks.committed(name).cells if c.cell_type == "code"]


def same(found: str, expected: str) -> bool:
  """Equal words, and numbers within 2 %, or one of their last digit."""
  if _NUMBER.sub("#", found) != _NUMBER.sub("#", expected):
    return False
  for a, b in zip(_NUMBER.findall(found), _NUMBER.findall(expected), strict=True):
    mantissa, _, power = b.replace(",", "").partition("e")
    last = 10.0 ** (int(power or 0) - len(mantissa.partition(".")[2]))
    if abs(float(a.replace(",", "")) - float(b.replace(",", ""))) > max(
        0.02 * abs(float(b.replace(",", ""))), 1.01 * last):
      return False
  return True


@pytest.mark.parametrize("name", NAMES)
def test_both_files_agree(name):
  """Oracle: jupytext reads the .py into the cells of the .ipynb, and writes them back into it."""
  text = (notebooks.HERE / f"{name}.py").read_text(encoding="utf-8")
  committed = notebooks.committed(name)
  assert notebooks.cells(committed) == notebooks.cells(notebooks.source(name)), (
      "make notebooks writes the .ipynb anew")
  assert notebooks.script(committed) == text


@pytest.mark.parametrize("name", NAMES)
def test_committed_file(name):
  """Law: every code cell was executed as it stands, without an error, and the file stays small."""
  committed = notebooks.committed(name)
  nbformat.validate(committed)
  assert committed.metadata["dsv3"]["fingerprint"] == notebooks.fingerprint(committed), (
      "the outputs are of other code; make notebooks")
  assert (notebooks.HERE / f"{name}.ipynb").stat().st_size < 500_000
  outputs = [o for c in codes(name) for o in c.outputs]
  assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
  assert all(o.output_type != "error" and o.get("name") != "stderr" for o in outputs)
  assert not any("execution" in c.metadata for c in committed.cells)


@pytest.mark.parametrize("name", NAMES)
def test_badge_and_links(name):
  """Oracle: setup.cfg's url, and the files of this checkout."""
  text = (notebooks.HERE / f"{name}.py").read_text(encoding="utf-8")
  address = notebooks.address()
  assert text.startswith("# %% [markdown]\n# [![Open in Colab]")
  assert (f"(https://colab.research.google.com/github/{address}/blob/main/notebooks/{name}.ipynb)"
          in text.split("\n")[1])
  links = re.findall(rf"https://github.com/{address}/(?:blob|tree)/main/([^)#\s]+)", text)
  assert links and all((notebooks.ROOT / link).exists() for link in links), links
  assert set(re.findall(r"github(?:\.com)?/([\w-]+/dsv3-jax)", text)) == {address}


@pytest.mark.parametrize("present", [True, False])
def test_first_cell_installs(present, monkeypatch):
  """Law: where the package is missing the first code cell installs it, and otherwise nothing."""
  firsts = {codes(name)[0].source for name in NAMES}
  assert len(firsts) == 1, "all notebooks begin with the same cell"
  calls = []
  monkeypatch.setattr("importlib.util.find_spec", lambda name: present or None)
  monkeypatch.setattr("subprocess.run", lambda args, check: calls.append((args, check)))
  exec(firsts.pop(), types.ModuleType("cell").__dict__)
  assert len(calls) == (not present)
  for args, check in calls:
    assert args[1:4] == ["-m", "pip", "install"] and check
    assert args[-1] == f"dsv3-jax[notebooks] @ git+https://github.com/{notebooks.address()}"


@pytest.mark.timeout(300)  # seconds on a quiet machine, minutes on one where much else runs
@pytest.mark.parametrize("name", NAMES)
def test_executes(name, tmp_path, monkeypatch):
  """Law: in fast mode a fresh kernel prints what is committed, numbers within 2 %."""
  monkeypatch.setenv("TMPDIR", str(tmp_path))  # what a notebook leaves behind
  flags = " ".join(f"--{key}={str(value).lower()}" for key, value in quick.options().items())
  executed = notebooks.execute(notebooks.source(name), "fast", timeout=280, flags=flags)
  compared = 0
  for cell, expected in zip((c for c in executed.cells if c.cell_type == "code"), codes(name),
                            strict=True):
    if VARIES in cell.metadata.get("tags", []):
      continue
    found, committed = notebooks.printed(cell), notebooks.printed(expected)
    assert same(found, committed), f"found:\n{found}\ncommitted:\n{committed}"
    compared += bool(committed)
  assert compared >= 2


def test_sliders():
  """Law: without a mode there is a slider for each argument, and the picture they begin with."""
  live = notebooks.source("5_schedules")
  live.cells = [c for c in live.cells if "play" in c.source or c.cell_type == "code" and (
      "MODE =" in c.source)]
  executed = notebooks.execute(live, "live")
  views = [o.data for o in executed.cells[-1].outputs if "data" in o]
  assert any("application/vnd.jupyter.widget-view+json" in data for data in views)


def test_same():
  """Oracle: by hand."""
  assert same("loss 2.01, 1,003 tokens", "loss 2.00, 1,000 tokens")
  assert same("0.10", "0.11") and not same("0.10", "0.12")
  assert not same("loss 2.10", "loss 2.00") and not same("loss 2.00", "gain 2.00")
  assert same("2.6e-05", "2.7e-05") and not same("2e-05", "2e-04")
  assert same("3.41x `1e9999f`", "3.40x `1e9999f`") and not same("`264f138`", "`265f138`")
