"""Measures of a random model, against the training model's full forward passes."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from dsv3_jax import cli, trained
from dsv3_jax.config import ConfigError
from dsv3_jax.evals import choice, generation, needle, tasks, text
from dsv3_jax.infer.generate import Generator
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.train import checkpoint, state
from tests import saved_run
from tests.quick import jit

EXAMPLES = Path(__file__).parents[2] / "experiments" / "tasks" / "small.jsonl"
WINDOW, ROWS, LONGEST = 96, 8, 128


@pytest.fixture(scope="module")
def variables():
  """Parameters and buffers."""
  made = saved_run.random_state()
  return made.params, made.buffers


@pytest.fixture(scope="module")
def model(variables):
  return trained.Trained(Generator(saved_run.CONFIG.model, *variables), saved_run.tokenizer(), 64)


@pytest.fixture(scope="module")
def own_logits(variables):
  """Of the training model: float64 [T, V] after T tokens."""
  build = nnx.eval_shape(lambda: state.build_model(saved_run.CONFIG.model, 0))
  graphdef, _, _ = state.split(build)
  run = jit(lambda tokens: nnx.merge(graphdef, *variables)(tokens).logits_BTV[0])

  def padded(tokens):  # what is right of a position cannot reach it
    return np.asarray(run(np.array([[*tokens, *[0] * (LONGEST - len(tokens))]])), np.float64)

  return lambda tokens: padded(tokens)[:len(tokens)]


@pytest.fixture(scope="module")
def nats(own_logits):
  """-log-probability of each token but the first."""
  def f(tokens):
    logits = own_logits(tokens)[:-1]
    own = logits[np.arange(len(logits)), tokens[1:]]
    top = logits.max(-1)
    return np.log(np.exp(logits - top[:, None]).sum(-1)) + top - own

  return f


@pytest.fixture(scope="module")
def rollout(own_logits, model):
  """The greedy continuation, by a full forward pass for each token."""
  def f(prompt, steps):
    tokens = list(prompt)
    for _ in range(steps):
      logits = own_logits(tokens)[-1]
      logits[model.tokenizer.vocab_size:] = -np.inf
      tokens.append(int(logits.argmax()))
      if tokens[-1] == model.tokenizer.eos:
        return tokens[len(prompt):-1]
    return tokens[len(prompt):]

  return f


def test_bits_per_byte(model, nats):
  """Oracle: windows by hand: the second begins where the first left stride less of its tokens."""
  t = model.tokenizer
  words = "def f(x): return x\n" * 8
  ids = [t.bos, *t.encode(words), t.eos]
  assert 2 * WINDOW - 32 > len(ids) > WINDOW + 16
  expected = nats(ids[:WINDOW])
  for first in range(WINDOW, len(ids), 16):
    end = min(first + 16, len(ids))
    expected = np.append(expected, nats(ids[end - WINDOW:end])[first - end:])
  found = text.measure(model.generator, t, [("long", words), ("short", "héllo")], WINDOW, 16,
                       rows=ROWS)
  long, short = found["documents"]
  assert long["tokens"] == len(expected) == len(ids) - 1 and long["bytes"] == len(words)
  assert long["bits"] == pytest.approx(expected.sum() / math.log(2), rel=1e-4)
  assert long["end_bits"] == pytest.approx(expected[-1] / math.log(2), rel=1e-4)
  assert short["bytes"] == 6
  bits = long["bits"] + short["bits"]
  assert found["bits_per_byte"] == pytest.approx(bits / (len(words) + 6))
  assert found["loss"] == pytest.approx(bits * math.log(2) / found["tokens"])
  cut = text.measure(model.generator, t, [("long", words), ("short", "hello")], WINDOW, 16,
                     tokens=20, rows=ROWS)
  assert cut["tokens"] == 20 and len(cut["documents"]) == 1 and cut["end_bits"] == 0
  assert cut["documents"][0]["bits"] == pytest.approx(expected[:20].sum() / math.log(2), rel=1e-4)
  assert cut["bytes"] == len(t.decode(ids[1:21]))
  with pytest.raises(ConfigError, match="no text"):
    text.measure(model.generator, t, [("empty", "")], WINDOW)


def test_choices(model, nats):
  """Oracle: the probabilities of the whole texts: what all have in common cancels."""
  records = [r for r in tasks.read(EXAMPLES) if isinstance(r, tasks.Choice)]
  records.append(tasks.Choice("x:1", "x", "long " * 40, ("a", "bb"), 1))
  t = model.tokenizer
  found = choice.measure(model.generator, t, records, WINDOW, ROWS)
  for record, one in zip(records, found, strict=True):
    wholes = [[t.bos, *t.encode(record.question + record.delimiter + c)] for c in record.choices]
    if record.name == "x:1":  # no longer than the window, with the longest choice
      most = max(one["tokens"])
      own = [nats(w[-(WINDOW - most + n):])[-n:].sum()
             for w, n in zip(wholes, one["tokens"], strict=True)]
    else:
      own = [nats(w).sum() for w in wholes]
    own = -np.array(own)
    np.testing.assert_allclose(np.subtract(one["logprobs"], one["logprobs"][0]), own - own[0],
                               rtol=1e-4, atol=2e-3)
    own += one["logprobs"][0] - own[0]
    sizes = [len(c.encode()) for c in record.choices]
    assert one["chosen"] == own.argmax() and one["chosen_normalised"] == (own / sizes).argmax()
    assert one["correct"] == (own.argmax() == record.answer)
  made = choice.summary(found)
  right = [f["correct"] for f in found]
  assert made["accuracy"] == pytest.approx(np.mean(right))
  assert made["chance"] == pytest.approx(np.mean([1 / len(r.choices) for r in records]))
  with pytest.raises(ConfigError, match="x:1: .*--window"):
    choice.measure(model.generator, t, [tasks.Choice("x:1", "x", "a", ("a" * 200, "b"), 0)], WINDOW)


def test_written_answers(model, rollout):
  """Oracle: greedy rollouts of full forward passes, cut at stop strings by hand."""
  t = model.tokenizer
  records = [r for r in tasks.read(EXAMPLES) if isinstance(r, tasks.Generation)]
  write = lambda r: t.decode(rollout([t.bos, *t.encode(r.prompt)], r.max_tokens))
  change = lambda i, **fields: dataclasses.replace(records[i], **fields)
  whole, stop = write(records[0]), write(records[2])[3:5]
  records[0] = change(0, answers=("x", f" {whole}\n"), stop=())
  records[2] = change(2, answers=(write(records[2]),), stop=("zzz", stop))
  records[3] = change(3, regex="", stop=())
  found = generation.measure(model.generator, t, records, WINDOW, rows=ROWS)
  for record, one in zip(records, found, strict=True):
    expected = write(record)
    for s in record.stop:
      expected = expected.split(s)[0]
    sample, = one["samples"]
    assert sample["text"] == expected and sample["tokens"] <= record.max_tokens
    assert sample["correct"] == generation.correct(record, expected)
  right, _, stopped, long, _ = found
  assert right["exact"] == long["exact"] == 1 and stopped["exact"] == 0
  assert stopped["samples"][0]["finish"] == "stop" and long["samples"][0]["finish"] == "length"
  assert right["samples"][0]["tokens"] == 6 and long["samples"][0]["tokens"] == 12


def test_samples(model):
  """Law: samples of one record differ, and repeat alone and beside others."""
  record = tasks.read(EXAMPLES)[-2]
  record = dataclasses.replace(record, regex="[a-m]", stop=("zzz",))
  hot = Sampling(temperature=1.0, seed=5)
  run = lambda records, samples: generation.measure(model.generator, model.tokenizer, records,
                                                    WINDOW, samples, hot, rows=5)
  one, = run([record], 5)
  texts = [s["text"] for s in one["samples"]]
  assert len(set(texts)) == 5
  again, other = run([record, dataclasses.replace(record, name="x:2")], 3)
  assert [s["text"] for s in again["samples"]] == texts[:3]
  assert not {s["text"] for s in other["samples"]} & set(texts)
  right = sum(generation.correct(record, s) for s in texts)
  assert one["pass_at"] == {"1": pytest.approx(right / 5), "5": float(right > 0)}
  assert one["exact"] == right / 5


def test_needles(model, nats, own_logits, rollout):
  """Oracle: full forward passes; a needle whose value is what the model writes is recalled."""
  t, filler = model.tokenizer, needle.Filler(model.tokenizer, ["abc def\n" * 30])
  made = needle.make(filler, 96, (0, 0.5, 1), template="{key}={value}", digits=2)
  made.append(dataclasses.replace(made[0], answer=rollout(made[0].prompt, 2)))
  found = needle.measure(model.generator, t, made, ROWS)
  for h, one in zip(made, found, strict=True):
    n = len(h.answer)
    bits = nats(h.prompt + h.answer)[-n:].sum() / math.log(2)
    assert one["bits"] == pytest.approx(bits, rel=1e-4)
    alone = nats([t.bos, *h.question, *h.answer])[-n:].sum() / math.log(2)
    assert one["gain"] == pytest.approx(alone - bits, rel=1e-3, abs=1e-3)
    logits = own_logits(h.prompt + h.answer)[-n - 1:-1]
    ranks = (logits > logits[np.arange(n), h.answer][:, None]).sum(-1)
    assert one["ranks"] == ranks.tolist() and one["forced"] == (not ranks.any())
    assert one["text"] == t.decode(rollout(h.prompt, 4))
  assert [f["recall"] for f in found] == [False, False, False, True]
  # Jobs of several lengths at once.
  jobs = [generation.Job(h.prompt, n) for h, n in zip(made, (4, 3, 2, 1))]
  for job, written in zip(jobs, generation.write(model.generator, t, jobs), strict=True):
    assert written.text == t.decode(rollout(job.prompt, job.max_tokens))
    assert (written.tokens, written.finish) == (job.max_tokens, "length")


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path, monkeypatch, model):
  """A folder that is taken for a run of the model."""
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  (tmp_path / "run" / "tokenizer.json").write_text("")
  monkeypatch.setattr(checkpoint, "load_meta", lambda source, step: {"step": 3})
  monkeypatch.setattr(trained, "load", lambda *_: model)
  return tmp_path / "run"


def test_command(workdir, model, tmp_path, capsys):
  """Law: one line of JSON, the file and the picture say what the functions give."""
  (tmp_path / "words.txt").write_text("def main\n" * 9)
  out = tmp_path / "out"
  words = ["eval", str(workdir), f"--text={tmp_path}/words.txt", f"--tasks={EXAMPLES}", "--needle",
           "--lengths=96", "--depths=0,100", "--needles=2", "--template={key}={value}",
           "--digits=2", f"--window={WINDOW}", f"--out={out}"]
  assert cli.run([*words, "--json"]) == 0
  line, err = capsys.readouterr()
  found, whole = json.loads(line), json.loads((out / "results.json").read_text())
  assert {k: v for k, v in whole.items() if k != "samples"} == found
  assert found["step"] == 3 and (out / "needle.png").read_bytes().startswith(b"\x89PNG")
  assert "choices: 26 done" in err and "answers: 5 done" in err and "needles: 8 done" in err
  records = tasks.read(EXAMPLES)
  assert [s["name"] for s in whole["samples"]["tasks"]] == [r.name for r in records]
  expected = choice.measure(model.generator, model.tokenizer, records[:8], WINDOW)
  assert whole["samples"]["tasks"][:8] == expected
  assert [(t["task"], t["records"]) for t in found["tasks"]] == [
      ("python", 5), ("words", 3), ("copying", 2), ("code", 3)]
  bits = text.measure(model.generator, model.tokenizer, [("", "def main\n" * 9)], WINDOW)
  assert found["text"][0]["bits_per_byte"] == pytest.approx(bits["bits_per_byte"])
  assert len(whole["samples"]["needle"]) == 4 and found["needle"]["depths"] == [0, 1]
  assert cli.run(["eval", str(workdir), f"--tasks={EXAMPLES}", f"--window={WINDOW}"]) == 0
  shown = capsys.readouterr().out
  assert "multiple choice" in shown and f"{found['tasks'][0]['accuracy']:.1%}" in shown


@pytest.mark.parametrize("words, message", [
    (["--tasks=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    (["--tasks=BAD"], "bad.jsonl:2: answer or regex".replace("answer", "give answer")),
    (["--text=nowhere.txt"], "--text=nowhere.txt: 'nowhere.txt' does not exist"),
    (["--stride=3"], "--stride goes with --text"), (["--pass-at=1"], "goes with --tasks"),
    (["--needle", "--text=BAD", "--domains"], "measured apart"),
    (["--needle", "--lengths=a"], "--lengths=a"), (["--needle", "--template=x"], "{key}"),
    (["--needle", "--depths=120"], "from 0"), (["--needle", "--batches=2"], "--batches"),
    (["--tasks=GOOD", "--samples=3"], "--temperature"), (["--tasks=GOOD", "--rows=0"], "--rows=0"),
    (["--tasks=GOOD", "--window=1"], "--window=1"), (["--tokens=5"], "--text"),
    (["other", "--needle"], "one model at a time")])
def test_mistakes_are_found_before_a_model_is_loaded(workdir, tmp_path, capsys, monkeypatch, words,
                                                     message):
  """Law: exit code 2 and a line that names the option."""
  monkeypatch.setattr(trained, "load", lambda *_: pytest.fail("loaded"))
  (tmp_path / "bad.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
  (tmp_path / "good.jsonl").write_text('{"prompt": "a", "answer": "b"}\n')
  words = [w.replace("BAD", f"{tmp_path}/bad.jsonl").replace("GOOD", f"{tmp_path}/good.jsonl")
           for w in words]
  assert cli.run(["eval", str(workdir), *words]) == 2
  out, err = capsys.readouterr()
  assert message in err and not out
