"""Scores of answers: Bradley-Terry, packing, runs that learn, and use in GRPO."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax import config, trained
from dsv3_jax.config import ConfigError
from dsv3_jax.data import chat
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.posttrain import pairs, preferences, reward_model, rewards, scores
from dsv3_jax.posttrain import run as kinds
from dsv3_jax.posttrain.preferences import Preference
from dsv3_jax.posttrain.problems import Problem
from dsv3_jax.train import optim, state
from dsv3_jax.train.checkpoint import Checkpoints
from tests.model import small
from tests.posttrain.test_run import asked, grpo
from tests.quick import jit
from tests.train import fakes, runs


@pytest.fixture(scope="module")
def tokenizer():
  return tokenizer_lib.train(["a b c d e 1 2 3\n" * 40], 320)


def test_bradley_terry():
  """Oracle: the loss and its gradient in numpy, pair by pair; places without a sign may be nan."""
  rng = np.random.default_rng(0)
  segments = np.array([[0, 0, 1, 1, 2, 3, 3, -1], [0, 1, 1, -1, -1, -1, -1, -1]])
  sign = np.array([[0, 1, 0, -1, 1, 0, -1, 0], [1, 0, -1, 0, 0, 0, 0, 0]])
  weight = np.where(sign > 0, [[0, .5, 0, 0, .2, 0, 0, 0], [.3, 0, 0, 0, 0, 0, 0, 0]], 0)
  score = np.where(sign == 0, np.nan, rng.normal(0, 3, sign.shape))
  ends = [((0, 1), (0, 3)), ((0, 4), (0, 6)), ((1, 0), (1, 2))]
  loss, slope, found = 0.0, np.zeros_like(score), dict.fromkeys(("right", "margin"), 0.0)
  for c, r in ends:
    w, m, s = weight[c], score[c] - score[r], score[c] + score[r]
    loss += w * (-np.log(1 / (1 + np.exp(-m))) + 0.1 * s**2)
    slope[c] += w * (-1 / (1 + np.exp(m)) + 0.2 * s)
    slope[r] += w * (1 / (1 + np.exp(m)) + 0.2 * s)
    found["right"] += w * (m > 0)
    found["margin"] += w * m
  given = [jnp.asarray(x) for x in (sign, weight.astype(np.float32), segments)]
  (value, parts), gradient = jit(jax.value_and_grad(
      lambda x: scores.bradley_terry(x, *given, 0.1), has_aux=True))(score.astype(np.float32))
  np.testing.assert_allclose(value, loss, rtol=1e-5)
  np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)
  for name, x in found.items():
    np.testing.assert_allclose(parts[name], x, rtol=1e-5)
  np.testing.assert_allclose(parts["pairs"], 1.0, rtol=1e-6)


def made(count, seed=0, swap=False):
  """Preferences for answers with an a over those with a b; `swap`: in random order."""
  rng = np.random.default_rng(seed)
  found = []
  for i in range(count):
    left, right = (" ".join(rng.choice(list("cde"), rng.integers(0, 3))) for _ in range(2))
    two = [f"{left} {x} {right}".strip() for x in "ab"]
    if swap and rng.random() < 0.5:
      two.reverse()
    found.append(Preference([{"role": "user", "content": f"{seed} {i}"}], *two))
  return found


def test_rows(tokenizer):
  """Oracle: the chat template: whole conversations, scores read at end tokens, weights one in all;
  what is learned beside them is the chosen answer, or the thoughts."""
  found = made(5)
  encoded, dropped = pairs.encode_all(found, tokenizer, False, 60)
  assert dropped == 0 and pairs.encode_all(found, tokenizer, False, 15) == ([], 5)
  corpus = pairs.Pairs(encoded, encoded[:1], tokenizer, 64, 2, 0)
  batch = next(corpus.train_iterator(lambda step: 4))
  assert batch["tokens"].shape == (2, 2, 65) and batch["weight"].sum() == pytest.approx(1)
  again = corpus.train_iterator(lambda step: 4)
  whole = corpus.train_iterator(lambda step: 4)
  made_first = [next(whole) for _ in range(4)]
  next(again), next(again)
  other = corpus.train_iterator(lambda step: 4)
  other.set_state(again.get_state())
  assert all((other_v == v).all() for b in made_first[2:] for other_v, v in zip(
      next(other).values(), b.values()))
  part = next(corpus.train_iterator(lambda step: 4, [1]))  # of another process
  assert all((v[:, 1:] == part[k]).all() for k, v in batch.items())
  seen = []
  for row in [dict(zip(batch, x)) for x in zip(*(v.reshape(4, 65) for v in batch.values()))]:
    for k in range(0, row["segments"].max() + 1):
      here = row["segments"] == k
      sign, = row["sign"][here & (row["sign"] != 0)]
      assert row["tokens"][here][-1] == tokenizer.eos and row["sign"][here][-1] == sign
      assert sign == 1 - 2 * (k % 2) and (row["weight"][here][-1] > 0) == (sign > 0)
      assert tokenizer.decode(row["tokens"][here & (row["mask"] > 0)][:-1]) in (
          [p.chosen for p in found] if sign > 0 else [""])
      seen.append(row["tokens"][here].tolist())
  parts = [[t for part in chat.parts(preferences.answered(p, chosen, False), tokenizer)
            for t in part.tokens] for p in found for chosen in (True, False)]
  assert all(p in seen for p in parts) and all(s in parts for s in seen)
  thoughtful = Preference(found[0].messages, "a", "b", "Good.", "Bad.")
  pair = pairs.encode(thoughtful, tokenizer, True)
  assert tokenizer.decode(pair.tokens[pair.mask]).replace(
      "<｜end▁of▁sentence｜>", "") == "Good.\nVerdict: yesBad.\nVerdict: no"
  with pytest.raises(ConfigError, match="preference 0 has no thoughts"):
    pairs.encode_all(found, tokenizer, True, 60)


def test_packing_changes_no_score(tokenizer):
  """Law: a pair's loss and gradient are the same alone and packed, a neighbour's text changes
  nothing (bit for bit), and the scorer reads in batches what training reads in rows."""
  cfg = config.replace(config.Config(), **{"runtime.attention_block": 4})
  model = small.build(config.replace(small.BASE, vocab_size=320, layers=1, dense_layers=0))
  graphdef, params, buffers = small.split(model)
  found = pairs.encode_all(made(4), tokenizer, False, 60)[0]
  own = config.Reward(text=0.5)
  corpus = lambda of, T: pairs.Pairs(of, [], tokenizer, T, 1, 0)

  @jit
  def both(params, batch):
    def total(params):
      model = nnx.merge(graphdef, params, buffers)
      return scores.loss_fn(model, batch, cfg=own, pad=tokenizer.pad, loss=cfg.loss,
                            mtp_weight=0.3, runtime=cfg.runtime, denominator=10.0)
    return jax.value_and_grad(total, has_aux=True)(params)

  def run(rows):
    batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    batch["weight"] = (batch["sign"] > 0).astype(np.float32)
    return both(params, {k: jnp.asarray(v) for k, v in batch.items()})

  T = 128
  row = corpus(found, T).row
  blank = row((), found)
  (_, alone), grads_alone = run([row((i,), found) for i in range(4)])
  (_, packed), grads = run([row((0, 1), found), row((2, 3), found), blank, blank])
  for a, b in zip(jax.tree.leaves((packed["loss_sum"], packed["more"], grads)),
                  jax.tree.leaves((alone["loss_sum"], alone["more"], grads_alone)), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
  assert float(packed["tokens"]) == 4

  @jit
  def read(tokens, segments):
    hidden = model.hidden(model.embed(tokens, cfg.runtime), segments_BT=segments,
                          runtime=cfg.runtime)
    return scores.read(model, hidden.h_BTD, tokenizer.pad)

  one = row((0, 1), found)
  other = dict(one, tokens=np.where(one["segments"] >= 2, 9, one["tokens"]))
  here = one["segments"][:T] < 2
  x, y = (np.asarray(read(r["tokens"][None, :T], r["segments"][None, :T]))[0] for r in (one, other))
  assert (x[here] == y[here]).all() and (x[~here] != y[~here]).any()
  scorer = scores.Scorer(config.replace(cfg, model=model.cfg), params, buffers, tokenizer.pad, 3)
  sequences = [half for p in found for half in (p.tokens[:p.chosen], p.tokens[p.chosen:])]
  scored = scorer(sequences)
  np.testing.assert_allclose(scored[:4], x[one["sign"][:T] != 0], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(scorer(sequences[::-1])[::-1], scored, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def first(tokenizer, tmp_path_factory):
  """A run to begin with, of no step."""
  folder = tmp_path_factory.mktemp("first")
  cfg = fakes.small_config(**{"model.vocab_size": 320, "model.mtp_depth": 0})
  init = state.initializer(lambda: state.build_model(cfg.model, 0), optim.make_optimizer(cfg.optim))
  store = Checkpoints(str(folder))
  store.save(init[-1](), {"step": 0, "tokens": 0, "elapsed_s": 0.0, "val_loss": None,
                          "iterator": None, "config": config.to_dict(cfg)})
  store.wait()
  store.close()
  (folder / "tokenizer.json").write_text(tokenizer.to_json())
  return folder


def test_learned_and_asked_by_grpo(first, tmp_path):
  """Law: held-out pairs are ranked right, and by chance those whose order was random: nothing in
  rows tells which is the chosen one.  Oracle of GRPO's rewards: the scores of the same answers,
  asked for here."""
  mixed = made(160, 3) + made(80, 4, swap=True)
  preferences.write(tmp_path / "all.jsonl", mixed)
  model = tmp_path / "reward"
  learn = asked(first, **{
      "kind": "reward", "model.mtp_depth": 0, "reward.epochs": 6.0,
      "reward.files": (str(tmp_path / "all.jsonl"),), "data.sequence_length": 64,
      "data.batch_size": 16, "data.validation_fraction": 0.4, "optim.lr": 3e-2,
      "optim.lr_final": 3e-2, "optim.lr_last": 3e-2, "train.eval_every": 100,
      "train.eval_batches": 100, "train.checkpoint_every": 100})
  assert kinds.run(learn, str(model), ui=runs.Notes()).finished
  load = reward_model.load(config.Reward(model=str(model)))
  held = preferences.split(mixed, 0.4)[1]
  scored = [[s.value for s in load["preference"]([p.problem for p in held],
                                                 [getattr(p, side) for p in held])]
            for side in ("chosen", "rejected")]
  right = {tag: [c > r for p, c, r in zip(held, *scored)
                 if p.messages[0]["content"].startswith(tag)] for tag in "34"}
  share = {tag: sum(x) / len(x) for tag, x in right.items()}
  assert len(right["4"]) > 20 and share["3"] > 0.9 and 0.2 < share["4"] < 0.8, share
  found = json.loads((model / reward_model.NAME).read_text())
  assert found["pairs"] == len(held) and found["accuracy"] == pytest.approx(
      sum(map(sum, right.values())) / len(held))
  rows = runs.records(model)
  last = [r for r in rows if r["kind"] == "eval"][-1]
  assert last["accuracy"] == pytest.approx(found["accuracy"]) and "bits_per_byte" not in last
  row = [r for r in rows if r["kind"] == "train"][-1]
  assert row["margin"] == pytest.approx(row["chosen_score"] - row["rejected_score"], abs=1e-4)

  asking = grpo(first, **{
      "grpo.rollouts": 2, "grpo.prompts": 2, "grpo.group": 4, "model.mtp_depth": 0,
      "reward.model": str(model), "reward.names": ("preference:1",)})
  assert kinds.run(asking, str(tmp_path / "grpo"), ui=runs.Notes()).finished
  text = (tmp_path / "grpo" / "transcripts.jsonl").read_text()
  lines = [json.loads(x) for x in text.splitlines()]
  outputs = [(Problem("", line["prompt"]), o) for line in lines for o in line["outputs"]]
  again = load["preference"]([p for p, _ in outputs], [o["text"] for _, o in outputs])
  assert [o["why"] for _, o in outputs] == [s.why for s in again] and len(again) == 16
  assert all(0 < o["reward"] < 1 for _, o in outputs)
  with pytest.raises(ConfigError, match="is a run of kind='pretrain'; 'preference' needs one"):
    reward_model.load(config.Reward(model=str(first)))["preference"]([Problem("", "a")], ["b"])


def test_names_of_rewards():
  """Oracle: the messages; names stand in place of the problems' own."""
  problem = Problem("p", "1?", "2")
  named = reward_model.of_problems([problem], config.Reward(model="x", names=("vote:2", "math:1")))
  assert named[0].reward == (("vote", 2.0), ("math", 1.0))
  assert reward_model.of_problems([problem], config.Reward()) == [problem]
  for names, said in ((("judge:1",), "'judge' asks a model; name its workdir in reward.model"),
                      (("math",), "reward.names: 'math' must be NAME:WEIGHT"),
                      (("maths:1",), "no reward 'maths'")):
    with pytest.raises(ConfigError, match=said):
      reward_model.of_problems([problem], config.Reward(names=names))


def test_words_before_the_score(tokenizer, monkeypatch, tmp_path):
  """Law: a judge's and a vote's questions go to the model of the workdir; a score that comes after
  a thought is read behind the one that the model writes."""
  (tmp_path / "checkpoints").mkdir()
  (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
  told = []

  class Writer:
    def __call__(self, prompts, steps, sampling, stop):
      told.extend((tokenizer.decode(p), s.temperature) for p, s in zip(prompts, sampling))
      done = lambda: None
      done.tokens, done.finish = tokenizer.encode("Yes, it is.\nVerdict: yes"), "stop"
      return [done] * len(prompts)

  monkeypatch.setattr(trained, "load", lambda folder: trained.Trained(Writer(), tokenizer, 0))
  cfg = config.Reward(model=str(tmp_path), votes=3)
  problem = Problem("", "1?", "2", (("judge", 1.0), ("vote", 1.0)))
  score, = rewards.score([problem], ["2"], reward_model.load(cfg))
  assert score.value == 1 and len(told) == 4 and "3 of 3 votes" in score.why
  assert told[0][1] == 0 and told[1][1] == 1 and "Reference" in told[0][0]
  model = reward_model._Model(cfg)
  of = config.replace(config.Config(), **{"reward.text": 1.0, "reward.thought": True})
  model.scored = of, tokenizer, lambda sequences: [float(len(s)) for s in sequences]
  sequence = chat.parts(preferences.answered(
      Preference(problem.messages, "2", "3", "Yes, it is.", "x"), True, True), tokenizer)
  found, = model.scores([[*problem.messages, {"role": "assistant", "content": "2"}]])
  assert found == (sum(len(p.tokens) for p in sequence), "Yes, it is.\nVerdict: yes")


def test_a_judge_is_trained_on_text(tokenizer):
  """Law: form "judge" is fine-tuning on what it will be asked, with the usual loss."""
  given = Preference([{"role": "user", "content": "2+2?"}], "4", "5", "It says 4.", "It says 5.",
                     "4")
  cfg = config.replace(config.Config(), **{
      "reward.form": "judge", "data.sequence_length": 2000, "data.validation_fraction": 0.0})
  corpus = reward_model.corpus(cfg, tokenizer, [given])
  assert reward_model.losses(cfg, tokenizer) == {}
  row, = corpus.epoch(0)
  text = tokenizer.decode(row["tokens"][row["mask"] > 0])
  assert "It says 4.\nVerdict: yes" in text and "It says 5.\nVerdict: no" in text
  with pytest.raises(ConfigError, match="reads a score from one column of the head"):
    reward_model.check(config.replace(config.Config(), **{"runtime.shard_vocab": True}))
  with pytest.raises(ConfigError, match="reward.thought: a thought that is not learned"):
    config.Reward(thought=True)


def test_sampled_pairs_are_of_their_settings(tokenizer, tmp_path):
  """Oracle: the message: pairs that were drawn with other settings are not taken for these."""
  cfg = config.replace(config.Config(), **{
      "kind": "reward", "train.init": "runs/sft", "reward.problems": ("add:0:4",),
      "reward.samples": 2})
  (tmp_path / reward_model.SETTINGS).write_text(json.dumps(reward_model.sampling(cfg)))
  preferences.write(tmp_path / reward_model.SAMPLED, made(2))
  assert len(reward_model.gather(cfg, tokenizer, str(tmp_path), (), runs.Notes())) == 2
  other = config.replace(cfg, **{"reward.samples": 3})
  with pytest.raises(ConfigError, match="reward.samples=3, but the pairs in .* made with 2"):
    reward_model.gather(other, tokenizer, str(tmp_path), (), runs.Notes())
