"""Rewards: how an answer is judged (report 5.2). All have one signature, `problems.Reward`.

    scores = rewards.score(problems, answers)  # by each problem's named rewards and weights

| name | judges | of the problem |
|---|---|---|
| `exact` | the last box, or the whole answer: the same text | `answer` |
| `math` | the last box: the same mathematics, by math-verify | `answer` |
| `format` | one box at the end; required tags once each, in order | `extra["format"]` |
| `length` | neither too short nor too long | `extra["length"]` |
| `code` | the last block of code, by tests in a sandbox | `extra["tests"]`, `["entry_point"]` |

`judge` and `vote` ask a model; they are made by a factory from a generator and handed to `score`:
`rewards.score(problems, answers, {"judge": rewards.judge(generator, tokenizer)})`. Those and
`preference`, a trained score, are made of a workdir by `reward_model.load`.

Only the answer's final part counts, after its thoughts. Rules are used wherever they can be, as
they leave less to be fooled; the attacks that they were written against are in the tests. At import
this needs neither jax nor sympy.
"""

from dsv3_jax.posttrain.rewards import equality, programs, texts  # noqa: F401  (they register)
from dsv3_jax.posttrain.rewards.models import judge, vote
from dsv3_jax.posttrain.rewards.registry import check, get, names, register, score

__all__ = ["check", "get", "judge", "names", "register", "score", "vote"]
