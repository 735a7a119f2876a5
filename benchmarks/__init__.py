"""Benchmarks: ours and a peer in one run, alternating. See README.md."""
