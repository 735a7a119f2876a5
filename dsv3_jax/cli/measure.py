"""The parts of `dsv3 eval` that take any text, tasks and needles."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3_jax import files, trained
from dsv3_jax.config import ConfigError

LENGTHS = (0.25, 0.5, 1.0)  # of haystacks, times the trained context
DEPTHS = (0, 25, 50, 75, 100)
NEEDLES = 4  # in a cell
RESULTS, PICTURE = "results.json", "needle.png"
BYTES_PER_TOKEN = 8  # text that is read for a token of haystack


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The options of these parts."""
  what = parser.add_argument_group("any text, tasks, needles (SOURCE: a workdir, or a Hugging Face "
                                   "folder; may be combined)")
  what.add_argument("--text", action="append", default=[], metavar="PATH",
                    help="bits per byte of a file, folder or glob of text, .jsonl or .parquet (may "
                         "be repeated)")
  what.add_argument("--tasks", action="append", default=[], metavar="FILE.jsonl",
                    help="multiple choice and texts to be written, one record a line (may be "
                         "repeated); see experiments/tasks")
  what.add_argument("--needle", action="store_true",
                    help="a value told once in a long text and asked for at its end")
  what.add_argument("--json", action="store_true", help="print one line of JSON, no tables")
  what.add_argument("--window", type=int, metavar="N",
                    help="tokens that the model sees at once, in text and tasks (default: what it "
                         "was trained to see)")
  what.add_argument("--stride", type=int, metavar="N",
                    help="of --text: tokens that each window after a document's first predicts "
                         "(default: half the window)")
  what.add_argument("--rows", type=int, metavar="N", help="sequences at once (default: 8)")
  what.add_argument("--dtype", choices=("float32", "bfloat16"),
                    help="of weights and computation (default: float32)")
  what.add_argument("--cache", choices=("float32", "bfloat16", "fp8"),
                    help="of the latent cache in writing (default: --dtype)")
  what.add_argument("--weights", choices=trained.WEIGHTS,
                    help="fp8: linear layers in FP8, quantized if they are not yet; plain: in "
                         "--dtype; auto: as the files have them, but plain where the device has no "
                         "FP8 matmuls (default: auto)")
  write = parser.add_argument_group("--tasks: texts to be written")
  write.add_argument("--samples", type=int, metavar="N", help="of each record (default: 1)")
  write.add_argument("--temperature", type=float, metavar="T",
                     help="of samples; 0 takes the likeliest token (default: 0)")
  write.add_argument("--top-p", type=float, metavar="P", help="of samples (default: 1)")
  write.add_argument("--pass-at", metavar="K,...", help="pass@K (default: 1 and --samples)")
  write.add_argument("--seed", type=int, metavar="N", help="of samples and needles (default: 0)")
  needle = parser.add_argument_group("--needle")
  needle.add_argument("--lengths", metavar="N,...",
                      help="tokens of question and text (default: 1/4, 1/2 and all of what the "
                           "model was trained to see)")
  needle.add_argument("--depths", metavar="P,...",
                      help=f"percent of the text before the needle (default: "
                           f"{','.join(map(str, DEPTHS))})")
  needle.add_argument("--needles", type=int, metavar="N",
                      help=f"for each length and depth (default: {NEEDLES})")
  needle.add_argument("--filler", metavar="PATH",
                      help="text to hide it in, as for --text, or stdlib (default: plain "
                           "sentences)")
  needle.add_argument("--template", metavar="TEXT",
                      help="the needle, with {key} and {value}; asked for is what follows the text "
                           "before {value} (default: 'The magic number of {key} is {value}.')")
  needle.add_argument("--digits", type=int, metavar="N", help="of the value (default: 5)")
  needle.add_argument("--values", metavar="WORD,...",
                      help="words of which the value is one, in place of a number")
  needle.add_argument("--keys", metavar="WORD,...",
                      help="words of which the key is one, in place of one that is made up")


_OF_ALL = ("json", "rows", "dtype", "cache", "weights")
_OWN = {"text": ("stride", "window"), "needle": ("lengths", "depths", "needles", "filler",
                                                 "template", "digits", "values",
                                                 "keys", "seed"),
        "tasks": ("samples", "temperature", "top_p", "pass_at", "seed", "window")}


def asked(args: argparse.Namespace) -> list[str]:
  """Which of text, tasks and needle are wanted.

  Raises:
    ConfigError: an option of a part that is not wanted.
  """
  wanted = [name for name in ("text", "tasks", "needle") if getattr(args, name)]
  allowed = {o for name in wanted for o in _OWN[name]} | set(_OF_ALL if wanted else ("json",))
  for option in dict.fromkeys([*_OF_ALL, *(o for own in _OWN.values() for o in own)]):
    if option not in allowed and getattr(args, option) is not None:
      homes = [name for name, own in _OWN.items() if option in own] or list(_OWN)
      raise ConfigError(f"--{option.replace('_', '-')} goes with "
                        f"{' or '.join(f'--{name}' for name in homes)}")
  return wanted


def run(args: argparse.Namespace, wanted: list[str]) -> int:
  """Measures and shows.

  Raises:
    ConfigError: one source is needed; unusable records, texts or settings.
  """
  if len(args.workdir) != 1:
    raise ConfigError(f"{', '.join(f'--{name}' for name in wanted)}: one model at a time; "
                      f"{len(args.workdir)} were named")
  for name in ("batches", "layers"):
    if getattr(args, name) is not None:
      raise ConfigError(f"--{name} does not go with --{wanted[0]}")
  source = args.workdir[0]
  is_run = trained.check(source, args.step, args.ema)
  plan = _plan(args, wanted)
  results: dict[str, Any] = {"source": source, "step": args.step, "ema": args.ema,
                             "dtype": args.dtype or "float32", "weights": args.weights or "auto"}
  if is_run:
    from dsv3_jax.train import checkpoint
    results["step"] = checkpoint.load_meta(source, args.step)["step"]
  model = trained.load(source, args.step, args.ema, args.dtype or "float32", args.cache or "",
                       args.weights or "auto", trained.to_stderr)
  results["context"] = model.context
  samples = {}
  with _progress() as bar:
    for name in wanted:
      results[name], samples[name] = plan[name](model, bar)
  _show(results, samples, args)
  return 0


def _plan(args: argparse.Namespace, wanted: list[str]) -> dict[str, Callable[..., Any]]:
  """For each part a function of the model and `_progress`'s; all input is read and checked now."""
  if args.rows is not None and args.rows < 1:
    raise ConfigError(f"--rows={args.rows} must be at least 1")
  makers = {"text": _plan_text, "tasks": _plan_tasks, "needle": _plan_needle}
  return {name: makers[name](args, args.rows or 8) for name in wanted}


# --- the parts ------------------------------------------------------------------------------------


def _plan_text(args: argparse.Namespace, rows: int) -> Callable[..., Any]:
  tokens = args.tokens or 0
  if tokens < 0:
    raise ConfigError(f"--tokens={args.tokens} must not be negative; 0 takes all")
  for name in ("window", "stride"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      raise ConfigError(f"--{name}={getattr(args, name)} must be at least 1")
  texts = [(path, _read("text", path, tokens)) for path in args.text]

  def measure(model, bar):
    from dsv3_jax.evals import text

    found = [{"name": path, **text.measure(
        model.generator, model.tokenizer, documents, args.window or model.context,
        args.stride or 0, tokens, rows, bar(path))} for path, documents in texts]
    return [{k: v for k, v in f.items() if k != "documents"} for f in found], found

  return measure


def _read(option: str, path: str, tokens: int) -> list[Any]:
  from dsv3_jax.data import domains

  try:
    return domains.read(path, tokens * BYTES_PER_TOKEN)
  except ConfigError as error:
    raise ConfigError(f"--{option}={path}: {error}") from None


def _plan_tasks(args: argparse.Namespace, rows: int) -> Callable[..., Any]:
  from dsv3_jax.evals import tasks

  if args.window is not None and args.window < 2:
    raise ConfigError(f"--window={args.window} must be at least 2")
  records = [record for path in args.tasks for record in tasks.read(path)]
  ks = _numbers("pass-at", args.pass_at, int) if args.pass_at else ()

  from dsv3_jax.evals import choice, generation, report  # jax starts here
  from dsv3_jax.infer.sampler import Sampling

  samples = 1 if args.samples is None else args.samples
  sampling = Sampling(temperature=args.temperature or 0.0, seed=args.seed or 0,
                      top_p=1.0 if args.top_p is None else args.top_p)
  generation.check(samples, sampling.temperature, ks)

  def measure(model, bar):
    window, found = args.window or model.context, []
    for kind, words, call, options in (
        (tasks.Choice, "choices", choice.measure, {}),
        (tasks.Generation, "answers", generation.measure,
         {"samples": samples, "sampling": sampling, "ks": ks})):
      own = [record for record in records if isinstance(record, kind)]
      if own:
        found += call(model.generator, model.tokenizer, own, window, rows=rows, say=bar(words),
                      **options)
    order = {record.name: i for i, record in enumerate(records)}
    found.sort(key=lambda one: order[one["name"]])
    return report.by_task(found), found

  return measure


def _plan_needle(args: argparse.Namespace, rows: int) -> Callable[..., Any]:
  lengths = _numbers("lengths", args.lengths, int) if args.lengths else ()
  depths = [p / 100 for p in _numbers("depths", args.depths, float)] if args.depths else [
      p / 100 for p in DEPTHS]
  number = NEEDLES if args.needles is None else args.needles
  if number < 1:
    raise ConfigError(f"--needles={number} must be at least 1")

  from dsv3_jax.evals import needle  # jax starts here

  template = needle.TEMPLATE if args.template is None else args.template
  digits = needle.DIGITS if args.digits is None else args.digits
  values = [] if args.values is None else args.values.split(",")
  if values and args.digits is not None:
    raise ConfigError("--digits and --values: a value is a number or a word; give one of the two")
  keys = [] if args.keys is None else args.keys.split(",")
  needle.check(template, depths, digits, values, keys)
  seed = args.seed or 0
  if not 0 <= seed < 2**32:
    raise ConfigError(f"--seed={seed} must lie between 0 and 2^32 - 1")
  texts = []
  if args.filler:
    enough = 16 * max(lengths, default=4096)  # for stretches that differ
    texts = [document.text for document in _read("filler", args.filler, enough)]

  def measure(model, bar):
    filler = needle.Filler(model.tokenizer, texts)
    sizes = lengths or [max(1, round(model.context * share)) for share in LENGTHS]
    stacks = [h for length in sizes for n in range(number)
              for h in needle.make(filler, length, depths, n, seed, template, digits, values,
                                   keys)]
    found = needle.measure(model.generator, model.tokenizer, stacks, rows, bar("needles"))
    return {**needle.summary(found), "template": template, "seed": seed,
            "digits": 0 if values else digits, "values": values, "keys": keys,
            "filler": args.filler or "plain sentences"}, found

  return measure


def _numbers(name: str, text: str, kind: type) -> list[Any]:
  try:
    found = sorted({kind(word) for word in text.split(",") if word})
  except ValueError:
    found = []
  if not found or (name == "lengths" and found[0] < 1):
    raise ConfigError(f"--{name}={text}: give {'whole ' * (kind is int)}numbers, such as "
                      f"{'256,512' if name == 'lengths' else '1,10'}")
  return found


# --- showing --------------------------------------------------------------------------------------


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
  """`bar(words)` gives a function of how many are done, and of all; bars stand on stderr, and
  where that is no terminal, a line for each part that is done."""
  from rich import progress
  from rich.console import Console

  console = Console(stderr=True)
  with progress.Progress(
      progress.TextColumn("{task.description}", markup=False), progress.BarColumn(),
      progress.MofNCompleteColumn(), progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
      console=console, transient=True, disable=not console.is_terminal) as shown:

    def bar(words: str) -> Callable[[int, int], None]:
      task, start = shown.add_task(words, total=None), time.monotonic()

      def say(done: int, every: int) -> None:
        shown.update(task, completed=done, total=every)
        if done == every and not console.is_terminal:
          print(f"{words}: {every:,} done in {time.monotonic() - start:.1f} s", file=sys.stderr,
                flush=True)

      return say

    yield bar


def _show(results: dict[str, Any], samples: dict[str, Any], args: argparse.Namespace) -> None:
  from dsv3_jax.evals import report

  written = []
  if args.out:
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    everything = {**results, "samples": samples}
    written.append(files.write_atomic(out / RESULTS, json.dumps(everything, indent=1,
                                                                ensure_ascii=False) + "\n"))
    if "needle" in results:
      from dsv3_jax.analysis import needle_plot

      figure = needle_plot.draw([("", results["needle"])], results["context"])
      written.append(needle_plot.write(figure, out / PICTURE))
  if args.json:
    print(json.dumps(results))
    return
  from rich import box
  from rich.console import Console
  from rich.markup import escape
  from rich.table import Table

  console = Console(width=None if sys.stdout.isatty() else 120)
  for title, head, rows in report.tables(results):
    console.print(f"[bold]{escape(title)}[/bold]", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(head):
      table.add_column(name, justify="right" if i else "left", overflow="fold")
    for cells in rows:
      table.add_row(*(escape(cell) for cell in cells))
    console.print(table)
  for path in written:
    print(path)
