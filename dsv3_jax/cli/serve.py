"""`dsv3 serve`: a model behind OpenAI's API."""

import argparse
import dataclasses
import ipaddress
import os
import sys
from pathlib import Path

from dsv3_jax import config, trained
from dsv3_jax.config import ConfigError

SUMMARY = "a trained model behind an OpenAI-compatible HTTP API, with a chat page"
DESCRIPTION = (
    "Serves a run's checkpoint or a model in a Hugging Face folder: /v1/completions and\n"
    "/v1/chat/completions (both streaming), /v1/models, /metrics for Prometheus, /health, and a\n"
    "page for a browser at /. Requests are batched as they come (continuous batching over a paged\n"
    "latent cache); equal beginnings of prompts are read once. SIGTERM or SIGINT: no new calls,\n"
    "those under way are answered first.\n\n"
    "With --mesh over several devices: each has requests of its own, and a part of the experts.\n"
    "Redundant experts relieve the busiest devices; where experts are follows the load that they\n"
    "have, and requests go on while they move (`dsv3 simulate` shows what to expect of it). With\n"
    "--apart prompts are read on devices of their own.")
EXAMPLES = (
    "  dsv3 serve runs/tiny\n"
    "  DSV3_API_KEY=secret dsv3 serve exported --host=0.0.0.0 --port=8080 --name=mine\n"
    "  dsv3 serve exported --mesh=2x8 --redundant=32 --rebalance=300 --record=load --halves\n"
    "  XLA_FLAGS=--xla_force_host_platform_device_count=4 dsv3 serve runs/tiny --mesh=1x4\n"
    "  curl http://127.0.0.1:8000/v1/completions -d '{\"prompt\": \"def main(\"}'")


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The command's options."""
  trained.add_arguments(parser)
  parser.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s)")
  parser.add_argument("--port", type=int, default=8000, metavar="N",
                      help="0 takes a free one (default: %(default)s)")
  parser.add_argument("--name", default="", help="of the model, to clients (default: of SOURCE)")
  parser.add_argument("--api-key", default="", metavar="KEY",
                      help="that calls must bear; the variable DSV3_API_KEY does not show in a "
                           "list of processes (default: none)")
  parser.add_argument("--tokens", type=int, default=32768, metavar="N",
                      help="that the cache has room for, of all requests (default: %(default)s)")
  parser.add_argument("--longest", type=int, default=0, metavar="N",
                      help="tokens of one request, prompt and answer (default: as many as the "
                           "model was trained to see)")
  parser.add_argument("--running", type=int, default=16, metavar="N",
                      help="requests that are answered at once (default: %(default)s)")
  parser.add_argument("--queue", type=int, default=1024, metavar="N",
                      help="requests that may wait; more get status 429 (default: %(default)s)")
  parser.add_argument("--chunk", type=int, default=256, metavar="N",
                      help="tokens of a prompt read at once, between which others write (default: "
                           "%(default)s)")
  parser.add_argument("--timeout", type=float, default=600.0, metavar="S",
                      help="seconds a call may take (default: %(default)g)")
  parser.add_argument("--patience", type=float, default=30.0, metavar="S",
                      help="seconds for calls under way when the server ends (default: "
                           "%(default)g)")
  parser.add_argument("--no-sharing", action="store_true",
                      help="read equal beginnings of prompts anew each time")
  several = parser.add_argument_group("several devices")
  several.add_argument("--mesh", default="", metavar="NODESxGPUS",
                       help="devices, over which experts are cut; COPIESxNODESxGPUS: so many "
                            "copies of all experts; --tokens and --running are of each device "
                            "(default: one device)")
  several.add_argument("--redundant", type=int, default=0, metavar="N",
                       help="slots of each layer beyond one for each expert, for those that have "
                            "most load (default: %(default)s)")
  several.add_argument("--load", metavar="PATH",
                       help="place experts at first by a recorded load: a run's workdir, or what "
                            "--record has written")
  several.add_argument("--rebalance", type=float, default=60.0, metavar="S",
                       help="seconds between two looks at the load, after which experts may move; "
                            "0: never (default: %(default)g)")
  several.add_argument("--record", metavar="DIR",
                       help="append the load of each such window to DIR/metrics.jsonl, for --load "
                            "and `dsv3 simulate --load=DIR`; on one device too")
  several.add_argument("--halves", action="store_true",
                       help="run two micro-batches, one's tokens on their way to experts while the "
                            "other computes")
  several.add_argument("--apart", action="store_true",
                       help="read prompts on as many devices again, by an engine of their own that "
                            "hands the cache over: a long prompt holds up no answer")
  several.add_argument("--dispatch", choices=("two_hop", "flat", "gather"),
                       help="how tokens reach experts (default: two_hop)")
  parser.add_argument("--cold", action="store_true",
                      help="compile when a size is first wanted, not before the first call")


def run(args: argparse.Namespace) -> int:
  """Runs the command.

  Raises:
    ConfigError: no model or tokenizer in the folder, a bad setting, or a package that is missing.
  """
  trained.check(args.source, args.step, args.ema)
  for name in ("timeout", "patience", "tokens"):
    if getattr(args, name) <= 0:
      raise ConfigError(f"--{name}={getattr(args, name):g} must be positive")
  for name in ("redundant", "rebalance"):
    if getattr(args, name) < 0:
      raise ConfigError(f"--{name}={getattr(args, name):g} must not be negative")
  for name in ("redundant", "load", "halves", "dispatch"):
    if getattr(args, name) and not args.mesh:
      raise ConfigError(f"--{name} goes with --mesh: it is about several devices")
  if args.record and not args.rebalance:
    raise ConfigError("--record writes a line each --rebalance seconds, which is 0")
  if not 0 <= args.port < 65536:
    raise ConfigError(f"--port={args.port} must lie between 0 and 65535")
  try:
    import prometheus_client  # noqa: F401
    import starlette  # noqa: F401
    import uvicorn
  except ImportError as e:
    raise ConfigError(f"serving wants {e.name}: pip install 'dsv3-jax[serve]'") from None
  from dsv3_jax.infer.batches import Settings
  from dsv3_jax.serve import app, devices, guard
  from dsv3_jax.serve.worker import Worker

  page = 64
  settings = Settings(-(-args.tokens // page), page, args.longest, args.running, args.chunk,
                      queue=args.queue, share=not args.no_sharing, halves=args.halves,
                      window=args.rebalance if args.mesh or args.record else 0.0)
  mesh, load_LE = devices.sizes(args.mesh) if args.mesh else None, None
  if args.load:
    from dsv3_jax.analysis import recorded_load
    load_LE = recorded_load.read(args.load).sum(0)
  devices.check(mesh, args.apart)
  with devices.beside(mesh):
    generator, tokenizer, context = trained.load(args.source, args.step, args.ema, args.dtype,
                                                 args.cache, args.weights, trained.to_stderr)
  if not args.longest:
    settings = dataclasses.replace(settings, longest=min(context, settings.limit))
  engine = devices.make_engine(
      args.apart, args.record, generator.cfg, mesh, args.redundant, load_LE, generator.weights,
      config.replace(generator.runtime, **{"dispatch.form": args.dispatch or "two_hop"}),
      settings=settings,
      cache_dtype=generator.cache_dtype, stop=frozenset({tokenizer.eos}),
      vocabulary=tokenizer.vocab_size)
  del generator  # with weights of its own, where the engine's are on several devices
  name = args.name or Path(args.source).resolve().name
  key = args.api_key or os.environ.get("DSV3_API_KEY", "")
  open_to_all = bool(key) or not _loopback(args.host)
  hosts = () if open_to_all else ("localhost", "127.0.0.1", "::1", args.host)
  made = app.make(Worker(engine, args.patience), tokenizer, name,
                  guard.Limits(key, seconds=args.timeout, hosts=tuple(dict.fromkeys(hosts))))
  server = uvicorn.Server(uvicorn.Config(
      made, args.host, args.port, log_level="warning", lifespan="on", access_log=False,
      timeout_graceful_shutdown=int(args.patience) or 1))
  try:
    socket = server.config.bind_socket()
  except SystemExit:  # it has said why
    return 1
  if not args.cold:
    engine.warm(lambda what: print(f"compiling: {what}", file=sys.stderr, flush=True))
  socket.listen(server.config.backlog)  # whoever reads the address may call at once
  host, port = socket.getsockname()[:2]
  if not key and not _loopback(args.host):
    print("no key: whoever reaches this address may call; set DSV3_API_KEY", file=sys.stderr)
  print(f"requests of up to {settings.limit:,} tokens (--longest)", file=sys.stderr)
  print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
  server.run(sockets=[socket])
  return 0


def _loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"
