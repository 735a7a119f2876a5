import numpy as np

from dsv3_jax.data import fim


def parts(tokens, tokenizer):
  """Prefix, suffix and middle of a rearranged document, read by its marks."""
  tokens = tokens.tolist()
  hole, end = tokens.index(tokenizer.fim_hole), tokens.index(tokenizer.fim_end)
  assert tokens[0] == tokenizer.fim_begin
  assert sum(t in (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end) for t in tokens) == 3
  return tokens[1:hole], tokens[hole + 1:end], tokens[end + 1:]


def test_rearranged_documents_hold_the_text_in_prefix_suffix_middle_order(tokenizer, texts):
  """Oracle: the text, put together again; the tokenizer's own encoding of each part."""
  rng = np.random.default_rng(1)
  for text in texts:
    tokens = np.asarray(tokenizer.encode(text), np.int32)
    prefix, suffix, middle = parts(fim.rearrange(tokens, tokenizer, rng), tokenizer)
    assert tokenizer.decode(prefix + middle + suffix) == text
    for part in (prefix, suffix, middle):
      assert part == tokenizer.encode(tokenizer.decode(part))


def test_cuts_are_uniform_over_characters(tokenizer):
  """Oracle: the law of two ordered uniform draws from 0..n: all C(n+1,2)+n+1 outcomes, known
  chances (chi-square below its 1e-4 quantile)."""
  text, rng, draws = "def 東京", np.random.default_rng(2), 6000
  tokens, n = np.asarray(tokenizer.encode(text), np.int32), len(text)
  counts = np.zeros((n + 1, n + 1))
  for _ in range(draws):
    prefix, _, middle = parts(fim.rearrange(tokens, tokenizer, rng), tokenizer)
    first = len(tokenizer.decode(prefix))
    counts[first, first + len(tokenizer.decode(middle))] += 1
  expected = (np.triu(np.full((n + 1, n + 1), 2.0), 1) + np.eye(n + 1)) * draws / (n + 1) ** 2
  upper = np.triu_indices(n + 1)
  chi2 = ((counts - expected)[upper] ** 2 / expected[upper]).sum()
  assert counts[np.tril_indices(n + 1, -1)].sum() == 0
  assert chi2 < 61.0  # 27 degrees of freedom


def test_the_infilling_prompt_is_what_training_shows_before_a_middle(tokenizer):
  """Oracle: `rearrange` of the same text, cut where the prompt is cut."""
  text, rng = "def f(x):\n  return x\n", np.random.default_rng(3)
  tokens = np.asarray(tokenizer.encode(text), np.int32)
  out = fim.rearrange(tokens, tokenizer, rng)
  prefix, suffix, middle = parts(out, tokenizer)
  shown = fim.prompt(prefix, suffix, tokenizer)
  assert shown + middle == [tokenizer.bos, *out.tolist()]


def test_a_part_cut_inside_a_character_is_left_alone(tokenizer):
  """Oracle: the input; its bytes end inside a character, so no character cut exists."""
  tokens = np.asarray(tokenizer.encode("é\u4dff"), np.int32)[:-1]
  assert fim.rearrange(tokens, tokenizer, np.random.default_rng(0)) is tokens
