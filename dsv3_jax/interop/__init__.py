"""Reading and writing other projects' formats; imports config, model and fp8 only."""
