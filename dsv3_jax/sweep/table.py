"""Tables of runs for the terminal: live, as plain lines, and the last one."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from dsv3_jax.sweep.estimate import duration
from dsv3_jax.sweep.progress import OVER, RUNNING, Progress

_BLOCKS = "▁▂▃▄▅▆▇█"
COLORS = {"done": "green", "failed": "bold red", "running": "cyan", "starting": "cyan",
           "interrupted": "yellow", "stopped": "yellow", "queued": "blue", "waiting": "dim"}


def number(value: float | None, form: str = ",.4f") -> str:
  return "-" if value is None else format(value, form)


def sparkline(points: Sequence[tuple[int, float]], width: int = 16) -> str:
  """A curve as blocks, `width` at most, over equal ranges of steps; higher is more."""
  points = [(s, v) for s, v in points if v == v and abs(v) != float("inf")]
  if not points:
    return ""
  first, last = points[0][0], points[-1][0]
  bins: dict[int, list[float]] = {}
  for step, value in points:
    place = (step - first) * width // max(last - first, 1)
    bins.setdefault(min(place, width - 1), []).append(value)
  means = [sum(bins[i]) / len(bins[i]) for i in sorted(bins)]
  low, high = min(means), max(means)
  scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
  return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def steps(p: Progress) -> str:
  return f"{p.step:,}/{p.total:,}" if p.total else f"{p.step:,}" if p.step else "-"


def arms(rows: Sequence[tuple[str, int, Progress, str]], title: str = "", caption: str = "",
         room: int = 0) -> Any:
  """A rich table of a sweep's arms.

  Args:
    rows: (name, seed, progress, note) of each.
    title, caption: above and below.
    room: rows to show at most, those that matter most; 0 for all.
  """
  from rich.table import Table
  from rich.text import Text

  table = Table(title=Text(title) if title else None, caption=Text(caption) if caption else None,
                title_justify="left", caption_justify="left")
  for name in ("arm", "seed", "state", "step", "loss", "validation", "tokens/s", "time", "ETA",
               "note"):
    table.add_column(name, justify="left" if name in ("arm", "state", "note") else "right",
                     overflow="fold", no_wrap=name not in ("arm", "note"))
  shown = fitting(rows, room)
  for name, seed, p, note in shown:
    table.add_row(Text(name), str(seed), Text(p.state, style=COLORS.get(p.state, "")), steps(p),
                  number(p.loss), number(p.validation), number(p.tokens_per_s, ",.0f"),
                  duration(p.arm.get("seconds", p.seconds) if p.state in OVER else p.seconds),
                  duration(p.eta_s) if p.state in RUNNING else "-", Text(note))
  if len(shown) < len(rows):
    table.add_row(f"{len(rows) - len(shown)} more", *[""] * 9)
  return table


def fitting(rows: Sequence[Any], room: int) -> list[Any]:
  """Rows in their order; where they do not fit: what runs, what failed, what comes next, the last
  that are done."""
  if not room or len(rows) <= room:
    return list(rows)
  rank = {"running": 0, "starting": 0, "failed": 1, "interrupted": 2, "queued": 2, "waiting": 3}
  order = sorted(range(len(rows)), key=lambda i: (
      rank.get(rows[i][2].state, 4), i if rows[i][2].state not in OVER else -i))
  return [rows[i] for i in sorted(order[:max(room - 1, 1)])]


def counts(progress: Sequence[Progress]) -> str:
  """"12 done, 1 running, 3 waiting"."""
  order = ("done", "running", "starting", "queued", "interrupted", "stopped", "waiting", "failed")
  found = [(state, sum(p.state == state for p in progress)) for state in order]
  return ", ".join(f"{n} {state}" for state, n in found if n) or "nothing"


class Lines:
  """Shows a sweep as lines: changes of state at once, running arms every half minute."""

  def __init__(self, every_s: float = 30.0, stream: Any = None):
    self._every_s, self._stream = every_s, stream or sys.stdout
    self._states: dict[tuple[str, int], str] = {}
    self._last = 0.0

  def note(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def show(self, rows: Sequence[tuple[str, int, Progress, str]], summary: str) -> None:
    due = time.monotonic() - self._last >= self._every_s
    for name, seed, p, note in rows:
      before = self._states.get((name, seed))
      changed = p.state != before and (before is not None or p.state not in ("waiting", *OVER))
      if changed or (due and p.state == "running"):
        self.note(_line(name, seed, p, note))
      self._states[name, seed] = p.state
    if due:
      self._last = time.monotonic()
      self.note(summary)

  def close(self) -> None:
    pass


def _line(name: str, seed: int, p: Progress, note: str) -> str:
  parts = [f"{name}, seed {seed}: {p.state}"]
  if p.step:
    parts.append(f"step {steps(p)}  loss {number(p.loss)}")
  if p.state == "running" and p.tokens_per_s:
    parts.append(f"{p.tokens_per_s:,.0f} tok/s  ETA {duration(p.eta_s)}")
  return "  ".join([*parts, note]).rstrip()


class Live:
  """Shows a sweep as a table that stays in its place."""

  def __init__(self):
    from rich.console import Console
    from rich.live import Live as RichLive

    self.console = Console()
    self._live = RichLive(console=self.console, auto_refresh=False, transient=True)
    self._live.start()

  def note(self, text: str) -> None:
    self.console.print(text, markup=False, highlight=False)

  def show(self, rows: Sequence[tuple[str, int, Progress, str]], summary: str) -> None:
    room = max(self.console.height - 7, 3)
    self._live.update(arms(rows, caption=summary, room=room), refresh=True)

  def close(self) -> None:
    self._live.stop()


def terminal() -> Lines | Live:
  """A live table on a terminal, lines elsewhere."""
  return Live() if sys.stdout.isatty() else Lines()


def render(table: Any, width: int | None = None, color: bool | None = None) -> str:
  """A rich table as text: as wide as the terminal, or wide enough where there is none."""
  from rich.console import Console

  to_terminal = sys.stdout.isatty() if color is None else color
  console = Console(width=width or (None if sys.stdout.isatty() else 160),
                    force_terminal=to_terminal, no_color=not to_terminal)
  with console.capture() as capture:
    console.print(table)
  return capture.get().rstrip("\n")
