"""FP8 training (report 3.3)."""
