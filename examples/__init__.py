"""Examples: run them from the repository root with ``python -m examples.quickstart``."""

import os

# Two threads of a small model wait for each other many times a step. By default they do it
# spinning, which on a busy machine takes five times longer. Read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
