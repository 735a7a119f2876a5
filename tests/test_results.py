"""The committed results: every number of experiments/RESULTS.md comes from a record."""

import json
import re
from pathlib import Path

from benchmarks import ablations
from dsv3_jax import config

ROOT = Path(__file__).parents[1]


def test_tables_are_those_of_the_records(capsys):
  """Oracle: the records themselves: made again, tables and text between marks are the same."""
  assert ablations.main(["--check"]) == 0, capsys.readouterr().out


def test_records_are_what_their_names_say():
  """Law: a record's file is named by its config's fingerprint, and it knows its commit."""
  paths = sorted(ablations.RECORDS.glob("*.json"))
  assert paths
  for path in paths:
    record = json.loads(path.read_text())
    assert config.fingerprint(config.from_dict(record["config"])) == path.stem == record["id"]
    assert re.fullmatch("[0-9a-f]{7,40}", record["commit"]), (path, record["commit"])


def test_figures_are_there():
  """Law: what RESULTS.md shows and links to exists."""
  text = ablations.RESULTS.read_text()
  links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
  assert links
  for link in links:
    assert (ablations.RESULTS.parent / link).exists(), link
