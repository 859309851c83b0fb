"""Which files pytest cannot import here: kernels whose compiler is not installed."""

import importlib.util

collect_ignore_glob = []
if importlib.util.find_spec("triton") is None:
    collect_ignore_glob.append("lightning_bfmoe/kernels/triton_*.py")
