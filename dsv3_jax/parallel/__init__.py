"""Meshes and shardings (report 3.2): arrays and axis names, never a Module."""
