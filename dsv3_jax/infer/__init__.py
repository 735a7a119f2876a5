"""Inference: latent cache, absorbed decoding, speculation, serving, and where experts lie (3.4)."""
