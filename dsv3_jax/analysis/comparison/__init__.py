"""Runs and records side by side: gathered, grouped into arms, tested, doubted, shown."""
