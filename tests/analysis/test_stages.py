"""The report of several runs in a row."""

import json

from dsv3_jax.analysis import policy_plots, report, stages
from dsv3_jax.posttrain import exam, rollout, tasks

REWARDS = [0.25, 0.5, 0.75]


def stage(folder, kind, texts):
  """A workdir as a stage leaves it, with an exam of four problems."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps({"kind": kind, "train": {"tokens": 30}}))
  rows = [{"kind": "train", "step": i + 1, "tokens": 10 * (i + 1), "loss": 1.0}
          | ({"reward": r, "solved": r, "kl": 0.1, "same_reward": 0.5} if kind == "grpo" else {})
          for i, r in enumerate(REWARDS)]
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  found = exam.summary(tasks.make("add", 0, 4, 1), texts, [3, 4, 5, 6], [True, False, True, True])
  (folder / exam.NAME).write_text(json.dumps(found))
  return folder.name, folder


def test_stages(tmp_path):
  """Oracle: by hand: what each stage solved, its curves, its answers, quoted and marked."""
  problems = tasks.make("add", 0, 4, 1)
  solved = [p.worked for p in problems]
  named = [stage(tmp_path / "1-sft", "sft", ["no <b>idea</b>"] * 3 + [solved[3]]),
           stage(tmp_path / "2-grpo", "grpo", solved)]
  (tmp_path / "2-grpo" / rollout.TRANSCRIPTS).write_text("\n".join(
      json.dumps({"rollout": n, "id": "a", "prompt": f"question {n}", "answer": "7",
                  "outputs": [{"text": "<i>said</i>", "reward": 0.5, "why": ""}]})
      for n in (3, 0, 3)) + '\n{"half')
  html = stages.write(named, tmp_path).read_text()
  text = (tmp_path / stages.NAME).read_text()
  assert "| 1-sft | 25.0 % | 4 | 25 % ± 22 |" in text
  assert "| 2-grpo | 75.0 % | 4 | 75 % ± 22 |" in text  # one was cut off
  assert 'href="2-grpo/report.html"' in html and "2-grpo: the policy" in html
  assert "1-sft: the policy" not in html
  assert "no &lt;b&gt;idea&lt;/b&gt;" in html and "1-sft: wrong" in html
  assert [r["rollout"] for r in policy_plots.transcripts(tmp_path / "2-grpo")] == [0, 3]
  assert html.index("rollout 0: question 0") < html.index("rollout 3: question 3")
  assert html.count("&lt;i&gt;said") == 2
  own = report.write(tmp_path / "2-grpo").read_text()
  assert "What did not teach" in own and "rollout 3, a: reward 0.50" in own
  assert (tmp_path / "2-grpo" / "plots" / "reward.svg").exists()
  assert not (tmp_path / "2-grpo" / "plots" / "length.svg").exists()  # no such numbers
  assert "What did not teach" not in report.write(tmp_path / "1-sft").read_text()
