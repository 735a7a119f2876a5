"""The model in EleutherAI's lm-evaluation-harness.

    python -m dsv3_jax.harness run --model dsv3_jax --model_args source=runs/tiny --tasks lambada

is the harness' own command line (`lm_eval`) with this model registered; what follows is passed on.
Local tasks are found with `--include_path FOLDER`. From Python:

    lm_eval.simple_evaluate(DSV3("runs/tiny"), tasks=["lambada"])
"""

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from dsv3_jax import trained
from dsv3_jax.infer import score
from dsv3_jax.infer.sampler import Sampling
from dsv3_jax.infer.text import Stream

_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("dsv3_jax")
class DSV3(TemplateLM):
  """A run's checkpoint or a Hugging Face model folder, as the harness takes it.

  Args:
    source: the folder.
    step, ema, dtype, weights: see `trained.load`.
    max_length: tokens of context and continuation; longer contexts lose their beginning. 0: what
      the model was trained to see.
    max_gen_toks: new tokens where a task does not say.
    batch_size: sequences in one pass.
    unused: what the harness passes to every model.
  """

  backend = "causal"

  def __init__(self, source: str, step: int | None = None, ema: bool = False,
               dtype: str = "float32", max_length: int = 0, max_gen_toks: int = 256,
               batch_size: int | str = 8, weights: str = "auto", **unused: Any):
    super().__init__()
    self._generator, self._tokenizer, context = trained.load(
        source, step, ema, dtype, weights=weights, say=trained.to_stderr)
    self.max_length, self.max_gen_toks = int(max_length) or context, int(max_gen_toks)
    self._rows = 8 if batch_size in ("auto", None) else int(batch_size)

  @property
  def eot_token_id(self) -> int:
    return self._tokenizer.eos

  @property
  def prefix_token_id(self) -> int:
    """What a text without a context follows."""
    return self._tokenizer.bos

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any
                 ) -> list[int]:
    return self._tokenizer.encode(string)

  def tok_decode(self, tokens: list[int], **unused: Any) -> str:
    return self._tokenizer.decode(tokens)

  def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **unused: Any
                            ) -> list[tuple[float, bool]]:
    asked, bos = [], [self._tokenizer.bos]
    for _, context, rest in requests:
      rest = rest[1 - self.max_length:]
      context = context if context[:1] == bos else bos + context
      asked.append((context[len(rest) - self.max_length:], rest))
    return self._scored(asked, disable_tqdm)

  def _scored(self, asked, quiet: bool) -> list[tuple[float, bool]]:
    with tqdm(total=len(asked), disable=quiet, desc="scoring") as bar:
      found = score.score(self._generator, asked, self._rows, lambda done: bar.update(done - bar.n))
    return [(sum(s.logprobs), s.greedy) for s in found]

  def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
    windows, owner = [], []
    for i, request in enumerate(requests):
      for context, rest in get_rolling_token_windows(
          self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1, 1):
        # The harness gives the inputs of each prediction; here context and continuation.
        context = context[:len(context) - len(rest) + 1]
        windows.append((context, rest))
        owner.append(i)
    sums = [0.0] * len(requests)
    for i, (value, _) in zip(owner, self._scored(windows, disable_tqdm), strict=True):
      sums[i] += value
    return sums

  def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
    found = []
    for request in tqdm(requests, disable=disable_tqdm, desc="writing"):
      text, options = request.args
      until = options.get("until") or []
      until = [until] if isinstance(until, str) else until
      most = int(options.get("max_gen_toks", self.max_gen_toks))
      given = {k: options[k] for k in _OPTIONS if options.get(k) is not None}
      if not options.get("do_sample", "temperature" in given):
        given["temperature"] = 0.0
      prompt = [self._tokenizer.bos, *self.tok_encode(text)][-(self.max_length - most):]
      stream = Stream(self._tokenizer.decode_bytes, [s for s in until if s])

      def push(row: int, tokens: list[int], stream=stream) -> bool:
        stream.push(tokens)
        return stream.ended

      self._generator([prompt], most, Sampling(**given), stop=(self._tokenizer.eos,),
                      on_tokens=push)
      stream.close()
      found.append(stream.text)
    return found


def main() -> None:
  """The harness' own command line."""
  from lm_eval.__main__ import cli_evaluate

  cli_evaluate()


if __name__ == "__main__":
  main()
