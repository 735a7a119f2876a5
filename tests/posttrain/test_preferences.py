"""Preferences: records, pairs made from problems and answers, and what a judge learns of them."""

import json

import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.posttrain import preferences, rewards, tasks
from dsv3_jax.posttrain.preferences import Preference
from dsv3_jax.posttrain.problems import Problem, Score
from dsv3_jax.posttrain.rewards import models

ASKED = [{"role": "user", "content": "2+2?"}]
WITH = {"chosen_thought": "It says 4.", "rejected_thought": "It says 5."}


def written(path, *records):
  path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
  return path


def test_records(tmp_path):
  """Oracle: the records by hand, and what is written is read."""
  path = written(
      tmp_path / "a.jsonl",
      {"prompt": "2+2?", "chosen": "4", "rejected": "5", "id": 7}, "",
      {"prompt": "2+2?", "system": "Be brief.", "chosen": "4", "rejected": "", **WITH},
      {"messages": [*ASKED, {"role": "assistant", "content": "5"},
                    {"role": "user", "content": "Sure?"}],
       "chosen": "No, 4", "rejected": "Yes", "reference": "4"})
  found = preferences.read(path)
  system = {"role": "system", "content": "Be brief."}
  assert found[:2] == [Preference(ASKED, "4", "5"),
                       Preference([system, *ASKED], "4", "", "It says 4.", "It says 5.")]
  assert found[2].reference == "4" and found[2].problem.prompt == (
      "User: 2+2?\n\nAssistant: 5\n\nUser: Sure?")
  assert found[1].problem.prompt == "2+2?" and found[1].problem.system == "Be brief."
  assert preferences.read(preferences.write(tmp_path / "b.jsonl.gz", found)) == found


@pytest.mark.parametrize("record, said", [
    ({"prompt": "a", "chosen": "b"}, "needs messages or prompt, chosen and rejected; it has "),
    ({"prompt": "a", "chosen": "b", "rejectd": "c"}, "rejectd"),
    ({"messages": ASKED, "prompt": "a", "chosen": "b", "rejected": "c"}, "prompt"),
    ({"messages": [], "chosen": "b", "rejected": "c"}, "at least the user's turn"),
    ({"messages": "a", "chosen": "b", "rejected": "c"}, "at least the user's turn"),
    ({"messages": [*ASKED, {"role": "assistant", "content": "4"}], "chosen": "b",
      "rejected": "c"}, "messages.1..role='assistant': the last turn must be the user's"),
    ({"messages": [*ASKED, *ASKED], "chosen": "b", "rejected": "c"}, "messages.1..role='user'"),
    ({"prompt": "a", "chosen": " ", "rejected": "c"}, "chosen is empty"),
    ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "chosen is list, not text"),
    ({"prompt": "a", "chosen": "b", "rejected": "b "}, "chosen and rejected are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "chosen_thought": "d"},
     "rejected_thought: a thought is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", **WITH,
      "rejected_thought": "So\nVerdict: no"}, "rejected_thought: .* of its own .* 'verdict'"),
    ("[1]", "a record is an object")])
def test_errors(tmp_path, record, said):
  """Oracle: the messages, with file and line."""
  path = written(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"}, record)
  with pytest.raises(ConfigError, match=f"a.jsonl:2: .*{said}"):
    preferences.read(path)


@pytest.mark.parametrize("family", tasks.families())
def test_corrupted_solutions(family):
  """Oracle: rule rewards; the same again, and another seed's are others."""
  problems = tasks.make(family, 0, 30, 1)
  found = preferences.from_problems(problems, 0)
  assert len(found) > 25 and found == preferences.from_problems(problems, 0)
  assert found != preferences.from_problems(problems, 1)
  of = {p.prompt: p for p in problems}
  here = [of[f.messages[-1]["content"]] for f in found]
  assert all(s.value == 1 for s in rewards.score(here, [f.chosen for f in found]))
  assert all(s.value < 0.5 for s in rewards.score(here, [f.rejected for f in found]))
  assert sum(f.rejected.partition("\\boxed")[0] != f.chosen.partition("\\boxed")[0]
             for f in found) in range(5, 27)


def test_answers_of_a_policy():
  """Oracle: by hand: right ones against wrong ones, each once; what is neither has no part."""
  problem = Problem("p", "1+1?", "2", worked="1+1=2\n\\boxed{2}")
  of = ["\\boxed{3}", "a\\boxed{2}", "\\boxed{3}", "\\boxed{2}", "none", "half", "b\\boxed{2}"]
  scores = [Score(v) for v in (0, 1, 0, 1, 0, 0.7, 1)]
  found = preferences.from_answers([problem, problem], [of, of[:1]], True, [scores, scores[:1]])
  assert [(f.chosen, f.rejected) for f in found] == [("a\\boxed{2}", "\\boxed{3}"),
                                                     ("\\boxed{2}", "none")]
  assert found[1].rejected_thought == "1+1=2\nIt should be 2. It says nothing."
  assert preferences.from_answers([problem], [["\\boxed{2}", "\\boxed{4}"]])[0].chosen_thought == (
      "It should be 2. It says 2.")


def test_held_out():
  """Law: by the question alone: its pairs are on one side, whatever else there is."""
  made = [Preference([{"role": "user", "content": str(i % 300)}], "a", f"b{i}")
          for i in range(600)]
  kept, held = preferences.split(made, 0.2)
  assert 30 < len(held) // 2 < 90 and len(kept) + len(held) == 600
  assert not {p.messages[0]["content"] for p in kept} & {p.messages[0]["content"] for p in held}
  assert preferences.split(made[:50], 0.2)[1] == [p for p in held if p in made[:50]]


def test_judgements():
  """Law: what a judge is asked in use, answered in the form that is read; open questions are asked
  as votes are."""
  problem = Problem("", "2+2?", "4")
  given = Preference(ASKED, "4", "5", *WITH.values(), "4")
  yes, no = preferences.judgements([given])
  assert yes[0]["content"] == models.asked(problem, "4") != no[0]["content"]
  assert "Reference:" in yes[0]["content"] and yes[1]["content"] == "It says 4.\nVerdict: yes"
  assert no[1]["content"] == "It says 5.\nVerdict: no"
  opened, _ = preferences.judgements([Preference(ASKED, "4", "5", *WITH.values())])
  assert "good answer" in opened[0]["content"] and "Reference:" not in opened[0]["content"]
  with pytest.raises(ConfigError, match="preference 0 has no thoughts"):
    preferences.judgements([Preference(ASKED, "4", "5")])
  assert preferences.answered(given, False, True) == [
      *ASKED, {"role": "assistant", "content": "5"},
      {"role": "user", "content": preferences.ASK}, no[1]]
