"""`python -m dsv3_jax.cli`, the same as `dsv3`."""

from dsv3_jax.cli import main

main()
