"""Distillation: filters, mixtures, the loss of probabilities, and runs with interruptions."""

import collections
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config
from dsv3_jax.cli import configs
from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.model import loss as loss_lib
from dsv3_jax.posttrain import distill, experts, messages, rejection, rewards, soft, tasks, teachers
from dsv3_jax.posttrain import run as kinds
from dsv3_jax.posttrain.problems import Score
from dsv3_jax.posttrain.rejection import Answer, Drawn, Taught
from dsv3_jax.train import state as state_lib
from tests.posttrain import test_run
from tests.quick import jit
from tests.train import fakes, runs

start = test_run.first  # a run to begin with, which is the expert too


def settings(**changes) -> config.Distill:
  return config.replace(config.Distill(), **{"longest": 8} | changes)


def answer(problem, text, tokens=5, ended=True, right=True, formed=True) -> Answer:
  return Answer(problem, text, tokens, ended, right, formed)


def test_filters():
  """Oracle: by hand: each answer is counted once, by the first filter that it fails."""
  drawn = [
      answer("a", "cut", ended=False, right=False), answer("a", "wrong", right=False, formed=False),
      answer("a", "form", formed=False, tokens=99), answer("a", "long", tokens=9),
      answer("a", "middle", tokens=7), answer("a", "short", tokens=3),
      answer("a", "short", tokens=3), answer("a", "other", tokens=3), answer("b", "last", tokens=8),
      answer("b", "cut", ended=False)]
  kept, counts = rejection.choose(drawn, settings())
  assert [a.text for a in kept] == ["short", "last"]
  assert counts == collections.Counter(
      cut_off=2, wrong=1, form=1, long=1, repeated=1, spare=2, kept=2)
  assert sum(counts.values()) == len(drawn) and set(counts) <= set(rejection.COUNTS)
  kept, _ = rejection.choose(drawn, settings(keep=2, format=False))
  assert [a.text for a in kept] == ["short", "other", "last"]
  kept, _ = rejection.choose(drawn, settings(keep=2, prefer="first", format=False, longest=99))
  assert [a.text for a in kept] == ["form", "long", "last"]


def test_judgements():
  """Oracle: what the problem's own solutions are worth, spoilt in one way each."""
  problem = tasks.make("add", 0, 1, 0)[0]
  texts = [problem.worked, problem.worked_long, problem.worked + " I hope",
           problem.worked.replace(problem.answer, "1000"), "no idea"]
  found = rejection.judge([problem] * 5, [Drawn(t, 7, True) for t in texts])
  assert [(a.right, a.formed) for a in found] == [
      (True, True), (True, True), (True, False), (False, True), (False, False)]
  assert found[0].problem == problem.id and found[3].why


def test_samples_and_mixture():
  """Oracle: conversations written by hand; shares counted."""
  problems = tasks.make("add", 0, 3, 0)
  kept = [answer(p.id, f"so {p.answer}") for p in problems[:2]]
  cfg = settings(samples=("short", "long", "absorbed"))
  found = rejection.samples(problems, kept, cfg, 4)
  assert [(t.expert, t.kind) for t in found] == [
      (-1, "short")] * 2 + [(4, "long")] * 2 + [(4, "absorbed")] * 2
  p = problems[1]
  question, said = {"role": "user", "content": p.prompt}, {"role": "assistant",
                                                           "content": f"so {p.answer}"}
  system = {"role": "system", "content": messages.REFLECTION}
  assert found[1].conversation == [question, {"role": "assistant", "content": p.worked}]
  assert found[3].conversation == [system, question, said]
  assert found[5].conversation == [question, said]
  for t in found[2:]:  # both were written after the same question
    assert rejection.as_asked(t, True)[0] == system and len(rejection.as_asked(t, True)) == 3
    assert rejection.as_asked(t, False) == rejection.as_asked(t, True)[1:]
  polite = Taught(0, "long", [{"role": "system", "content": f"Be kind.\n\n{messages.REFLECTION}"},
                              question, said])
  assert rejection.as_asked(polite, True) == polite.conversation
  assert rejection.as_asked(polite, False)[0]["content"] == "Be kind."
  assert rejection.distinct([*found, found[3]._replace(expert=5)]) == found

  others = [[question, {"role": "assistant", "content": str(i)}] for i in range(9)]
  mixed = rejection.mixed(found, others, 0.25, 0)
  assert mixed[:6] == found and [t.kind for t in mixed[6:]] == ["other"] * 2
  assert mixed == rejection.mixed(found, others, 0.25, 0) != rejection.mixed(found, others, 0.25, 1)
  everything = rejection.mixed(found, others, 0.9, 0)  # 54 are wanted
  assert sorted(t.conversation[1]["content"] for t in everything[6:]) == list("012345678")
  assert rejection.mixed(found, others, 0.0, 0) == found


# --- the loss


def transcription(p_PV, q_PV, target_P, count):
  """The docstring's equations in numpy, fp64, token after token."""
  nll, kl = [], []
  for p, q, target in zip(p_PV, q_PV, target_P):
    top = np.argsort(-q)[:count]
    nll.append(-np.log(p[target]))
    parts = [(q[i], p[i]) for i in top]
    if count < len(q):
      others = [i for i in range(len(q)) if i not in top]
      parts.append((q[others].sum(), p[others].sum()))
    kl.append(sum(a * (np.log(a) - np.log(b)) for a, b in parts))
  return np.array(nll), np.array(kl)


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("count", [1, 4, 11])
def test_token_losses(count):
  """Oracle: the equations in numpy and their difference quotients; k = V is the whole divergence,
  fewer never exceed it, and a student that is the expert has none."""
  rng = np.random.default_rng(count)
  P, D, V = 7, 5, 11
  h_PD, teacher_PD, head_DV = (rng.normal(size=s) for s in ((P, D), (P, D), (D, V)))
  target_P = rng.integers(0, V, P)
  f32 = functools.partial(np.asarray, dtype=np.float32)
  top, logprob, rest = soft.most_likely(f32(teacher_PD), f32(head_DV), count, 3)
  q_PV = softmax(teacher_PD @ head_DV)
  np.testing.assert_array_equal(top, np.argsort(-q_PV)[:, :count])
  np.testing.assert_allclose(np.exp(logprob).sum(1) + np.exp(rest), 1, rtol=1e-5)

  def ours(h, head):
    nll, kl, right = soft.token_losses(h, head, jnp.asarray(target_P), top, logprob, rest, 3)
    return jnp.sum(0.3 * nll + 0.7 * kl), (nll, kl, right)

  def theirs(h, head):
    nll, kl = transcription(softmax(h @ head), q_PV, target_P, count)
    return np.sum(0.3 * nll + 0.7 * kl)

  (_, (nll, kl, right)), grads = jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(
      f32(h_PD), f32(head_DV))
  p_PV = softmax(h_PD @ head_DV)
  for found, expected in zip((nll, kl), transcription(p_PV, q_PV, target_P, count)):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(right, p_PV.argmax(1) == target_P)
  full = (q_PV * np.log(q_PV / p_PV)).sum(1)
  if count == V:
    np.testing.assert_allclose(kl, full, rtol=1e-5, atol=1e-6)
  else:
    assert (np.asarray(kl) < full).all() and (np.asarray(kl) > 0).all()
  eps = 1e-6
  for x, gradient, move in ((h_PD, grads[0], lambda d: (h_PD + d, head_DV)),
                            (head_DV, grads[1], lambda d: (h_PD, head_DV + d))):
    for i in range(x.size):
      d = eps * np.eye(1, x.size, i).reshape(x.shape)
      slope = (theirs(*move(d)) - theirs(*move(-d))) / (2 * eps)
      np.testing.assert_allclose(np.asarray(gradient).reshape(-1)[i], slope, rtol=1e-3, atol=1e-4)
  _, same, _ = soft.token_losses(f32(teacher_PD), f32(head_DV), jnp.asarray(target_P), top, logprob,
                                 rest, 3)
  np.testing.assert_allclose(same, 0, atol=1e-6)


def test_a_sure_expert():
  """Law: where the others have 1e-9 of the probability, they keep it, and the gradient is finite;
  on a disk the sum is 1 again, and what comes back is near."""
  head_DV, h_PD = np.eye(6, dtype=np.float32), np.array([[20, -1, -1, 0, 0, 0]], np.float32)
  top, logprob, rest = soft.most_likely(h_PD, head_DV, 1, 4)
  np.testing.assert_allclose(rest[0], np.log(3 + 2 / np.e) - 20, rtol=1e-5)
  gradient = jax.grad(lambda h: soft.token_losses(
      h, head_DV, jnp.zeros(1, int), top, logprob, rest, 4)[1].sum())(h_PD)
  assert np.isfinite(gradient).all()
  kept = soft.narrowed(*(np.asarray(x) for x in (top, logprob, rest)))
  assert kept["top"].dtype == np.uint16 and kept["logprob"].dtype == np.float16
  for found, expected in zip(soft.widened(kept), (top, logprob, rest)):
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
  rng = np.random.default_rng(0)
  parts = soft.widened(soft.narrowed(rng.integers(0, 9, (5, 3)), rng.normal(-1, 1, (5, 3)),
                                     rng.normal(-1, 1, 5)))
  np.testing.assert_allclose(np.exp(parts[1]).sum(1) + np.exp(parts[2]), 1, rtol=1e-6)


def test_of_a_model():
  """Oracle: with alpha 1 `model.loss.loss_fn`, value and gradient; without, an expert that is the
  model itself adds nothing, and tokens without an expert have cross-entropy alone."""
  cfg = fakes.small_config()
  graphdef, params, buffers = state_lib.split(state_lib.build_model(cfg.model, 3))
  rng = np.random.default_rng(2)
  V, B, T, k = cfg.model.vocab_size, 2, 16, 4
  batch = {"tokens": rng.integers(0, V, (B, T + 1)).astype(np.int32),
           "segments": np.repeat([[0] * 7 + [1] * 10], B, 0).astype(np.int32),
           "mask": rng.integers(0, 2, (B, T + 1)).astype(np.int8)}
  top, logprob, rest = soft.teacher(cfg.model, cfg.runtime, k)(params, buffers, batch)
  later = lambda x: np.pad(np.asarray(x), [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
  taught = np.zeros((B, T + 1), np.int8)
  taught[0] = 1
  batch |= {"top": later(top), "top_logprob": later(logprob), "rest_logprob": later(rest),
            "taught": taught}
  how = dict(loss=config.Loss(sequence_balance=0.1), mtp_weight=0.3, runtime=cfg.runtime,
             denominator=9.0)

  @jit
  def plain(params, words):
    return jax.value_and_grad(lambda p: loss_lib.loss_fn(
        nnx.merge(graphdef, p, buffers), words, **how), has_aux=True)(params)

  @jit
  def ours(params, alpha):
    return jax.value_and_grad(lambda p: soft.loss_fn(
        nnx.merge(graphdef, p, buffers), batch, cfg=types.SimpleNamespace(alpha=alpha), **how),
        has_aux=True)(params)

  words = {name: batch[name] for name in ("tokens", "segments", "mask")}
  (expected, aux), gradient = plain(params, words)
  (found, more), own = ours(params, 1.0)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  close(found, expected)
  jax.tree.map(close, own, gradient)
  close(more.pop("more")["kl_expert"], 0, atol=1e-5)
  jax.tree.map(close, more, aux)
  # With alpha 1/4 three quarters of the first row's cross-entropy are gone.
  (_, first), _ = plain(params, words | {"mask": batch["mask"] * taught})
  close(expected - ours(params, 0.25)[0][0], 0.75 * first["loss_sum"] / 9, rtol=1e-3)


# --- runs


@pytest.fixture
def half(monkeypatch):
  """A reward that half of a random model's answers have, which never end; and small files."""
  def score(problems, answers):
    del problems
    return [Score(float(sum(a.encode()) % 2)) for a in answers]

  judge = rejection.judge
  monkeypatch.setattr(rewards, "score", score)
  monkeypatch.setattr(rejection, "judge", lambda problems, drawn: judge(
      problems, [d._replace(ended=True) for d in drawn]))
  monkeypatch.setattr(experts, "SHARD", 4)
  monkeypatch.setattr(teachers, "BLOCK", 2)


class Killed(runs.Interrupt):
  """As its parent, at a line that begins so."""

  def __init__(self, begins: str):
    super().__init__(0)
    self._begins = begins

  def progress(self, line, done):
    super().progress("step 0/" if line.startswith(self._begins) else line, done)


def configured(start, **changes):
  return test_run.asked(start, **{
      "kind": "distill", "distill.experts": (f"{start}=add:0:6", f"{start}=sort:0:2"),
      "distill.answers": 2, "distill.new_tokens": 5, "distill.samples": ("short", "absorbed"),
      "distill.mode": "logits", "distill.top": 3, "data.sequence_length": 64, "sft.epochs": 2.0,
      "optim.ema_decay": 0.9,
      "sft.problems": ("add:1:5",), "distill.share": 0.2} | changes)


def test_distillation_goes_on_as_if_nothing_had_been(start, tmp_path, half):
  """Oracle: the uninterrupted run: the same files, byte for byte, and the same final state, when it
  was killed while experts answered, and while their probabilities were kept."""
  whole, again = tmp_path / "whole", tmp_path / "again"
  cfg = configured(start)
  notes = runs.Notes()
  assert kinds.run(cfg, str(whole), ui=notes).finished
  for line in ("experts' answers, part 3 of 4", "experts' probabilities, part 2"):
    result = kinds.run(cfg, str(again), ui=Killed(line))
    assert not result.finished and result.exit_code == 143, line
  times = lambda: {p.name: p.stat().st_mtime_ns for p in (again / "distill").iterdir()}
  before = times()
  assert {"answers-00003.jsonl", "report.json", "logits-00000.npz"} <= before.keys()
  assert kinds.run(cfg, str(again), ui=runs.Notes()).finished
  assert before.items() <= times().items()  # what was there was not made again
  made = {p.name: p.read_bytes() for p in (again / "distill").iterdir()}
  assert made == {p.name: p.read_bytes() for p in (whole / "distill").iterdir()}
  runs.assert_same(whole, again)
  row = test_run.steps(whole)[0]
  assert 0 < row["kl_expert"] < row["loss"]

  report = json.loads(made["report.json"])
  (expert,) = report["experts"]
  assert expert["problems"] == 8 and sum(expert["answers"].values()) == 16
  assert expert["answers"]["kept"] == expert["answered"] == report["conversations"]["absorbed"]
  learnt = distill.read(whole)
  assert len([t for t in learnt if t.kind == "other"]) == round(
      0.25 * (report["conversations"]["short"] + report["conversations"]["absorbed"]))
  assert any(f"{expert['answers']['kept']} kept" in note for note in notes.notes)
  assert any("trained to see 16 at once" in note for note in notes.notes)
  kept = teachers.load(learnt, whole / "distill")
  assert [k is not None for k in kept] == [t.kind == "absorbed" for t in learnt]
  assert messages.read(whole / "distill" / distill.LEARNT) == [t.conversation for t in learnt]

  with pytest.raises(ConfigError, match="distill.keep=2, but the answers in .* made with 1"):
    kinds.run(config.replace(cfg, **{"distill.keep": 2}), str(again), ui=runs.Notes())
  plan = whole / "distill" / distill.PLAN
  plan.write_text(plan.read_text().replace(f'"{start}": 1', f'"{start}": 7'))
  (whole / "distill" / distill.REPORT).unlink()
  with pytest.raises(ConfigError, match="is at step 1 now, and was at 7 when it gave"):
    kinds.run(cfg, str(whole), ui=runs.Notes())


def test_places_of_probabilities(start, tmp_path):
  """Oracle: one conversation in a batch of its own: what a packed row has at the place of each
  answer's token is what the model says before it, asked for reflection."""
  from dsv3_jax.data.tokenizer import Tokenizer
  from dsv3_jax.train import checkpoint

  cfg = configured(start)
  tokenizer = Tokenizer.load(str(start / "tokenizer.json"), cfg.model.vocab_size)
  problems = tasks.make("add", 0, 2, 0)
  kept = [answer(p.id, f"{p.answer}") for p in problems]
  taught = rejection.samples(problems, kept, config.replace(
      cfg.distill, samples=("absorbed", "short")), 0)
  found = experts.named(cfg.distill, 0)
  teachers.keep(taught, found, cfg, tokenizer, tmp_path, runs.Notes(), lambda: False)
  loaded = teachers.load(taught, tmp_path)
  encoded = [messages.encode(t.conversation, tokenizer) for t in taught]
  softened = [distill.Soft(*e, k) for e, k in zip(encoded, loaded)]
  corpus = distill.SoftSamples(softened, softened, tokenizer, 200, 4, 0, top=3)
  params, buffers, _ = checkpoint.load_params(str(start))
  run = soft.teacher(cfg.model, cfg.runtime, 3)
  assert corpus.validation_batches(1)[0].keys() == {"tokens", "segments", "mask"}
  row = corpus.row([2, 1], softened)
  n = len(encoded[2].tokens)
  assert not row["taught"][:n].any()
  where = n + np.flatnonzero(encoded[1].mask)
  assert row["taught"].nonzero()[0].tolist() == where.tolist()
  alone = messages.encode(rejection.as_asked(taught[1], True), tokenizer)
  assert len(alone.tokens) > len(encoded[1].tokens)
  S = 65
  batch = {"tokens": np.zeros((4, S), np.int32), "segments": np.full((4, S), -1, np.int32)}
  batch["tokens"][0, :len(alone.tokens)], batch["segments"][0, :len(alone.tokens)] = alone.tokens, 0
  top, logprob, rest = (np.asarray(x)[0, np.flatnonzero(alone.mask) - 1]
                        for x in run(params, buffers, batch))
  np.testing.assert_array_equal(row["top"][where], top)
  np.testing.assert_allclose(row["top_logprob"][where], logprob, rtol=2e-3)
  np.testing.assert_allclose(row["rest_logprob"][where], rest, atol=2e-3)


STAGES = '''"""Does it?"""
from dsv3_jax.config import Config

def get_config(arg=None):
  return Config()

def stages(arg=None):
  yield {"stage": "first"}
  yield {"stage": "expert", "kind": "sft", "sft.problems": ("add:0:5",)}
  yield {"stage": "last", "kind": "distill", "train.init": "first",
         "distill.experts": ("expert=add:0:5", "runs/x=1=sort:0:5")}
'''


def test_stages_by_name(tmp_path):
  """Oracle: by hand: earlier stages' names stand for their folders."""
  (tmp_path / "e.py").write_text(STAGES)
  found = configs.load_stages(str(tmp_path / "e.py"), (), tmp_path)
  last = found[2][2]
  assert last.train.init == str(tmp_path / "1-first") == found[1][2].train.init
  assert last.distill.experts == (f"{tmp_path / '2-expert'}=add:0:5", "runs/x=1=sort:0:5")


@pytest.mark.parametrize("changes, message", [
    ({"distill.experts": ()}, "name whom to learn from, and what they are asked"),
    ({"distill.share": 0.0}, "distill.share=0.0 of the conversations .* name 1; set the share"),
    ({"sft.problems": ()}, "name 0; name some, or set it to 0"),
    ({"distill.share": 1.0}, "distill.share=1.0 must be at least 0 and below 1"),
    ({"distill.samples": ("brief",)}, "must be some of short, long, absorbed"),
    ({"distill.samples": ("short",)}, "which no expert wrote; add 'long' or 'absorbed'"),
    ({"distill.new_tokens": 64}, "answers of up to 64 tokens .* do not fit data.sequence_length"),
    ({"distill.temperature": 0.0}, "draws the same answer distill.answers=2 times"),
    ({"distill.top": 999}, "distill.top=999 exceeds model.vocab_size=320"),
    ({"distill.prefer": "short"}, "did you mean 'shortest'"),
    ({"distill.mode": "logit"}, "did you mean 'logits'"),
    ({"train.init": ""}, "kind='distill' begins with a trained model"),
    ({"distill.experts": ("add:0:5",)}, "'add:0:5' must be WORKDIR=FAMILY:LEVEL:COUNT"),
    ({"distill.experts": ("grop=add:0:5",)}, "grop holds neither .* an earlier stage's name"),
])
def test_refusals(start, tmp_path, changes, message):
  """Oracle: the messages."""
  with pytest.raises(ConfigError, match=message):
    kinds.run(configured(start, **changes), str(tmp_path), ui=runs.Notes())


def test_nothing_to_learn(start, tmp_path, monkeypatch, half):
  """Oracle: the message: no answer passes."""
  monkeypatch.setattr(rewards, "score", lambda problems, answers: [Score(0.0)] * len(answers))
  with pytest.raises(ConfigError, match="no answer of distill.experts passed .*'wrong': "):
    kinds.run(configured(start), str(tmp_path), ui=runs.Notes())


def test_whose_probabilities_are_of_other_tokens(start, tmp_path):
  """Oracle: the messages, before any answer is drawn."""
  cfg, other = configured(start), tokenizer_lib.train(["other text " * 99], test_run.VOCABULARY)
  with pytest.raises(ConfigError, match="another tokenizer"):
    teachers.check([experts.Expert(str(start), ())], cfg, other)
  for name in ("config.json", "tokenizer.json"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(ConfigError, match="needs runs as experts"):
    teachers.check([experts.Expert(str(tmp_path), ())], cfg, other)
