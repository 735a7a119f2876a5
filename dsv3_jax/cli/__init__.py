"""The `dsv3` command: one file a subcommand.

Each has SUMMARY, DESCRIPTION, EXAMPLES, `add_arguments(parser)` and `run(args) -> exit code`, and
OVERRIDABLE where `--config.key=value` may follow, FREE with the beginnings of other options that
take any key. What a person types becomes a `Config` in configs.py, before jax is imported, so that
a mistake costs no start-up time.

Exit codes: 0 done; 2 bad input and 1 a run that cannot go on, both with a message that says what to
do; 130 or 143 interrupted by SIGINT or SIGTERM (training saves a checkpoint first). Anything
unexpected keeps its traceback (and Python's exit code 1).
"""

import argparse
import difflib
import os
import shlex
import sys
import types
from collections.abc import Iterable, Sequence

from dsv3_jax import __version__
from dsv3_jax.cli import (
    convert,
    cost,
    evaluate,
    generate,
    numerics,
    plan,
    report,
    schedule,
    serve,
    simulate,
    sweep,
    tokenize,
    train,
    watch,
)
from dsv3_jax.cli.configs import OVERRIDE, default_workdir, load_config, pair_overrides, parse_value

__all__ = ["default_workdir", "load_config", "main", "parse_value", "run"]

_COMMANDS = types.MappingProxyType({
    "train": train, "sweep": sweep, "watch": watch, "report": report, "eval": evaluate,
    "generate": generate, "serve": serve, "cost": cost, "plan": plan, "numerics": numerics,
    "schedule": schedule, "simulate": simulate, "tokenize": tokenize, "convert": convert})


def main(argv: Sequence[str] | None = None) -> None:
  """Entry point of the console script; leaves with the exit code."""
  sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
  """Runs one command line and returns its exit code; see the module's docstring for the codes.

  Raises:
    SystemExit: from argparse, for --help (0) and for an unknown command or option (2).
  """
  parser = _parser()
  _refuse_misspelt(parser, argv)
  args, rest = parser.parse_known_args(argv)
  args.options = [word for word in rest if word.startswith(args.free)]
  rest = [word for word in rest if not word.startswith(args.free)]
  if rest and not (args.overridable and rest[0].startswith(OVERRIDE)):
    args.parser.error(f"unknown argument {rest[0]!r}")
  try:
    if args.overridable:
      args.overrides = pair_overrides(rest)
    args.command_line = shlex.join(["dsv3", *argv])
    return args.run(args)
  except KeyboardInterrupt:
    print("dsv3: interrupted", file=sys.stderr)
    return 130
  except BrokenPipeError:  # `dsv3 ... | head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit has a place
    return 141
  except Exception as error:
    if not _is_for_user(error):
      raise
    print(f"dsv3: error: {_message(error)}", file=sys.stderr)
    return 2 if isinstance(error, ValueError | OSError) else 1


def _is_for_user(error: Exception) -> bool:
  """Whether the message says all: an error class of this package, or a file's trouble.

  A plain ValueError is for the user (CONTRIBUTING.md) where this package raised it; one that comes
  from inside jax or numpy is a fault of ours, whose traceback is needed.
  """
  if type(error).__module__.startswith("dsv3_jax."):
    return True
  if isinstance(error, OSError):
    return error.filename is not None
  trace = error.__traceback__
  while trace is not None and trace.tb_next is not None:
    trace = trace.tb_next
  module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
  return isinstance(error, ValueError) and module.startswith("dsv3_jax.")


def _message(error: Exception) -> str:
  return f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
      prog="dsv3", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
      description="DeepSeek-V3 in JAX: train, look at, and convert models.",
      epilog="examples:\n"
             "  dsv3 train --config=experiments/tiny.py --workdir=runs/tiny\n"
             "  dsv3 report runs/tiny\n"
             "  dsv3 convert runs/tiny exported-model\n\n"
             "`dsv3 COMMAND --help` has more.")
  parser.add_argument("--version", action="version", version=f"dsv3 {__version__}")
  commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
  for name, module in _COMMANDS.items():
    command = commands.add_parser(
        name, help=module.SUMMARY, description=module.DESCRIPTION, allow_abbrev=False,
        epilog=f"examples:\n{module.EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    command.set_defaults(run=module.run, parser=command,
                         overridable=getattr(module, "OVERRIDABLE", False),
                         free=getattr(module, "FREE", ()))
    module.add_arguments(command)
  return parser


def _refuse_misspelt(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
  """Names the nearest command or option before argparse complains of what it would have given."""
  commands = next(action.choices for action in parser._actions
                  if isinstance(action, argparse._SubParsersAction))
  if not argv or argv[0].startswith("-"):
    return
  if argv[0] not in commands:
    parser.error(f"unknown command {argv[0]!r}{_nearest(argv[0], commands)} (commands: "
                 f"{', '.join(commands)})")
  parser = commands[argv[0]]
  for word in argv[1:]:
    name = word.partition("=")[0]
    overrides = word.startswith((
        *parser.get_default("free"), *[OVERRIDE] * parser.get_default("overridable")))
    if word.startswith("--") and name not in parser._option_string_actions and not overrides:
      parser.error(f"unknown argument {word!r}{_nearest(name, parser._option_string_actions)}")


def _nearest(word: str, choices: Iterable[str]) -> str:
  near = difflib.get_close_matches(word, choices, n=1)
  return f"; did you mean {near[0]}?" if near else ""
