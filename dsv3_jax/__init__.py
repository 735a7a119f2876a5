"""DeepSeek-V3 in JAX; see README.md for a map from the technical report's sections to files."""

__version__ = "0.1.0"
