"""Expert load by domain, with routers whose loads are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.analysis import expert_load
from dsv3_jax.config import ConfigError
from dsv3_jax.data import domains as text
from dsv3_jax.train import domains, evaluate, optim, state
from tests.train import fakes


@pytest.fixture(scope="module")
def cfg():
  return fakes.small_config(**{"model.moe.groups": 1, "model.moe.active_groups": 1})


@pytest.fixture(scope="module")
def made(cfg):
  return state.initializer(lambda: state.build_model(cfg.model, 0),
                           optim.make_optimizer(cfg.optim))[2]()


@pytest.fixture
def load(cfg, made, monkeypatch):
  """A function: expert of each token id -> a run whose first layer sends it there and to the next.

  Embeddings are unit vectors, attention adds nothing, and the router reads the vector's place.
  """
  def run(name: str, expert_V: np.ndarray) -> evaluate.Trained:
    params = jax.tree.map(lambda x: x, made.params)  # the leaves stay, the dictionaries are new
    params["embedding_VD"] = jnp.asarray(np.eye(cfg.model.dim, dtype=np.float32)[expert_V])
    block = params["moe"]
    block["attn"]["w_o_HUD"] = jnp.zeros_like(block["attn"]["w_o_HUD"])
    router = np.zeros((1, cfg.model.dim, 4), np.float32)
    for e in range(4):
      router[0, e, e], router[0, e, (e + 1) % 4] = 3.0, 2.0
    block["ffn"]["w_router_DE"] = jnp.asarray(router)
    stored[name] = params
    return evaluate.Trained(name, cfg, fakes.FakeCorpus(cfg), {"step": 3})

  stored = {}
  monkeypatch.setattr(evaluate.checkpoint, "load_params",
                      lambda workdir, step, ema: (stored[workdir], made.buffers, {}))
  return run


def make_domain(name: str, letters: str, size: int, seed: int) -> text.Domain:
  rng = np.random.default_rng(seed)
  documents = tuple(text.Document(str(i), "".join(rng.choice(list(letters), size // 4)))
                    for i in range(4))
  return text.Domain(name, "made up", documents, 1.0)


def ids(letters: str) -> list[int]:
  return fakes.FakeTokenizer().encode(letters)


def test_loads_of_a_router_made_by_hand(cfg, load):
  """Oracle: numpy counts which token ids there are; each goes to two experts that are known."""
  expert_V = np.random.default_rng(0).integers(0, 4, fakes.VOCABULARY)
  said = []
  found = domains.measure(load("run", expert_V), [
      make_domain("a", "abcdefgh", 500, 1), make_domain("b", "stuvwxyz", 200, 2)],
      tokens=330, say=said.append)
  assert said == ["a", "b"] and found["layers"] == ["layer 0", "MTP 1"]
  assert list(found["counts"]) == ["a", "b"]
  for name, letters, size, seed in (("a", "abcdefgh", 500, 1), ("b", "stuvwxyz", 200, 2)):
    stream = np.concatenate(text.parts(make_domain(name, letters, size, seed).documents,
                                       fakes.FakeTokenizer(), 4 * 16, 330))
    assert len(stream) == min(330, size + 8)
    inputs = stream[:-1] if (len(stream) - 1) % 16 == 0 else stream  # of whole sequences
    best_E = np.bincount(expert_V[inputs], minlength=4)
    counts_BLE = found["counts"][name]
    np.testing.assert_array_equal(counts_BLE.sum(0)[0], best_E + np.roll(best_E, 1))
    assert counts_BLE.shape[1:] == (2, 4) and len(counts_BLE) > 4  # errors need several batches
    first = stream[:16]  # the first batch is one sequence
    np.testing.assert_array_equal(
        counts_BLE[0, 0], sum(np.bincount((expert_V[first] + i) % 4, minlength=4) for i in (0, 1)))
    facts = found["domains"][name]
    assert facts["tokens"] == len(stream) - 1 and facts["documents"] == 4
    assert facts["source"] == "made up"
    assert facts["bytes"] == (stream[1:] >= 6).sum()  # special tokens stand for none
    assert facts["bits_per_byte"] == pytest.approx(
        facts["loss"] * facts["tokens"] / facts["bytes"] / np.log(2))
  whole = domains.measure(load("run", expert_V), [make_domain("b", "stuvwxyz", 200, 2)], tokens=0)
  np.testing.assert_array_equal(whole["counts"]["b"].sum(0), found["counts"]["b"].sum(0))


def test_figure_9(cfg, load):
  """Oracle: by hand: a router whose experts are the domains', beside one that mixes them.

  Half the experts are a domain's own in the first, so its loads are 2 or 0 and its specialisation
  1 - 1/2, but for bos and eos (id 0 and 1: expert 0). In the second, loads are near 1.
  """
  own_V, mixed_V = np.zeros((2, fakes.VOCABULARY), int)
  own_V[ids("stuvwxyz")] = 2
  for letters in ("abcdefgh", "stuvwxyz"):
    mixed_V[ids(letters)] = np.arange(8) % 4
  known = [make_domain("a", "abcdefgh", 4000, 1), make_domain("b", "stuvwxyz", 4000, 2)]
  values = expert_load.join([
      expert_load.numbers(domains.measure(load(name, expert_V), known, tokens=0))
      for name, expert_V in (("loss-free", own_V), ("auxiliary", mixed_V))])
  free, auxiliary = values["runs"]
  np.testing.assert_allclose(free["load"]["a"][0], [2, 2, 0, 0], atol=0.02)
  np.testing.assert_allclose(free["load"]["b"][0], [0, 0, 2, 2], atol=0.02)
  assert free["specialisation"]["layers"][0] == pytest.approx(0.5, abs=0.01)
  np.testing.assert_allclose([x[0] for x in auxiliary["load"].values()], 1, atol=0.06)
  assert auxiliary["specialisation"]["layers"][0] < 0.03
  assert free["specialisation"]["by_chance"] < 0.06
  assert [row[0] for row in expert_load.comparison(values)] == ["loss-free", "auxiliary"]


def test_too_little_text_is_said(cfg, load):
  """Oracle: fewer tokens than a sequence: the domain and both numbers are named."""
  with pytest.raises(ConfigError, match="'a' has too little text: 16 tokens, .*length=16"):
    domains.measure(load("run", np.zeros(fakes.VOCABULARY, int)),
                    [make_domain("a", "ab", 8, 1)], tokens=0)


class _Corpus:
  """Knows what it was trained on."""

  def __init__(self, hashes):
    self._hashes = hashes

  def trained_on(self, hashes):
    return np.isin(hashes, self._hashes)


def test_text_is_held_out_from_every_run(cfg, tmp_path):
  """Oracle: the share of files that no run was trained on; a run alone has fewer."""
  hashes = []
  for i in range(4):
    (tmp_path / f"{i}.txt").write_text(f"text {i}")
    hashes.append(text.content_hash(f"text {i}".encode()))
  runs = [evaluate.Trained("x", cfg, _Corpus(np.array(hashes[i:i + 2], np.uint64)), {})
          for i in (0, 1)]
  own = [("mine", str(tmp_path))]
  assert domains.collect(runs, own=own)[0].held_out == pytest.approx(1 / 4)
  assert domains.collect(runs[:1], own=own)[0].held_out == pytest.approx(2 / 4)
