"""The compiled CPU kernels (`csrc/`): where the library is, and whether it can be used.

It is built when the package is installed and a C++ compiler is there (`hatch_build.py`), and looked
up when it is first wanted; without it the other kernels run. The environment variable
`BFMOE_CPU_LIBRARY` names another file, or is empty to do without.
"""

import ctypes
import os
import sys
import threading
import warnings
from pathlib import Path

from lightning_bfmoe.errors import BFMoEError

ABI_VERSION = 2  # that of csrc/rotate.cpp
BUILT = Path(__file__).with_name(
    "_bfmoe_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
)

_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ROTATE = [_SIZE, _SIZE, _FLAG, _SIZE]  # rows, experts, inverse, threads
_INTERFACE: dict[str, tuple[list, type | None]] = {
    "bfmoe_combine": ([_POINTER] * 4 + [_SIZE] * 4, _FLAG),
    "bfmoe_combine_backward": ([_POINTER] * 6 + [_SIZE] * 4, _FLAG),
    "bfmoe_cpu_level": ([], _FLAG),
    "bfmoe_plan": ([_SIZE, _SIZE], _POINTER),
    "bfmoe_rotate_f32": ([_POINTER] * 5 + _ROTATE, _FLAG),
    "bfmoe_rotate_f64": ([_POINTER] * 5 + _ROTATE, _FLAG),
    "bfmoe_rotate_backward_f32": ([_POINTER] * 7 + _ROTATE, _FLAG),
    "bfmoe_rotate_backward_f64": ([_POINTER] * 7 + _ROTATE, _FLAG),
    "bfmoe_quantize": ([_POINTER] * 3 + [_SIZE, _SIZE, ctypes.c_float, _SIZE], None),
    "bfmoe_quantize_scaled": ([_POINTER] * 3 + [_SIZE, _SIZE, ctypes.c_float, _SIZE], None),
    "bfmoe_ternary_bytes": ([_SIZE, _SIZE], _SIZE),
    "bfmoe_ternary_lay_out": ([_POINTER, _SIZE, _SIZE, _POINTER], None),
    "bfmoe_packed_linear": (
        [_POINTER, _POINTER, _SIZE] + [_POINTER] * 7 + [_FLAG] + [_POINTER] * 3 + [_SIZE] * 3,
        _FLAG,
    ),
    "bfmoe_ternary_linear": ([_POINTER, _POINTER, _SIZE, _POINTER, _POINTER] + [_SIZE] * 4, None),
}

_lock = threading.Lock()
_found: tuple[ctypes.CDLL | None, str] | None = None


def find_library() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and why not; looked up once a process."""
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = load_library(Path(os.environ.get("BFMOE_CPU_LIBRARY", BUILT)))
    return _found


def library() -> ctypes.CDLL:
    """The library.

    Raises:
        BFMoEError: This installation has none.
    """
    found, reason = find_library()
    if found is None:
        raise BFMoEError(
            "the kernel 'cpu' needs its compiled library",
            got=reason,
            fix="Reinstall with a C++ compiler, or take another kernel.",
        )
    return found


def load_library(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """Load a compiled library and check that it speaks our interface.

    Args:
        path: The file; the empty path means none is wanted.

    Returns:
        The library and "", or None and the reason in a few words. A file that is there and cannot
        be used is also warned about: it is slower without, and easily repaired.
    """
    if path == Path():
        return None, "switched off by BFMOE_CPU_LIBRARY"
    if not path.exists():
        return None, "not compiled: no C++ compiler when the package was installed, or it failed"
    try:
        library = ctypes.CDLL(str(path.resolve()))
        version = library.bfmoe_abi_version()
        reason = f"it has interface version {version}, this package needs {ABI_VERSION}"
        if version == ABI_VERSION:
            for name, (arguments, result) in _INTERFACE.items():
                function = getattr(library, name)
                function.argtypes, function.restype = arguments, result
            return library, ""
    except (OSError, AttributeError) as error:
        reason = str(error).splitlines()[0]
    warnings.warn(
        f"the compiled CPU kernels {path.name} cannot be used, slower ones run: {reason}. "
        "Reinstall lightning-bfmoe to compile them again, or set BFMOE_CPU_LIBRARY= to do without.",
        RuntimeWarning,
        stacklevel=2,
    )
    return None, f"unusable: {reason}"


def missing_cpu() -> str:
    """Why the compiled library cannot be used; empty when it can."""
    return find_library()[1]


# A compiled graph takes the answer as a constant. This is `torch.compiler.assume_constant_result`,
# which would import torch._dynamo: 76 MB of resident memory (a test compares the two).
missing_cpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
