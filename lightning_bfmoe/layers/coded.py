"""Stored numbers as codes: a packed layer's angles and gains at 8 or 4 bit."""

import torch
from torch import Tensor, nn

from lightning_bfmoe.functional.codes import (
    check_codes,
    code_bytes,
    decode_codes,
    encode_codes,
    pack_nibbles,
    unpack_nibbles,
)
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels import rotate
from lightning_bfmoe.layers.rotation import each_alone, is_few
from lightning_bfmoe.layers.substrate import is_exporting, trace


class CodedNumbers(nn.Module):
    """Rows of numbers as 8- or 4-bit codes with a scale each (`functional.codes`). No gradient.

    The codes are the state; the float32 numbers are decoded once and kept until the codes change.
    With `keeps` off they are decoded at every use and thrown away: the memory of the codes alone.

    Example:
        >>> CodedNumbers.of(torch.randn(8, 9, 256), bits=4).codes.shape
        torch.Size([8, 9, 128])

    Args:
        shape: Shape of the numbers, rows last.
        bits: 8 or 4.
        offset: What code 0 stands for: 0 for angles, 1 for gains.
        device: Where they live.
    """

    codes: Tensor
    scales: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        bits: int,
        offset: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.bits, self.offset = tuple(shape), bits, offset
        self._keeps = True
        stored = (*self.shape[:-1], code_bytes(self.shape[-1], bits))
        empty = torch.zeros(self.shape if bits == 8 else stored, dtype=torch.int8, device=device)
        self.register_buffer("codes", empty if bits == 8 else empty.to(torch.uint8) + 136)
        scales = torch.zeros(self.shape[:-1], dtype=torch.float16, device=device)
        self.register_buffer("scales", scales)
        self._cache: tuple[tuple, Tensor] | None = None

    @classmethod
    def of(cls, values: Tensor, bits: int, offset: float = 0.0) -> "CodedNumbers":
        """Encode numbers."""
        coded = cls(tuple(values.shape), bits, offset)
        codes, coded.scales = encode_codes(values, bits, offset)
        coded.codes = codes if bits == 8 else pack_nibbles(codes)
        return coded

    @property
    def keeps(self) -> bool:
        """Whether what has been decoded stays in memory between uses."""
        return self._keeps

    @keeps.setter
    def keeps(self, value: bool) -> None:
        self._keeps = value
        if not value:
            self._cache = None

    @property
    def values(self) -> Tensor:
        """The numbers, float32."""
        return self._decoded()

    def _decoded(self) -> Tensor:
        if not self.keeps or is_exporting():
            return self._decode(self.codes, self.scales)
        if torch.compiler.is_dynamo_compiling():
            from lightning_bfmoe.layers.eager import call_eagerly

            return call_eagerly(self._kept)
        return self._kept()

    def _kept(self) -> Tensor:
        key = (*trace(self.codes), *trace(self.scales))
        if self._cache is None or self._cache[0] != key:
            with torch.inference_mode(False):  # an inference tensor could not be used in training
                self._cache = (key, self._decode(self.codes, self.scales))
        return self._cache[1]

    def _decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        if self.bits == 4:
            codes = unpack_nibbles(codes, self.shape[-1])
        return decode_codes(codes, scales, self.offset)

    def check(self) -> None:
        """Raises `PackedFileError` unless every code and scale is one that is written."""
        check_codes(self.codes, self.scales, self.shape[-1], self.bits)

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move, but keep the dtypes: a rounded scale would be another model."""
        self._cache = None
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def __getstate__(self) -> dict:
        """Leave the decoded numbers behind when copied or pickled."""
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"shape={self.shape}, {self.bits} bit"


class CodedRotation(CodedNumbers):
    """B(theta_i) for all experts i of a packed layer, its angles as codes, a scale a stage.

    Example:
        >>> CodedRotation((8, 9, 256), bits=8).angles.shape
        torch.Size([8, 9, 256])
    """

    @property
    def angles(self) -> Tensor:
        """The angles, (experts, stages, pairs) float32."""
        return self._decoded()

    @property
    def stages(self) -> int:
        """Stages of each rotation (count)."""
        return self.shape[1]

    def forward(self, x: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
        """Rotate rows (rows, d), sorted by expert, each by its expert's B or B^T."""
        if is_few(x, self.shape[0]) and (not self.keeps or self.codes.is_cuda):
            rows = groups.expert
            if self.keeps:
                chosen = self.angles[rows]
            else:
                chosen = self._decode(self.codes[rows], self.scales[rows])
            return rotate(x, chosen, each_alone(groups), inverse)
        return rotate(x, self.angles, groups, inverse)


def gain_values(gain: Tensor | CodedNumbers) -> Tensor:
    """Gains, (experts, d), of a trained or a packed layer."""
    return gain.values if isinstance(gain, CodedNumbers) else gain
