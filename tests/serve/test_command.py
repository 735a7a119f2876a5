"""`dsv3 serve` as a process."""

import json
import re
import signal
import subprocess
import sys

import httpx
import pytest

from dsv3_jax import cli
from tests import saved_run

pytest.importorskip("uvicorn")


def test_from_start_to_end(tmp_path):
  """Law: it says where it is, answers, and on SIGTERM ends after the answer that is under way."""
  saved_run.make(tmp_path)
  command = [sys.executable, "-c", "from dsv3_jax import cli; cli.main()", "serve", str(tmp_path),
             "--port=0", "--cold", "--name=mine", "--tokens=1000", "--longest=900"]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    try:
      url = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+)\n",
                         process.stdout.readline())[1]
      page = httpx.get(url)
      assert page.headers["content-type"].startswith("text/html") and "<textarea" in page.text
      body = {"prompt": "def ", "max_tokens": 300, "stream": True, "logit_bias": {"1": -100}}
      with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = list(lines)
      assert rest[-1] == "data: [DONE]"
      assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
      assert process.wait(30) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    finally:
      process.kill()


@pytest.mark.parametrize("words, message", [
    (["--port=70000"], "--port=70000"), (["--timeout=0"], "--timeout=0"),
    (["--running=0"], "running=0"), (["--longest=99999999"], "at most 32768"),
    (["--chunk=0"], "chunk=0")])
def test_errors(tmp_path, capsys, words, message):
  """Law: bad settings are said before the model is loaded."""
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "tokenizer.json").write_text("")
  assert cli.run(["serve", str(tmp_path), *words]) == 2
  assert message in capsys.readouterr().err
