"""The model's parameters as a list of arrays, and how much of each one device has at home.

The names and shapes are those of the trained tree (`model/`), the homes those of
`parallel/placement.py`, without jax. tests/cost/test_memory.py holds both to the originals.
"""

import functools
import itertools
import math
from typing import NamedTuple

from dsv3_jax import config

STACKS = ("dense", "moe")  # of layers, in their order
EXPERTS = ("node", "gpu")  # mesh axes that cut the routed experts
_FREE = ("data", "context", "node", "gpu", "pipe")  # in the order in which ZeRO-1 uses them


def check(runtime: config.Runtime) -> None:
  """Raises ConfigError for what the cost model does not know."""
  n = runtime.mesh.context
  if n > 1:
    raise config.ConfigError(f"runtime.mesh.context={n}: the cost model does not know sequences "
                             "that are cut over devices; set it to 1")


class Array(NamedTuple):
  """One parameter.

  Attributes:
    stack: "dense", "moe" or "mtp" for arrays of a stack of layers, else the array's own name.
    name: ends in its shape letters.
    shape: of one layer; the stack's axis is `depth`.
    depth: layers in the stack; 0 where the array belongs to none.
  """

  stack: str
  name: str
  shape: tuple[int, ...]
  depth: int = 0

  @property
  def letters(self) -> str:
    return self.name.rpartition("_")[2]

  @property
  def layer(self) -> int:
    """Values of one layer."""
    return math.prod(self.shape)

  @property
  def size(self) -> int:
    """Values in all."""
    return self.layer * max(self.depth, 1)

  @property
  def experts(self) -> bool:
    """Whether it holds routed experts."""
    return self.letters.startswith("E") and len(self.letters) > 1

  @property
  def linear(self) -> bool:
    """Whether it is a linear layer's matrix, which a recipe quantizes (`fp8/weights.axes`)."""
    return self.name.startswith("w_") and not self.name.startswith("w_router")


def _attention(cfg: config.Model) -> dict[str, tuple[int, ...]]:
  a, D = cfg.attention, cfg.dim
  H, K, U = a.heads, a.qk_dim, a.v_dim
  if a.kind == "gqa":
    J = a.kv_heads or H
    return {"w_q_DHK": (D, H, K), "w_k_DJK": (D, J, K), "w_v_DJU": (D, J, U), "w_o_HUD": (H, U, D)}
  Q, C = a.q_rank, a.kv_rank
  queries = ({"w_dq_DQ": (D, Q), "q_norm_Q": (Q,), "w_uq_QHK": (Q, H, K)} if Q else
             {"w_q_DHK": (D, H, K)})
  return queries | {"w_dkv_DZ": (D, C + a.rope_dim), "kv_norm_C": (C,),
                    "w_ukv_CHW": (C, H, a.nope_dim + U), "w_o_HUD": (H, U, D)}


def _ffn(dim: int, width: int) -> dict[str, tuple[int, ...]]:
  return {"w_gate_DF": (dim, width), "w_up_DF": (dim, width), "w_down_FD": (width, dim)}


def block(cfg: config.Model, moe: bool) -> dict[str, tuple[int, ...]]:
  """Name -> shape of one block's parameters."""
  D, m = cfg.dim, cfg.moe
  found = {"attn_norm_D": (D,), "ffn_norm_D": (D,)} | _attention(cfg)
  if not moe:
    return found | _ffn(D, cfg.dense_ffn_dim)
  found |= {"w_router_DE": (D, m.experts), "w_gate_EDF": (m.experts, D, m.ffn_dim),
            "w_up_EDF": (m.experts, D, m.ffn_dim), "w_down_EFD": (m.experts, m.ffn_dim, D)}
  return found | (_ffn(D, m.shared * m.ffn_dim) if m.shared else {})


@functools.cache
def parameters(cfg: config.Model) -> tuple[Array, ...]:
  """All of the trained parameters; router biases are not among them."""
  D, V = cfg.dim, cfg.vocab_size
  module = block(cfg, True) | {"embed_norm_D": (D,), "hidden_norm_D": (D,), "out_norm_D": (D,),
                               "w_embed_DD": (D, D), "w_hidden_DD": (D, D)}
  found = [Array("embedding_VD", "embedding_VD", (V, D)), Array("head_DV", "head_DV", (D, V)),
           Array("final_norm_D", "final_norm_D", (D,))]
  for stack, shapes, depth in (("dense", block(cfg, False), cfg.dense_layers),
                               ("moe", block(cfg, True), cfg.moe_layers),
                               ("mtp", module, cfg.mtp_depth)):
    found += [Array(stack, name, shape, depth) for name, shape in shapes.items() if depth]
  return tuple(found)


def biases(cfg: config.Model) -> int:
  """Values of the router biases: buffers, on every device."""
  return (cfg.moe_layers + cfg.mtp_depth) * cfg.moe.experts


def kept_shards(array: Array, runtime: config.Runtime) -> int:
  """Devices that cut the array in use too: those of the experts, or of the vocabulary."""
  words = runtime.shard_vocab and "V" in array.letters
  return runtime.mesh.node * runtime.mesh.gpu if array.experts or words else 1


def zero_shards(array: Array, runtime: config.Runtime) -> int:
  """Devices among which ZeRO-1 cuts what is left (`placement.place`); 1 without it."""
  if not runtime.zero:
    return 1
  mesh, kept = runtime.mesh, kept_shards(array, runtime)
  # Devices along node and gpu, and not the axes' names, say whether the experts' axes are used up.
  free = [a for a in _FREE if getattr(mesh, a) > 1 and not (kept > 1 and a in EXPERTS)]
  sizes = list(array.shape)
  if kept > 1:
    sizes.pop(array.letters.index("E" if array.experts else "V"))
  groups = [math.prod(getattr(mesh, a) for a in group) for n in range(1, len(free) + 1)
            for group in itertools.combinations(free, n)]
  return max((g for g in groups if any(s % g == 0 for s in sizes)), default=1)


def in_use(array: Array, runtime: config.Runtime) -> int:
  """Values of one layer of the array where a device computes with it."""
  return array.layer // kept_shards(array, runtime)


def at_home(array: Array, runtime: config.Runtime) -> int:
  """Values of the array, all its layers, that one device keeps between steps."""
  return array.size // kept_shards(array, runtime) // zero_shards(array, runtime)
