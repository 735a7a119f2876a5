"""Rewards: how an answer is judged (report 5.2)."""
