"""What the training step asks of XLA on GPUs."""

# The latency-hiding scheduler starts an all-to-all as early as possible and awaits it as late as
# possible; without it each is awaited where it starts.
OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}
