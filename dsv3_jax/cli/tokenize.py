"""`dsv3 tokenize`: text to shards."""

import argparse
import sys

from dsv3_jax import config as config_lib

SUMMARY = "turn text into shards that training maps into memory"
DESCRIPTION = (
    "Tokenize text once, for corpora that exceed memory or serve many runs. Memory use does not\n"
    "grow with the corpus. The folder appears under its name when it is complete.")
EXAMPLES = (
    "  dsv3 tokenize --out=corpus 'texts/**/*.txt'\n"
    "  dsv3 tokenize --out=web --tokenizer=tokenizer.json --text-key=content web.jsonl.gz\n"
    "  dsv3 train --config=experiments/tiny.py --config.data.sources=shards:corpus \\\n"
    "    --workdir=runs/corpus")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  parser.add_argument("source", nargs="+", metavar="SOURCE",
                      help="file, folder, glob, hf:NAME, or stdlib, as in data.sources")
  parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
  parser.add_argument("--tokenizer", default="", metavar="FILE",
                      help="a tokenizer.json (default: train one on the sources)")
  defaults = config_lib.Data()
  parser.add_argument("--vocab-size", type=int, default=config_lib.Model().vocab_size,
                      metavar="N", help="of a tokenizer to be trained (default: %(default)s)")
  parser.add_argument("--text-key", default=defaults.text_key, metavar="KEY",
                      help="field of JSONL and Parquet records (default: %(default)s)")
  parser.add_argument("--max-document-bytes", type=int, default=defaults.max_document_bytes,
                      metavar="N", help="longest document taken (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
  """Runs the command."""
  from dsv3_jax.data import tokenize

  last = [""]

  def progress(stage: str, done: int, total: int) -> None:
    share = f"{done / total:4.0%} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
    if sys.stderr.isatty():
      print(f"\r{stage}: {share}   ", end="", file=sys.stderr, flush=True)
    elif stage != last[0]:
      print(f"{stage} ...", file=sys.stderr)
    last[0] = stage

  made = tokenize.tokenize(args.source, args.tokenizer, args.out, text_key=args.text_key,
                           max_document_bytes=args.max_document_bytes,
                           vocab_size=args.vocab_size, progress=progress)
  if sys.stderr.isatty() and last[0]:
    print(file=sys.stderr)
  tokens = sum(made.index["shards"])
  if made.index.get("skipped"):
    print(f"left out: {tokenize.counts(made.index['skipped'])}")
  print(f"{args.out}: {len(made):,} documents, {tokens:,} tokens; use it with "
        f"--config.data.sources=shards:{args.out}")
  return 0
