"""What post-training asks a model: a problem, how its answer is judged, and the judgement."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Problem:
  """One question with a way to judge answers.

  Attributes:
    id: names it; the same in every process and run.
    prompt: of the user.
    answer: the right one, in the form that `reward` compares with; "" where code decides.
    reward: names of registered rewards with their weights, e.g. (("math", 1.0), ("format", 0.1)).
    system: prompt of the system, or "".
    worked: a worked solution that ends in the answer, to imitate; "" where there is none.
    worked_long: one that also reflects and verifies; "" where there is none.
    family, level: of a generated problem: which kind and how hard, from 0 on.
    extra: for the reward, such as unit tests; plain JSON values.
  """

  id: str
  prompt: str
  answer: str = ""
  reward: tuple[tuple[str, float], ...] = (("exact", 1.0),)
  system: str = ""
  worked: str = ""
  worked_long: str = ""
  family: str = ""
  level: int = 0
  extra: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

  @property
  def messages(self) -> list[dict[str, str]]:
    """As a conversation up to the user's turn."""
    system = [{"role": "system", "content": self.system}] if self.system else []
    return [*system, {"role": "user", "content": self.prompt}]


@dataclasses.dataclass(frozen=True)
class Score:
  """What a reward says.

  Attributes:
    value: from 0 to 1.
    why: in words, for transcripts; "" where the value says all.
  """

  value: float
  why: str = ""


# Of several answers at once, so that a model can judge in batches and programs run side by side.
Reward = Callable[[Sequence[Problem], Sequence[str]], list[Score]]
