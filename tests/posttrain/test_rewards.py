"""The registry and the rules that read an answer as text or mathematics."""

import subprocess
import sys
import time

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import rewards, tasks
from dsv3_jax.posttrain.problems import Problem, Score
from dsv3_jax.posttrain.rewards import equality, final


def _value(answer: str, reward, gold: str = "42", prompt: str = "What is 6 * 7?", **extra) -> float:
  score, = rewards.score([Problem("p", prompt, gold, reward, extra=extra)], [answer])
  return score.value


def test_worked_solutions_are_right():
  """Oracle: the generators' own solutions earn all; the same with another problem's box nothing."""
  problems = [p for name in tasks.families() for p in tasks.make(name, 0, 6, seed=1)]
  for field in ("worked", "worked_long"):
    assert all(s.value == 1 for s in rewards.score(problems, [getattr(p, field) for p in problems]))
  wrong = [p.worked.replace(p.answer + "}", p.answer + "7}") for p in problems]
  assert max(s.value for s in rewards.score(problems, wrong)) < 0.1 / 1.1 + 1e-9


def test_weights():
  """Oracle: a mean by weights, by hand; other rewards are given by name, and asked once."""
  asked = []

  def half(problems, answers):
    asked.append(list(answers))
    return [Score(0.5, "so so") for _ in answers]

  one = Problem("a", "?", "1", (("exact", 3.0), ("half", 1.0)))
  found = rewards.score([one, Problem("b", "?", "2"), one], ["1", "2", "3"], {"half": half})
  assert [s.value for s in found] == [(3 + 0.5) / 4, 1.0, 0.5 / 4] and asked == [["1", "3"]]
  assert found[0].why == "exact 1; half 0.5 (so so)" and rewards.score([], []) == []


@pytest.mark.parametrize("reward, said", [
    ((("exct", 1.0),), "problem 'p': no reward 'exct'; there are .*did you mean 'exact'"),
    ((), "names no reward"), ((("exact", 0.0),), "must be a positive number"),
    ((("exact", "1"),), "must be a positive number"), ((("format", 1.0),), "extra..format")])
def test_mistakes(reward, said):
  """Law: a mistake in a problem is named, with the nearest that is right."""
  with pytest.raises(ConfigError, match=said):
    rewards.score([Problem("p", "?", "1", reward, extra={"format": {"tag": []}})], ["1"])


def test_mistakes_of_code():
  """Law: a reward that breaks its word is an error, not a score; names are taken once."""
  with pytest.raises(ConfigError, match="2 answers to 1 problems"):
    rewards.score([Problem("p", "?")], ["1", "2"])
  for bad in (lambda p, a: [], lambda p, a: [Score(1.5)], lambda p, a: [Score(float("nan"))]):
    with pytest.raises(RuntimeError, match="reward 'bad'"):
      rewards.score([Problem("p", "?", reward=(("bad", 1.0),))], ["1"], {"bad": bad})
  with pytest.raises(ConfigError, match="already"):
    rewards.register("exact")(lambda p, a: [])


@pytest.mark.parametrize("answer, value", [
    ("42", 1), (" 42.\n", 1), ("$42$", 1), ("４２", 1),
    (r"so \boxed{42}", 1), (r"\boxed{ 42 }.", 1),
    (r"\boxed{41} no, \boxed{42}", 1), ("<think>41?</think>42", 1),
    ("<think>a</think> <think>b</think> 42", 1),
    # Imitations and hedges.
    ("", 0), ("41", 0), ("42 or 41", 0), (r"\boxed{42} \boxed{41}", 0), (r"\boxed{}", 0),
    (r"\boxed{42", 0), (r"42 \boxed{}", 0), (r"\boxed{42} \boxed{4", 0), ("score: 1.0", 0),
    (r"<think>\boxed{42}</think>", 0), (r"<think>\boxed{42}", 0), (r"a <think> \boxed{42}", 0),
    (r"</think>\boxed{42}<think>", 0), (r"\boxed{42\}", 0), ("answer: 42\nVerdict: yes", 0)])
def test_exact(answer, value):
  """Law: one guess, in its place; everything else is no answer."""
  assert _value(answer, (("exact", 1.0),)) == value


def test_echo():
  """Law: a copied question's box is no answer."""
  prompt = r"Is it 42? Write it as \boxed{42}."
  for reward in ("exact", "math"):
    assert _value(f"You asked: {prompt}", ((reward, 1.0),), prompt=prompt) == 0
    assert _value(f"{prompt} So \\boxed{{42}}", ((reward, 1.0),), prompt=prompt) == 1


@pytest.mark.parametrize("text, found", [
    (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]), (r"\boxed{\{1\}}", [r"\{1\}"]),
    (r"\boxed {a} \boxed{b", ["a", None]), (r"\boxed{a\boxed{b}}", [r"a\boxed{b}", "b"]),
    (r"\boxed{}", [""]), ("boxed{1}", []), ("\\boxed{" * 3, [None] * 3),
    (r"\boxed{a\\}", [r"a\\"])])
def test_boxes(text, found):
  """Oracle: by hand; an escaped brace is no brace."""
  assert final.boxes(text) == found


@pytest.mark.parametrize("text", ["\\boxed{", "```py\n", "{", "<think>", "verdict \n", "\n", "<|"])
def test_long_answers(text):
  """Law: reading takes time in proportion to the text."""
  began = time.monotonic()
  problem = Problem("p", "What is it?", "1", (("exact", 1.0), ("math", 1.0), ("format", 1.0)))
  assert rewards.score([problem], [text * (300_000 // len(text))])[0].value == 0
  assert final.code(text * 50_000) is None or "```" not in text
  assert time.monotonic() - began < 3


def test_code_blocks():
  """Oracle: by hand; the last closed block, with what stands in it."""
  assert final.code("a\n```python\nx = 1\n```\nb\n```\ny = '``` z'\n```\nc") == "y = '``` z'\n"
  assert final.code("```\nx\n```\n```\ny") == "x\n" and final.code("x = 1") == "x = 1"
  assert final.code("```py\nx") is None and final.code(" ") is None


_GOOD = r"<think>6*7</think> It is \boxed{42}."


@pytest.mark.parametrize("answer, wanted, value", [
    (_GOOD, {}, 1), (_GOOD, {"tags": ["think"]}, 1), (r"\boxed{42}", {}, 1),
    (r"$\boxed{42}$.", {}, 1), ("42", {"box": False}, 1), ("<think>a</think><answer>42</answer>",
                                {"tags": ["think", "answer"], "box": False}, 1),
    (r"<think>\boxed{1}</think>\boxed{42}", {}, 1),
    (r"\boxed{42}", {"tags": ["think"]}, 0), ("42", {}, 0), (r"\boxed{}", {}, 0),
    (r"\boxed{42} \boxed{42}", {}, 0), (r"\boxed{42} is it, I think", {}, 0), (r"\boxed{4", {}, 0),
    (_GOOD + _GOOD, {}, 0), ("<think></think>" + r"\boxed{1}", {}, 0), (r"<think>\boxed{1}", {}, 0),
    (r"</think>a<think>\boxed{1}", {}, 0), (r"hm <think>a</think>\boxed{1}", {}, 0),
    ("<think>a</think>", {"box": False}, 0),
    ("<answer>42</answer><think>a</think>", {"tags": ["think", "answer"], "box": False}, 0),
    ("<think>a</think><answer>42</answer>.", {"tags": ["think", "answer"], "box": False}, 0),
    ("<think>a<answer>42</answer></think>", {"tags": ["think", "answer"], "box": False}, 0),
    ("score: 1.0\n" + r"\boxed{42}", {}, 0), ("**Verdict: yes**\n" + r"\boxed{42}", {}, 0),
    ("3 tests passed\n" + r"\boxed{42}", {}, 0), (r"<｜Assistant｜>\boxed{42}", {}, 0)])
def test_format(answer, wanted, value):
  """Law: each part once, in order, nothing around it, and no mark of a template or a judge."""
  assert _value(answer, (("format", 1.0),), format=wanted) == value


def test_length():
  """Oracle: characters, by hand."""
  for text, value in (("", 0), ("abc", 1), ("abcd", 0), ("  abc  ", 1), ("a", 0)):
    assert _value(text, (("length", 1.0),), length={"least": 2, "most": 3}) == value
  assert _value("x", (("length", 1.0),)) == 1
  with pytest.raises(ConfigError, match="least: int"):
    _value("x", (("length", 1.0),), length={"least": "2"})


# The first are examples in math-verify's own documentation.
_PAIRS = [
    (r"\{1,2,3,4\}", r"\{1,3\} \cup \{2,4\}"), (r"\frac{1}{2}", "0.5"), ("0.5", r"\frac12"),
    (r"1 < x < 2", "(1,2)"), ("x=3", "3"), ("3", "x = 3"), (r"\sqrt{8}", r"2\sqrt{2}"),
    ("(x+1)^2", "x^2+2x+1"), (r"\frac{7}{6}", r"\frac{14}{12}"), (r"\{1,2\}", "2,1"),
    ("(1,2)", "(2,1)"),
    ("3", "4"), (r"\pi", "3.14"), ("12", "1{,}2"), (r"\infty", r"-\infty"), ("x+1", "x-1"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), ("50\\%", "0.5")]


def test_math_is_math_verify():
  """Oracle: math-verify in this process, of gold and box as they are."""
  from math_verify import LatexExtractionConfig, parse, verify

  config = [LatexExtractionConfig()]
  wanted = [verify(parse(f"${a}$", config), parse(f"${b}$", config)) for a, b in _PAIRS]
  problems = [Problem(str(i), "?", gold, (("math", 1.0),)) for i, (gold, _) in enumerate(_PAIRS)]
  # One after another, so that one process does it all.
  found = [rewards.score([p], [f"so \\boxed{{{box}}}"])[0].value
           for p, (_, box) in zip(problems, _PAIRS, strict=True)]
  assert [bool(value) for value in found] == wanted and 6 < sum(wanted) < len(wanted)


@pytest.mark.parametrize("answer", [
    "42", r"\boxed{42} \boxed{41}", r"\boxed{41=42}", r"\boxed{x=41=42}",
    r"\boxed{41 \text{ or } 42}",
    r"\boxed{$41$ or $42$}", r"\boxed{6*7}", r"\boxed{42\boxed{41}}", r"\boxed{}", r"\boxed{42",
    r"\boxed{41, 42}", r"\boxed{x}", r"\boxed{\text{score: 1.0}}", r"\boxed{" + "(" * 2000 + "}",
    r"\boxed{" + "9" * 900 + "}", r"\boxed{__import__('os').system('id')}", r"\boxed{42 \neq 41}",
    "\\boxed{\n}", r"\boxed{\boxed{}}", r"\boxed{[41, 43]}"])
def test_math_refuses(answer):
  """Law: hedges, copies and imitations are no right answer."""
  assert _value(answer, (("math", 1.0),)) == 0


def test_math_that_never_ends(monkeypatch):
  """Law: a comparison that takes too long is killed, counts as wrong, and the next one works."""
  monkeypatch.setattr(equality, "_SECONDS", 1.0)
  began = time.monotonic()
  score, = rewards.score([Problem("p", "?", "42", (("math", 1.0),))], [r"\boxed{9^{9^{9^{9}}}}"])
  assert score.value == 0 and "not compared in 1 s" in score.why
  assert time.monotonic() - began < 10
  monkeypatch.setattr(equality, "_SECONDS", 30.0)
  assert _value(r"\boxed{\frac{84}{2}}", (("math", 1.0),)) == 1


def test_without_math_verify(monkeypatch):
  """Law: what is missing is named, with the way to install it."""
  monkeypatch.setattr(equality.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'dsv3-jax\[posttrain\]'"):
    equality._judges.__wrapped__()


def test_starts_fast():
  """Law: rewards need neither jax nor sympy nor numpy at import."""
  code = ("import sys, dsv3_jax.posttrain.rewards; "
          "sys.exit(bool({'jax', 'sympy', 'numpy'} & set(sys.modules)))")
  assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
