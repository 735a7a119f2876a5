"""What a run costs: parameters, FLOPs, memory, traffic, time, money. Without jax."""
