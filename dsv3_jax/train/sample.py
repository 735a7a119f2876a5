"""Plain sampling for a run's report: a whole forward pass a token, one fixed length, one compile.

The serving engine with its latent cache lives in `infer`; this serves a handful of completions.
Padding on the right cannot reach what is left of it: attention is causal and routing is dropless.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv3_jax import config
from dsv3_jax.data import fim


def make_sampler(graphdef: nnx.GraphDef, runtime: config.Runtime, vocab_size: int = 0) -> Callable:
  """`sample(params, buffers, tokens_BT, length_B, steps, temperature, key)`.

  The compiled function appends `steps` tokens (a dynamic number) to each row of tokens_BT, whose
  first length_B entries are the prompt, and returns the filled tokens_BT. temperature 0 takes the
  most likely token. Rows draw from their own keys, so a row does not depend on its neighbours.
  Ids from `vocab_size` on, which pad the model's vocabulary, are never taken; 0: there are none.
  """

  @jax.jit
  def sample(params, buffers, tokens_BT, length_B, steps, temperature, key):
    model = nnx.merge(graphdef, params, buffers)
    rows = jnp.arange(tokens_BT.shape[0])
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(rows)

    def step(i, tokens_BT):
      position_B = length_B + i
      hidden = model.hidden(model.embed(tokens_BT, runtime), runtime=runtime)
      last_B1D = jnp.take_along_axis(hidden.h_BTD, (position_B - 1)[:, None, None], axis=1)
      logits_BV = model.logits(last_B1D)[:, 0]
      if vocab_size:
        logits_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < vocab_size, logits_BV, -jnp.inf)
      greedy_B = jnp.argmax(logits_BV, axis=-1)
      draw = lambda key, logits_V: jax.random.categorical(
          jax.random.fold_in(key, i), logits_V / jnp.maximum(temperature, 1e-6))
      next_B = jnp.where(temperature > 0, jax.vmap(draw)(keys, logits_BV), greedy_B)
      return tokens_BT.at[rows, position_B].set(next_B.astype(tokens_BT.dtype), mode="drop")

    return jax.lax.fori_loop(0, steps, step, tokens_BT)

  return sample


def generate(sample: Callable, params: Any, buffers: Any, prompts: Sequence[Sequence[int]],
             steps: int, temperature: float = 0.0, seed: int = 0, stop: Sequence[int] = (),
             length: int | None = None) -> list[list[int]]:
  """Continuations of `prompts`, up to `steps` tokens each, cut before the first `stop` token.

  Args:
    sample: of `make_sampler`.
    prompts: token ids, at least one each.
    length: padded length; the longest prompt plus `steps` where None.

  Raises:
    ValueError: an empty prompt, or one that leaves no room for `steps` tokens in `length`.
  """
  longest = max(map(len, prompts)) + steps
  length = longest if length is None else length
  if min(map(len, prompts)) == 0 or longest > length:
    raise ValueError(f"prompts of {min(map(len, prompts))} to {longest - steps} tokens and {steps} "
                     f"new ones do not fit the padded length {length}, or one is empty")
  tokens_BT = np.zeros((len(prompts), length), np.int32)
  for row, prompt in zip(tokens_BT, prompts, strict=True):
    row[:len(prompt)] = prompt
  length_B = np.array([len(p) for p in prompts], np.int32)
  args = jax.device_put((tokens_BT, length_B, np.int32(steps), np.float32(temperature)))
  filled = np.asarray(sample(params, buffers, *args, jax.random.key(seed)))
  out = []
  for row, start in zip(filled, length_B, strict=True):
    new = row[start:start + steps].tolist()
    ends = [new.index(s) for s in stop if s in new]
    out.append(new[:min(ends)] if ends else new)
  return out


def _excerpts(text: str, lines_before: int, lines_after: int, count: int) -> list[tuple]:
  """(before, line, after) at `count` places of a text, each around a line worth guessing."""
  lines = text.split("\n")
  found = []
  for i in range(count):
    start = len(lines) * (2 * i + 1) // (2 * count)
    for at in range(max(start, lines_before), len(lines) - lines_after):
      if 16 <= len(lines[at].strip()) <= 72:
        found.append(("\n".join(lines[at - lines_before:at]) + "\n", lines[at],
                      "\n" + "\n".join(lines[at + 1:at + 1 + lines_after])))
        break
  return found


def report_samples(sample: Callable, params: Any, buffers: Any, tokenizer: Any, text: bytes,
                   length: int, steps: int, seed: int = 0) -> list[dict[str, Any]]:
  """Completions and infillings of held-out text, as summary.json's "samples" wants them.

  Two excerpts, each completed from its beginning and infilled in prefix-suffix-middle order; the
  first pair greedily, the second at temperature 0.8. All prompts have one padded length, so the
  model compiles once.

  Args:
    tokenizer: with bos, eos, pad and FIM ids.
    text: held-out text.
    length: T, what the model was trained on.
    steps: new tokens a sample.
  """
  steps = min(steps, length // 2)
  room = length - steps - 4  # bos and three FIM tokens
  if steps < 2 or room < 8:
    return []
  samples = []
  for k, (before, line, after) in enumerate(
      _excerpts(text.decode("utf-8", "ignore"), lines_before=6, lines_after=4, count=2)):
    head = tokenizer.encode(before)[-(room * 2 // 3):]
    tail = tokenizer.encode(after)[:room // 3]
    temperature = 0.8 * (k % 2)
    shared = {"prompt": tokenizer.decode(head), "temperature": temperature}
    follows = tokenizer.decode(tokenizer.encode(line + after)[:steps])
    samples.append(({**shared, "kind": "completion", "suffix": "", "reference": follows},
                    [tokenizer.bos, *head]))
    samples.append(({**shared, "kind": "infill", "suffix": tokenizer.decode(tail),
                     "reference": line},
                    fim.prompt(head, tail, tokenizer)))
  out = []
  for k in range(0, len(samples), 2):
    entries, prompts = zip(*samples[k:k + 2], strict=True)
    texts = generate(sample, params, buffers, prompts, steps, entries[0]["temperature"], seed,
                     (tokenizer.eos, tokenizer.pad), length)
    out += [{**entry, "text": tokenizer.decode(new)}
            for entry, new in zip(entries, texts, strict=True)]
  return out
