"""Table 2 of the report, and GPipe beside it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Row:
  """Attributes:
    bubble: time that each rank idles, in the unit of the durations.
    parameters: copies of the model that the pipeline's ranks hold together. (The authors count
      dualpipe_v as 2, against a pipeline of PP ranks, it having half as many.)
    activations: most units that a rank has alive, a unit being one stage's activations.
  """

  bubble: float
  parameters: int
  activations: int


def row(name: str, ranks: int, microbatches: int, forward: float = 1.0,
        backward_input: float = 1.0, backward_weight: float = 1.0,
        overlapped: float | None = None) -> Row:
  """A schedule's row, durations and activations being those of one stage.

  PP, the number of stages, is `ranks`, and for dualpipe_v, which folds them, 2 * ranks.
  The bubbles hold where nothing is lost to sending; how far else, tests/parallel/test_schedules.py
  shows.

  Raises:
    ValueError: no such schedule.
  """
  backward = backward_input + backward_weight
  if overlapped is None:
    overlapped = forward + backward
  dual = overlapped + backward - 3 * backward_weight
  rows = {
      "gpipe": Row((ranks - 1) * (forward + backward), 1, microbatches),
      "1f1b": Row((ranks - 1) * (forward + backward), 1, min(ranks, microbatches)),
      "zb1p": Row((ranks - 1) * (forward + backward - 2 * backward_weight), 1,
                  min(ranks, microbatches)),
      "dualpipe": Row((ranks / 2 - 1) * dual, 2, ranks + 1),
      "dualpipe_v": Row((ranks - 1) * dual, 1, 2 * ranks + 1)}
  if name not in rows:
    raise ValueError(f"no bubble formula for {name!r}; there is one for {', '.join(rows)}")
  return rows[name]
