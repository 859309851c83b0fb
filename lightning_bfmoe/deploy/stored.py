"""What one stored tensor of a packed layer must look like."""

from typing import NamedTuple

FLOATS = ("F32", "F16", "BF16")


class Stored(NamedTuple):
    """Safetensors dtypes that are allowed, shape, part (`format.PARTS`)."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    part: str
