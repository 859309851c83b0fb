"""Which files pytest cannot import here: kernels whose compiler is not installed."""

import importlib.util

collect_ignore = []
if importlib.util.find_spec("triton") is None:
    collect_ignore.append("lightning_bfmoe/kernels/triton_rotation.py")
