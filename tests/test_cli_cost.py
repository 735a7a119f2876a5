"""`dsv3 cost`: what people type, and what they get."""

import json
import subprocess
import sys

import pytest

from dsv3_jax import cli
from dsv3_jax.cost import whatif

V3 = ["cost", "--config=experiments/v3_671b.py"]
TINY = ["cost", "--config=experiments/tiny.py"]


def test_quick_and_without_jax():
  """Oracle: the issue: under 3 s from start to end (processor time, whatever else runs); no jax."""
  code = ("import sys, time; from dsv3_jax import cli; code = cli.run(sys.argv[1:]); "
          "print(code, 'jax' in sys.modules, 'matplotlib' in sys.modules, time.process_time())")
  done = subprocess.run([sys.executable, "-c", code, *V3], capture_output=True, text=True,
                        check=True, timeout=60)
  *text, last = done.stdout.splitlines()
  exit_code, has_jax, has_matplotlib, seconds = last.split()
  assert (exit_code, has_jax, has_matplotlib) == ("0", "False", "False")
  assert float(seconds) < 3
  assert any("671,026,419,200 parameters" in line for line in text)


def test_text(capsys):
  """Oracle: what the report prints stands in the table; all that a person asks for is there."""
  assert cli.run([*V3, "--gpus=2048", "--what-if"]) == 0
  out = capsys.readouterr().out
  for words in ("2,048 H800", "Memory of the fullest device", "slow links", "1F1B", "MFU",
                "device-hours", "What if", "fused_cast", "19.926", "2,664", "70,272", "DualPipe"):
    assert words in out, words
  assert cli.run([*V3, "--check"]) == 0
  assert "What if" not in capsys.readouterr().out


def test_json(capsys, tmp_path):
  """Oracle: the parts add up; overrides, price and changes reach the numbers."""
  file = tmp_path / "mine.json"
  file.write_text('{"base": "h100", "name": "ours", "price": 3}')
  assert cli.run([*V3, f"--hardware={file}", "--json", "--what-if=slow=2", "--price=1.5",
                  "--config.runtime.pipeline.schedule=zb1p",
                  "--config.runtime.pipeline.layers=()"]) == 0
  got = json.loads(capsys.readouterr().out)
  assert got["hardware"]["name"] == "ours" and got["hardware"]["price"] == 1.5
  assert got["pipeline"]["schedule"] == "zb1p" and got["breakdown_s"]["1F1B"] == 0
  assert sum(got["breakdown_s"].values()) == pytest.approx(got["step_s"])
  flops = got["flops_per_token"]
  assert sum(flops["by_component_causal_with_mtp"].values()) == pytest.approx(
      flops["causal_with_mtp"])
  assert got["budget"][0]["dollars"] == pytest.approx(1.5 * got["budget"][0]["gpu_hours"])
  assert [w["name"] for w in got["what_if"]] == ["slow=2"]
  assert got["model"]["cache_bytes_per_token"] == 70_272
  for ranks in (got["memory"]["ranks"], got["memory_needed"]["ranks"]):
    assert len(ranks) == 16 and all(sum(r["parts"].values()) == r["total"] for r in ranks)


@pytest.mark.parametrize("options", [
    ["--hardware=h100"], ["--hardware=ironwood", "--gpus=8"],
    ["--hardware=v5p", "--config.runtime.compute_dtype=bfloat16", "--config.runtime.recipe=v3"],
    ["--hardware=b200", "--config.model.attention.kind=gqa"],
    ["--hardware=h200", "--config.model.dense_layers=4", "--config.model.mtp_depth=0"]])
def test_variants(options, capsys):
  """Law: any config on any device has a cost."""
  assert cli.run([*TINY, *options]) == 0
  assert "step" in capsys.readouterr().out


def test_this_machine_is_the_default_for_a_small_config(capsys):
  """Oracle: a config in fp32 for one device is measured here."""
  assert cli.run([*TINY, "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["hardware"]["name"].startswith("CPU")


def test_picture(tmp_path):
  """Oracle: the numbers drawn are those printed; a folder that is not there is named."""
  path = tmp_path / "cost.svg"
  assert cli.run([*TINY, "--hardware=h100", f"--plot={path}"]) == 0
  text = path.read_text()
  assert text.startswith("<?xml") and "master weights" in text and "device-hours" in text


@pytest.mark.parametrize("options,message", [
    (["--hardware=h8000"], "did you mean 'h800'"), (["--gpus=7"], "--gpus=7"),
    (["--what-if=magic"], "--what-if=magic"), (["--plot=x.jpg"], ".svg, .png, .pdf"),
    (["--config.runtime.pipeline.layers=[61]"], "runtime.pipeline"),
    (["--config.runtime.pipeline.schedule=dualpipe", "--config.data.microbatch=3072",
      "--config.data.batch_start=0"], "runtime.pipeline")])
def test_mistakes(options, message, capsys):
  """Oracle: exit code 2, and what was given in the message."""
  assert cli.run([*V3, *options]) == 2
  assert message in capsys.readouterr().err


def test_check_is_for_the_report_s_model(capsys):
  """Oracle: exit code 2 for another."""
  assert cli.run([*TINY, "--check"]) == 2
  assert "--check" in capsys.readouterr().err


def test_help_names_every_change(capsys):
  """Oracle: the table of changes."""
  with pytest.raises(SystemExit) as leave:
    cli.run(["cost", "--help"])
  assert leave.value.code == 0
  text = capsys.readouterr().out
  assert all(name in text for name in whatif.HELP)


def test_notes_are_text(tmp_path, capsys):
  """Oracle: what a hardware file says is printed as it stands, brackets too; prices are numbers."""
  file = tmp_path / "mine.json"
  file.write_text(json.dumps({"base": "h100", "name": "[red]x[/red]", "note": "a [/b] note"}))
  assert cli.run([*TINY, f"--hardware={file}"]) == 0
  out = capsys.readouterr().out
  assert "[red]x[/red]" in out and "a [/b] note" in out
  assert cli.run([*TINY, "--hardware=h100", "--price=nan"]) == 2
  assert "price=nan" in capsys.readouterr().err


def test_no_rows_of_nothing(capsys):
  """Law: no bubble without a pipeline, no MTP without MTP; no time below zero."""
  assert cli.run([*TINY, "--hardware=h100", "--config.model.mtp_depth=0"]) == 0
  out = capsys.readouterr().out
  assert "bubble" not in out and "mtp " not in out and "e-07" not in out


def test_report_s_table_is_not_the_user_s(capsys):
  """Law: overrides change nothing in it, whatever they would do to the report's mesh."""
  tables = []
  for options in ([], ["--config.runtime.zero=0", "--config.optim.mu_dtype=float8",
                       "--config.train.tokens=1e9", "--config.runtime.dispatch.form=gather",
                       "--config.optim.nu_dtype=float32"]):
    assert cli.run([*V3, "--check", *options]) == 0
    tables.append(capsys.readouterr().out)
  assert tables[0] == tables[1] and "18.816" in tables[0]
