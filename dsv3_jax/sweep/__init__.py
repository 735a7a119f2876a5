"""Many runs: the arms of an ablation, run and followed. Nothing here imports jax.

arm (one run of a sweep), pool (the folder, what is noted of an arm, who has it), corpus (text that
arms share), job (one start of one arm, on whichever machine), local, slurm and ray_jobs (who starts
jobs), rows (what the arms have come to), runner (which arm when), progress (where a run stands,
from its files), estimate and calibrate (how long it takes), table and watch (what a person sees).
"""
