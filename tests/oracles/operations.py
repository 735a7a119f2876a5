"""Single operations and their gradients in numpy float64, one row at a time."""

import numpy as np


def grouped_gemm(x, w, group, used):
  """y [M, N] of x [M, K], w [G, K, N]; `group` [blocks] names the matrix of each block of rows."""
  block = len(x) // len(group)
  y = np.zeros((len(x), w.shape[2]))
  for row in range(used * block):
    y[row] = x[row] @ w[group[row // block]]
  return y


def grouped_gemm_gradients(x, w, group, used, dy):
  """(dx, dw) of sum(y * dy)."""
  block = len(x) // len(group)
  dx, dw = np.zeros_like(x), np.zeros_like(w)
  for row in range(used * block):
    g = group[row // block]
    dx[row] = w[g] @ dy[row]
    dw[g] += np.outer(x[row], dy[row])
  return dx, dw


def _weights(q, k, segments, scale, b, t, h):
  """(visible key positions, softmax weights) of one query."""
  seen = [s for s in range(t + 1) if segments is None or segments[b, s] == segments[b, t]]
  score = scale * np.array([q[b, t, h] @ k[b, s, h] for s in seen])
  p = np.exp(score - score.max())
  return seen, p / p.sum()


def attention(q, k, v, scale, segments=None):
  """Causal softmax attention of q, k [B, T, H, K] and v [B, T, H, U]."""
  out = np.zeros((*q.shape[:3], v.shape[-1]))
  for b, t, h in np.ndindex(q.shape[:3]):
    seen, p = _weights(q, k, segments, scale, b, t, h)
    out[b, t, h] = p @ v[b, seen, h]
  return out


def attention_gradients(q, k, v, scale, segments, do):
  """(dq, dk, dv) of sum(o * do)."""
  dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
  for b, t, h in np.ndindex(q.shape[:3]):
    seen, p = _weights(q, k, segments, scale, b, t, h)
    dp = v[b, seen, h] @ do[b, t, h]
    ds = p * (dp - p @ dp) * scale
    for s, p_s, ds_s in zip(seen, p, ds):
      dv[b, s, h] += p_s * do[b, t, h]
      dq[b, t, h] += ds_s * k[b, s, h]
      dk[b, s, h] += ds_s * q[b, t, h]
  return dq, dk, dv


def cross_entropy(h, w, target, weight):
  """(loss, correct, dh, dw) of sum weight * -log softmax(h w)[target]."""
  loss, correct = 0.0, 0.0
  dh, dw = np.zeros_like(h), np.zeros_like(w)
  for row, label, by in zip(range(len(h)), target, weight):
    logits = h[row] @ w
    e = np.exp(logits - logits.max())
    p = e / e.sum()
    loss += by * (np.log(e.sum()) + logits.max() - logits[label])
    correct += by * (logits.argmax() == label)
    p[label] -= 1
    dh[row] = by * (w @ p)
    dw += by * np.outer(h[row], p)
  return loss, correct, dh, dw
