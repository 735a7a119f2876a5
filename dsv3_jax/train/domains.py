"""A trained model on text of several domains: loss and expert load of each (report figure 9)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsv3_jax import config as config_lib
from dsv3_jax.config import ConfigError
from dsv3_jax.data import domains as domains_lib
from dsv3_jax.data import packing, units
from dsv3_jax.data.domains import Domain
from dsv3_jax.train import evaluate
from dsv3_jax.train.evaluate import Trained

TOKENS = 2**16  # measured of a domain
BATCHES = 32  # that those make: standard errors come from the differences between batches
STABLE = 1000  # tokens that each expert would get if balanced, for loads to be worth reading


def collect(runs: Sequence[Trained], names: Sequence[str] = (),
            own: Sequence[tuple[str, str]] = (), tokens: int = TOKENS) -> list[Domain]:
  """The text to measure on: the same for all runs, held out from all of them where that can be.

  Args:
    runs: to be compared.
    names: domains of the default corpus (`domains.DEFAULT`).
    own: (name, path) of further ones.
    tokens: of a domain, for which there will be enough text if there is any; 0 for all.

  Raises:
    ConfigError: an unknown name, no such path, no text.
  """
  def keep(hashes: np.ndarray) -> np.ndarray:
    kept = np.ones(len(hashes), bool)
    for run in runs:
      kept &= ~run.corpus.trained_on(hashes)
    return kept

  data = runs[0].config.data
  enough = tokens * domains_lib.BYTES_PER_TOKEN
  least = STABLE * max(-(-r.config.model.moe.experts // r.config.model.moe.active) for r in runs)
  found = domains_lib.default(names, keep, least * domains_lib.BYTES_PER_TOKEN, enough,
                              data.max_document_bytes) if names else []
  return found + [
      domains_lib.own(name, spec, keep, enough, data.text_key, data.max_document_bytes)
      for name, spec in own]


def layer_names(model: config_lib.Model) -> list[str]:
  """Names of the MoE layers, in the order of their counts."""
  return [*(f"layer {i}" for i in range(model.dense_layers, model.layers)),
          *(f"MTP {i + 1}" for i in range(model.mtp_depth))]


def measure(run: Trained, domains: Sequence[Domain], tokens: int = TOKENS, ema: bool = False,
            say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
  """One run on each domain.

  Batches hold one domain alone. All have one shape, so the model is compiled once.

  Args:
    run: see `evaluate.find`.
    domains: see `collect`; with text.
    tokens: of a domain at most; 0 for all.
    ema: whether to take the averaged parameters.
    say: called with the name of the domain that is next.

  Returns:
    {"workdir", "step", "ema", "id" (of the config), "experts", "active", "layers" (names of the
    MoE layers, L in all), "domains": {name: {"source", "documents", "held_out", "tokens", "bytes",
    "loss", "mtp_loss", "bits_per_byte", "accuracy"}}, "counts": {name: fp32 [batches, L, E]}}
    documents: that the text was taken from.

  Raises:
    ConfigError: less text in a domain than one sequence.
  """
  cfg, tokenizer = run.config, run.corpus.tokenizer
  model, length = cfg.model, cfg.data.sequence_length
  rows = cfg.data.micro_batch
  if tokens:
    rows = max(1, min(rows, tokens // (BATCHES * length)))
  batches = {}
  for domain in domains:
    parts = domains_lib.parts(domain.documents, tokenizer, units.SEQUENCES * length, tokens)
    if sum(map(len, parts)) <= length:
      raise ConfigError(
          f"domain {domain.name!r} has too little text: {sum(map(len, parts))} tokens, less than "
          f"one sequence of the run {run.workdir} (data.sequence_length={length}); give more")
    batches[domain.name] = packing.fixed_batches(
        parts.__getitem__, len(parts), length=length + 1, isolate=cfg.data.isolate,
        pad=tokenizer.pad, batch_size=rows)
  sums, params, buffers = evaluate.load(run, ema)
  made: dict[str, Any] = {
      "workdir": run.workdir, "step": run.meta["step"], "ema": ema,
      "id": config_lib.fingerprint(cfg), "experts": model.moe.experts, "active": model.moe.active,
      "layers": layer_names(model), "domains": {}, "counts": {}}
  for domain in domains:
    say(domain.name)
    size = sum(evaluate.target_bytes(b, tokenizer.token_bytes_V) for b in batches[domain.name])
    found = evaluate.evaluate(sums, params, buffers, batches[domain.name], size, each=True)
    assert len(found["counts_LE"]) == len(made["layers"])
    made["counts"][domain.name] = found["batch_counts"]
    made["domains"][domain.name] = {
        "source": domain.source, "documents": len(domain.documents), "held_out": domain.held_out,
        "tokens": int(found["tokens"]), "bytes": size,
        **{key: found[key] for key in ("loss", "mtp_loss", "bits_per_byte", "accuracy")}}
  return made
