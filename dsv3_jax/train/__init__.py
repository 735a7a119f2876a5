"""Training (report 4.2 to 4.4): `run` is the whole of it, the other modules are its parts."""

from dsv3_jax.train.loop import RunResult, run

__all__ = ["RunResult", "run"]
