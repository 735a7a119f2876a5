"""`dsv3 generate`: what a model writes after a prompt."""

import argparse
import dataclasses
import json
import sys
from typing import Any

from dsv3_jax import trained
from dsv3_jax.config import ConfigError

SUMMARY = "text that a trained model writes after a prompt"
DESCRIPTION = (
    "Continues one prompt or several with a run's checkpoint or a model in a Hugging Face folder,\n"
    "over the latent cache (report 2.1.1). A single completion is printed as it is written. With\n"
    "--suffix the text between prompt and suffix is written (fill-in-the-middle). Without\n"
    "--prompt the prompt is read from the standard input. The same seed gives the same text,\n"
    "whatever else is asked for beside it. --drafts=K speculates with the MTP modules (5.4.3).")
EXAMPLES = (
    "  dsv3 generate runs/tiny --prompt='def main(' --tokens=64\n"
    "  dsv3 generate runs/tiny --prompt='import ' --temperature=0.8 --top-p=0.95 --n=3\n"
    "  dsv3 generate runs/tiny --prompt='def add(a, b):\\n' --suffix='\\n  return c' --tokens=16\n"
    "  dsv3 generate runs/tiny --prompt='class ' --drafts=2\n"
    "  dsv3 generate exported --prompt='class ' --stop='\\n\\n' --json < /dev/null")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  trained.add_arguments(parser)
  parser.add_argument("--prompt", action="append", metavar="TEXT",
                      help="text to continue; \\n, \\t and \\\\ are understood (may be repeated)")
  parser.add_argument("--suffix", metavar="TEXT", help="text after the gap that is to be filled")
  parser.add_argument("--tokens", type=int, default=128, metavar="N",
                      help="most new tokens of each completion (default: %(default)s)")
  parser.add_argument("--n", type=int, default=1, metavar="N",
                      help="completions of each prompt, with seeds from --seed on (default: 1)")
  parser.add_argument("--temperature", type=float, default=0.0, metavar="T",
                      help="0 takes the most likely token (default: %(default)g)")
  parser.add_argument("--top-k", type=int, default=0, metavar="K",
                      help="only the K most likely tokens; 0: all")
  parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                      help="only the most likely that together have probability P")
  parser.add_argument("--min-p", type=float, default=0.0, metavar="P",
                      help="only those with this share of the most likely one's probability")
  parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X",
                      help="makes tokens that were seen less likely; 1: off")
  parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
  parser.add_argument("--stop", action="append", default=[], metavar="TEXT",
                      help="text that ends a completion (may be repeated)")
  parser.add_argument("--drafts", type=int, default=0, metavar="K",
                      help="tokens that the MTP modules draft for each pass of the model "
                           "(speculative decoding: the same greedy text, draws of the same "
                           "distribution); says how many were kept")
  parser.add_argument("--json", action="store_true",
                      help="one JSON object a completion, with tokens and log-probabilities")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: no model or tokenizer in the folder, no prompt, a bad setting.
  """
  trained.check(args.source, args.step, args.ema)
  if args.n < 1:
    raise ConfigError(f"--n={args.n} must be at least 1")
  prompts = [_unescaped(p) for p in args.prompt or [sys.stdin.read()]]
  suffix = None if args.suffix is None else _unescaped(args.suffix)

  from dsv3_jax.infer.sampler import Sampling  # jax starts here

  first = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty,
                   args.seed)
  settings = [dataclasses.replace(first, seed=args.seed + i) for i in range(args.n)]
  generator, tokenizer, _ = trained.load(args.source, args.step, args.ema, args.dtype, args.cache,
                                         args.weights, trained.to_stderr)
  return _write(generator, tokenizer, prompts, suffix, settings, args)


def _write(generator: Any, tokenizer: Any, prompts: list[str], suffix: str | None,
           settings: list[Any], args: argparse.Namespace) -> int:
  """Generates and prints."""
  import numpy as np

  from dsv3_jax.data import fim
  from dsv3_jax.infer.text import Stream

  def ids(prompt: str) -> list[int]:
    if suffix is None:
      return [tokenizer.bos, *tokenizer.encode(prompt)]
    return fim.prompt(tokenizer.encode(prompt), tokenizer.encode(suffix), tokenizer)

  asked = [(prompt, setting) for prompt in prompts for setting in settings]
  stop = [_unescaped(s) for s in args.stop]
  streams = [Stream(tokenizer.decode_bytes, stop) for _ in asked]
  live = len(asked) == 1 and not args.json
  if live:
    print(asked[0][0], end="", flush=True)

  def on_tokens(row: int, tokens: list[int]) -> bool:
    new = streams[row].push(tokens)
    if live:
      print(new, end="", flush=True)
    return streams[row].ended

  # Ids that pad the model's vocabulary stand for nothing.
  V = generator.cfg.vocab_size
  bias_V = (np.where(np.arange(V) < tokenizer.vocab_size, 0.0, -np.inf).astype(np.float32)
            if tokenizer.vocab_size < V else None)
  done = generator([ids(prompt) for prompt, _ in asked], args.tokens, [s for _, s in asked],
                   stop=(tokenizer.eos,), bias_V=bias_V,
                   on_tokens=on_tokens if live or stop else None, drafts=args.drafts)
  for (prompt, setting), stream, completion in zip(asked, streams, done, strict=True):
    if not (live or stop):
      stream.push(completion.tokens)
    rest = stream.close()
    if live:
      print(f"{rest}{suffix or ''}")
    elif args.json:
      print(json.dumps({"prompt": prompt, "text": stream.text, "finish": completion.finish,
                        "seed": setting.seed, "tokens": completion.tokens,
                        "logprobs": completion.logprobs, "rounds": completion.rounds,
                        "accepted": completion.accepted}))
    else:
      print(f"--- seed {setting.seed}\n{prompt}{stream.text}{suffix or ''}")
  if args.drafts and not args.json:
    print(acceptance(done), file=sys.stderr)
  return 0


def acceptance(done: list[Any]) -> str:
  """How many drafts of completions were kept, by their place, in words."""
  rounds = sum(c.rounds for c in done)
  kept = [sum(c) for c in zip(*(c.accepted for c in done), strict=True)]
  if not rounds:
    return "no drafts: the prompt's pass drew every token"
  shares = ", ".join(f"{k / rounds:.0%}" for k in kept)
  return (f"drafts kept, first to last: {shares} of {rounds} rounds; "
          f"{1 + sum(kept) / rounds:.2f} tokens a pass of the model")


def _unescaped(text: str) -> str:
  """With \\n, \\t and \\\\ as a shell's single quotes leave them."""
  for written, meant in (("\\\\", "\0"), ("\\n", "\n"), ("\\t", "\t"), ("\0", "\\")):
    text = text.replace(written, meant)
  return text
