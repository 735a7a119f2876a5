"""What a run costs: parameters, FLOPs, memory, traffic, time, money. Without jax.

    from dsv3_jax.cost import estimate, hardware
    found = estimate(config, hardware.get("h800"))     # a step: found.step, found.breakdown
    budget.training(config, hw, extended=False)        # GPU-hours and dollars

hardware (devices and the shares of their peaks that are reached), operations (kernels of a layer),
timing (their seconds), communication (bytes and seconds between devices), step (the schedule),
budget (whole trainings), whatif, cluster (numbers of devices), check (against the report);
memory (of this code's program, from arrays, kept, work, pipe), needed (of any that follows the
plan), plan (the fastest that fits, from space).
"""

from dsv3_jax.cost.step import Estimate, estimate

__all__ = ["Estimate", "estimate"]
