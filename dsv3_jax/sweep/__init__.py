"""Many runs: the arms of an ablation, run and followed."""
