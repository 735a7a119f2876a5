"""The DeepSeek-V3 report's equations in numpy float64, one sequence and one expert at a time.

An oracle: written from the report alone and for clarity, not speed. It shares nothing with
dsv3_jax but the parameter names and their [in, out] orientation. Numbers in brackets are the
report's equations. Letters as everywhere: T tokens, D width, E experts, A active, H heads, V
vocabulary.
"""

import dataclasses
import math
from typing import Any

import numpy as np


def rms_norm(x, gain, eps):
  """x / sqrt(mean(x^2) + eps) * gain over the last axis."""
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * gain


def silu(x):
  return x / (1 + np.exp(-x))


def softmax(x):
  e = np.exp(x - np.max(x, axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def swiglu(x, ffn):
  """W_down (silu(W_gate x) * (W_up x)), no biases."""
  return (silu(x @ ffn["w_gate_DF"]) * (x @ ffn["w_up_DF"])) @ ffn["w_down_FD"]


# --- rotary embedding and YaRN (4.3) ------------------------------------------------------------


def yarn_mscale(factor, m):
  return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def yarn_bounds(dim, theta, yarn):
  """(low, high): the indices between which frequencies are blended."""
  def corr(turns):
    return dim * math.log(yarn.original_length / (2 * math.pi * turns)) / (2 * math.log(theta))
  return (max(math.floor(corr(yarn.beta_fast)), 0),
          min(math.ceil(corr(yarn.beta_slow)), dim - 1))


def inverse_frequencies(dim, theta, yarn):
  """[dim / 2] angles a position, YaRN applied where its factor exceeds 1."""
  freq = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
  if yarn.factor == 1:
    return freq
  low, high = yarn_bounds(dim, theta, yarn)
  out = np.empty_like(freq)
  for i, f in enumerate(freq):
    ramp = min(max((i - low) / max(high - low, 1e-3), 0), 1)
    out[i] = f / yarn.factor * ramp + f * (1 - ramp)
  return out


def softmax_scale(attention):
  """(N + R)^-1/2 times YaRN's squared temperature."""
  m = yarn_mscale(attention.yarn.factor, attention.yarn.mscale_all_dim)
  return (attention.nope_dim + attention.rope_dim) ** -0.5 * m * m


def rope(x, positions, attention):
  """Rotates adjacent pairs (2i, 2i+1) of x [T, ..., R] by position times frequency i."""
  yarn = attention.yarn
  freq = inverse_frequencies(attention.rope_dim, attention.rope_theta, yarn)
  size = yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
  out = np.empty_like(x)
  for t, position in enumerate(positions):
    turn = size * np.exp(1j * position * freq)
    z = (x[t, ..., 0::2] + 1j * x[t, ..., 1::2]) * turn
    out[t, ..., 0::2], out[t, ..., 1::2] = z.real, z.imag
  return out


# --- multi-head latent attention, [1]-[11] ------------------------------------------------------


def mla(h, p, a, segments):
  """h [T, D], already normalised -> [T, D]. `a` is config.Attention, `p` its parameters."""
  T = len(h)
  positions = np.arange(T)
  c_kv, k_r = np.split(h @ p["w_dkv_DZ"], [a.kv_rank], axis=-1)  # [1], [3]
  c_kv = rms_norm(c_kv, p["kv_norm_C"], a.latent_norm_eps)  # section 4.2; k_r is not normalised
  k_r = rope(k_r, positions, a)
  if a.q_rank:
    c_q = rms_norm(h @ p["w_dq_DQ"], p["q_norm_Q"], a.latent_norm_eps)  # [6]
    q = np.einsum("tq,qhk->thk", c_q, p["w_uq_QHK"])  # [7], [8]
  else:
    q = np.einsum("td,dhk->thk", h, p["w_q_DHK"])
  q_c, q_r = q[..., :a.nope_dim], rope(q[..., a.nope_dim:], positions, a)
  out = np.zeros_like(h)
  for i in range(a.heads):
    w = p["w_ukv_CHW"][:, i]
    k_c, v = c_kv @ w[:, :a.nope_dim], c_kv @ w[:, a.nope_dim:]  # [2], [5]
    for t in range(T):
      seen = [j for j in range(t + 1) if segments[j] == segments[t]]
      score = k_c[seen] @ q_c[t, i] + k_r[seen] @ q_r[t, i]  # [4], [9]
      o = softmax(score * softmax_scale(a)) @ v[seen]  # [10]
      out[t] += o @ p["w_o_HUD"][i]  # [11]
  return out


# --- DeepSeekMoE, [12]-[16] and the group limit -------------------------------------------------


@dataclasses.dataclass
class Routing:
  """What one MoE layer did with one sequence."""

  affinity: Any  # [T, E]
  chosen: Any  # [T, A] experts, in decreasing biased affinity
  gate: Any  # [T, A]


def top(x, k):
  """Indices of the k largest; of equals, the lower index first."""
  return np.argsort(-x, kind="stable")[:k]


def choose(biased, m):
  """Experts of one token from its biased affinities [E] under the group limit."""
  per_group = m.experts // m.groups
  if m.active_groups < m.groups:
    grouped = biased.reshape(m.groups, per_group)
    score = np.array([np.sort(g)[::-1][:m.group_top].sum() for g in grouped])
    keep = set(top(score, m.active_groups).tolist())
    biased = np.array([b if e // per_group in keep else -np.inf for e, b in enumerate(biased)])
  return top(biased, m.active)


def route(u, w_router, bias, m):
  """Affinities, selection and gates of u [T, D]. [13]-[16]."""
  logits = u @ w_router
  affinity = softmax(logits) if m.gate == "softmax" else 1 / (1 + np.exp(-logits))
  chosen = np.array([choose(s + bias, m) for s in affinity])
  gate = np.take_along_axis(affinity, chosen, axis=-1)
  if m.normalize:
    gate = gate / gate.sum(axis=-1, keepdims=True)
  return Routing(affinity, chosen, gate * m.scale)


def moe(u, p, bias, m):
  """[12] without the residual: u [T, D] -> ([T, D], Routing)."""
  r = route(u, p["w_router_DE"], bias, m)
  out = np.zeros_like(u)
  for t, token in enumerate(u):
    for e, g in zip(r.chosen[t], r.gate[t]):
      expert = {"w_gate_DF": p["w_gate_EDF"][e], "w_up_DF": p["w_up_EDF"][e],
                "w_down_FD": p["w_down_EFD"][e]}
      out[t] += g * swiglu(token, expert)
  if m.shared:
    out += swiglu(u, p["shared"])
  return out, r


# --- the model and its multi-token prediction modules, [21]-[25] --------------------------------


def layer(tree, i):
  """Layer i of a tree of stacked parameters."""
  return {k: layer(v, i) if isinstance(v, dict) else v[i] for k, v in tree.items()
          if v is not None}


def block(x, p, bias, cfg, segments):
  """A pre-norm block; `bias` None marks a dense feed-forward. Returns (x, Routing or None)."""
  x = x + mla(rms_norm(x, p["attn_norm_D"], cfg.norm_eps), p["attn"], cfg.attention, segments)
  u = rms_norm(x, p["ffn_norm_D"], cfg.norm_eps)
  if bias is None:
    return x + swiglu(u, p["ffn"]), None
  y, routing = moe(u, p["ffn"], bias, cfg.moe)
  return x + y, routing


@dataclasses.dataclass
class Sequence:
  """What the model says about one sequence of T tokens."""

  logits: Any  # [T, V]
  mtp_logits: list  # depth k (from 1): [T - k, V]
  routing: list  # main MoE layers, then MTP depths


def sequence(params, biases, cfg, tokens, segments=None):
  """Runs one sequence [T]. `params` is nested as the model's attributes, layers stacked.

  `biases` is {"moe": [Lm, E], "mtp": [depth, E]}.
  """
  T = len(tokens)
  segments = np.zeros(T, int) if segments is None else np.asarray(segments)
  x = params["embedding_VD"][tokens]
  routing = []
  for i in range(cfg.dense_layers):
    x, _ = block(x, layer(params["dense"], i), None, cfg, segments)
  for i in range(cfg.moe_layers):
    x, r = block(x, layer(params["moe"], i), biases["moe"][i], cfg, segments)
    routing.append(r)
  normed = rms_norm(x, params["final_norm_D"], cfg.norm_eps)
  logits = normed @ params["head_DV"]
  h, mtp_logits = (normed if cfg.mtp_input == "normed" else x), []
  for k in range(1, cfg.mtp_depth + 1):
    p, n = layer(params["mtp"], k - 1), T - k
    e = rms_norm(params["embedding_VD"][tokens[k:]], p["embed_norm_D"], cfg.norm_eps)
    g = rms_norm(h[:n], p["hidden_norm_D"], cfg.norm_eps)
    h = e @ p["w_embed_DD"] + g @ p["w_hidden_DD"]  # [21]
    h, r = block(h, p["block"], biases["mtp"][k - 1], cfg, segments[:n])  # [22]
    mtp_logits.append(rms_norm(h, p["out_norm_D"], cfg.norm_eps) @ params["head_DV"])  # [23]
    routing.append(r)
  return Sequence(logits, mtp_logits, routing)


# --- losses -------------------------------------------------------------------------------------


def balance(affinity, counts, m):
  """sum_i f_i P_i over n tokens: affinity [n, E], counts [E] of n * A selections. [17]-[20]."""
  n = len(affinity)
  if n == 0:
    return 0.0
  f = m.experts / (m.active * n) * counts
  P = (affinity / affinity.sum(axis=-1, keepdims=True)).mean(axis=0)  # [19], [20]
  return float(f @ P)


def histogram(experts, m):
  return np.bincount(np.asarray(experts).ravel(), minlength=m.experts)


def unbiased_counts(affinity, m):
  """How often an expert is among the A largest affinities: no bias, no groups. [18]."""
  return histogram([top(s, m.active) for s in affinity], m)


def sequence_balance(r, m):
  return balance(r.affinity, unbiased_counts(r.affinity, m), m)


def expert_balance(r, m):
  """V2's expert-level loss: the same form with counts of the experts really selected."""
  return balance(r.affinity, histogram(r.chosen, m), m)


def batch_balance(routings, m):
  """The same form with f and P over all tokens of several sequences (4.5.3)."""
  affinity = np.concatenate([r.affinity for r in routings])
  return balance(affinity, unbiased_counts(affinity, m), m)


def nll(logits, label):
  top_logit = logits.max()
  return float(np.log(np.exp(logits - top_logit).sum()) + top_logit - logits[label])


def counts_as_target(segments, mask, i, j):
  """Whether position i may be scored on token j: same document, no padding, counted by the mask."""
  same = segments is None or (segments[j] == segments[i] and segments[j] >= 0)
  return same and (mask is None or bool(mask[j]))


@dataclasses.dataclass
class Loss:
  """Losses of a batch; each field as the report normalises it."""

  total: float
  main: float
  mtp: list  # a depth, before lambda / D
  balance: float  # mean over sequences of the sequence-wise loss, summed over MoE layers
  batch_balance: float  # the same loss over the batch as one sequence
  expert_balance: float  # as `balance`, of the experts really chosen
  tokens: int  # targets of the main model
  mtp_tokens: list
  correct: int
  counts: Any  # [layers, E]
  outputs: list


def loss(params, biases, cfg, weights, batch, mtp_weight):
  """L_main + lambda / D sum_k L_MTP^k + balance losses, for tokens [B, T + 1].

  Every cross entropy is divided by the number of main targets, as [24] divides T - k terms by T.
  Routing statistics and balance losses count main positions that are no padding, and MTP positions
  that have a target in their own document, masked or not. `weights` is config.Loss.
  """
  tokens = np.asarray(batch["tokens"])
  B, T = tokens.shape[0], tokens.shape[1] - 1
  D = cfg.mtp_depth
  sums, seen, hits = [0.0] * (D + 1), [0] * (D + 1), 0
  outs = []
  for b in range(B):
    segments = batch["segments"][b] if "segments" in batch else None
    mask = batch["mask"][b] if "mask" in batch else None
    out = sequence(params, biases, cfg, tokens[b, :T], None if segments is None else segments[:T])
    for i, r in enumerate(out.routing):
      k = max(i + 1 - cfg.moe_layers, 0)  # MTP depth of this layer, 0 in the main model
      valid = [counts_as_target(segments, None, t, t + k + 1 if k else t) for t in range(T - k)]
      out.routing[i] = Routing(r.affinity[valid], r.chosen[valid], r.gate[valid])
    outs.append(out)
    for k, logits in enumerate([out.logits] + out.mtp_logits):
      for i in range(T - k):
        j = i + k + 1
        if counts_as_target(segments, mask, i, j):
          sums[k] += nll(logits[i], tokens[b, j])
          seen[k] += 1
          hits += k == 0 and int(logits[i].argmax() == tokens[b, j])
  means = [s / seen[0] for s in sums]
  m, layers = cfg.moe, range(len(outs[0].routing))
  seq = float(np.mean([[sequence_balance(r, m) for r in o.routing] for o in outs], axis=0).sum())
  expert = float(np.mean([[expert_balance(r, m) for r in o.routing] for o in outs], axis=0).sum())
  whole = sum(batch_balance([o.routing[i] for o in outs], m) for i in layers)
  total = means[0] + (mtp_weight / D * sum(means[1:]) if D else 0.0)
  total += (weights.sequence_balance * seq + weights.expert_balance * expert
            + weights.batch_balance * whole)
  counts = np.array([sum(histogram(o.routing[i].chosen, m) for o in outs) for i in layers])
  return Loss(total, means[0], means[1:], seq, whole, expert, seen[0], seen[1:], hits, counts, outs)
