"""Implementations in plain XLA operations: any platform, no accelerator assumed."""
