"""The model in lm-evaluation-harness."""

import json

import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError
from dsv3_jax.infer import score
from dsv3_jax.train import checkpoint, state
from tests import saved_run
from tests.quick import jit

TEXT = "def main(argv):\n  print(argv)\n"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  saved_run.make(folder)
  return folder


@pytest.fixture(scope="module")
def model(workdir):
  pytest.importorskip("lm_eval")  # takes seconds, so not for whoever only collects tests
  from dsv3_jax import harness

  return harness.DSV3(str(workdir), max_length=100)


@pytest.fixture(scope="module")
def own_logits(workdir):
  """Of the training model: float64 [T, V] after T tokens."""
  params, buffers, _ = checkpoint.load_params(str(workdir))
  graphdef, _, _ = state.split(state.build_model(saved_run.CONFIG.model, 0))
  run = jit(lambda tokens: nnx.merge(graphdef, params, buffers)(tokens).logits_BTV[0])

  def padded(tokens):  # what is right of a position cannot reach it
    return np.asarray(run(np.array([[*tokens, *[0] * (128 - len(tokens))]])), np.float64)

  return lambda tokens: padded(tokens)[:len(tokens)]


def test_scores_are_the_models(own_logits, model):
  """Oracle: log-softmax of the training model's logits, sequence by sequence."""
  tokenizer, rng = model._tokenizer, np.random.default_rng(0)
  asked = [([tokenizer.bos, *rng.integers(9, 260, n).tolist()], rng.integers(9, 260, m).tolist())
           for n, m in ((0, 1), (5, 30), (60, 3))]
  best = [*asked[1][0], 40]
  asked.append((best, [int(own_logits(best)[-1].argmax())]))
  for (context, rest), found in zip(asked, score.score(model._generator, asked, rows=3)):
    logits = own_logits(context + rest)[len(context) - 1:-1]
    own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(found.logprobs, own[np.arange(len(rest)), rest], rtol=1e-4)
    assert found.greedy == (logits.argmax(-1) == rest).all()
  assert found.greedy
  for wrong, words in ((([], [1]), "empty context"), (([1], []), "empty continuation"),
                       (([1], [9999]), "vocabulary")):
    with pytest.raises(ConfigError, match=words):
      score.score(model._generator, [wrong])


def test_long_text_rolls(own_logits, model):
  """Oracle: windows by hand: each token but the first ones sees at least one before it."""
  from lm_eval.api.instance import Instance

  text = TEXT * 20
  tokens = model.tok_encode(text)
  assert len(tokens) > model.max_length
  total = 0.0
  first = model.max_length - 1
  for start, end in ((0, first), (first, len(tokens))):
    before = [model.prefix_token_id, *tokens][max(0, end - first):start + 1]
    logits = own_logits(before + tokens[start:end])[len(before) - 1:-1]
    own = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total += own[np.arange(end - start), tokens[start:end]].sum()
  found, = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
  assert found == pytest.approx(total, rel=1e-4)


def test_local_tasks(tmp_path, model):
  """Law: tasks in a folder run: multiple choice, perplexity and generation; the harness' own
  metrics are finite, and what it wrote is the generator's."""
  rows = [{"text": "def main", "choices": ["(argv)", "!!"], "label": 0},
          {"text": "  print", "choices": ["(", "argv"], "label": 1}]
  (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  common = (f"dataset_path: json\ndataset_kwargs:\n  data_files: {tmp_path}/rows.jsonl\n"
            "test_split: train\n")
  (tmp_path / "choose.yaml").write_text(
      f"task: choose\n{common}output_type: multiple_choice\n"
      "doc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
      "target_delimiter: ''\nmetric_list:\n  - metric: acc\n")
  (tmp_path / "perplexity.yaml").write_text(
      f"task: perplexity\n{common}output_type: loglikelihood_rolling\n"
      "doc_to_text: ''\ndoc_to_target: '{{text}}'\nmetric_list:\n  - metric: bits_per_byte\n")
  (tmp_path / "write.yaml").write_text(
      f"task: write\n{common}output_type: generate_until\n"
      "doc_to_text: '{{text}}'\ndoc_to_target: 'x'\n"
      "generation_kwargs:\n  until: ['zz']\n  max_gen_toks: 7\n"
      "metric_list:\n  - metric: exact_match\n")
  import lm_eval
  from lm_eval.tasks import TaskManager

  found = lm_eval.simple_evaluate(
      model, tasks=["choose", "perplexity", "write"], bootstrap_iters=0,
      task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False))
  assert 0 <= found["results"]["choose"]["acc,none"] <= 1
  assert 0 < found["results"]["perplexity"]["bits_per_byte,none"] < 50
  for sample, row in zip(found["samples"]["write"], rows):
    prompt = [model.prefix_token_id, *model.tok_encode(row["text"])]
    done, = model._generator([prompt], 7, stop=(model.eot_token_id,))
    assert sample["resps"][0][0].split("zz")[0] == model.tok_decode(done.tokens).split("zz")[0]
