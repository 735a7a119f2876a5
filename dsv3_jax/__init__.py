"""DeepSeek-V3, the whole system, in JAX. Start with README.md."""

__version__ = "0.1.0"
