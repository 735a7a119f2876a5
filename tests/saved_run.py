"""A run's folder as training leaves it, without training: for commands that read one."""

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config as config_lib
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.train import checkpoint, optim, state

CONFIG = config_lib.replace(config_lib.Config(), **{
    "model.vocab_size": 320, "model.dim": 16, "model.layers": 2, "model.dense_ffn_dim": 16,
    "model.attention.heads": 2, "model.attention.q_rank": 8, "model.attention.kv_rank": 8,
    "model.attention.nope_dim": 4, "model.attention.rope_dim": 4, "model.attention.v_dim": 4,
    "model.moe.ffn_dim": 8, "model.mtp_depth": 1})


def random_state():
  """Random parameters, buffers and the rest of a state."""
  _, abstract, _ = state.initializer(lambda: state.build_model(CONFIG.model, seed=3),
                                     optim.make_optimizer(CONFIG.optim))
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), abstract)


def tokenizer():
  """One of the model's vocabulary."""
  return tokenizer_lib.train(["def main(argv):\n  print(argv)\n" * 40], CONFIG.model.vocab_size)


def make(folder):
  """Writes a checkpoint of random parameters and a tokenizer."""
  made = random_state()
  saver = checkpoint.Checkpoints(str(folder))
  saver.save(made, {"step": 1, "tokens": 10, "val_loss": None,
                    "config": config_lib.to_dict(CONFIG)})
  saver.close()
  (folder / "tokenizer.json").write_text(tokenizer().to_json())
