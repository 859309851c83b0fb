"""Examples: run them from the repository root with ``python -m examples.quickstart``."""
