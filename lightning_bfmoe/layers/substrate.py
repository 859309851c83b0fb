"""The shared matrix of a layer: latent float32 in training, packed trits when deployed."""

import functools

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import ConfigError, ShapeError
from lightning_bfmoe.functional.packing import pack_trits, packed_size, unpack_trits
from lightning_bfmoe.functional.ternary import (
    check_finite,
    dequantize_ternary,
    ternarize,
)
from lightning_bfmoe.kernels import blend_to_ternary, ternary_linear
from lightning_bfmoe.layers.precision import KeepsFloat32


class Substrate(KeepsFloat32):
    r"""The one matrix that all experts rotate: diag(alpha) T, blended in from a latent weight.

    .. math:: W = w + \lambda\,(\alpha T - w)\texttt{.detach()}

    `blend` (lambda) is a plain 0-d float32 tensor: no buffer, so it is neither broadcast between
    ranks nor averaged nor rounded to bfloat16, and changing it never recompiles.

    Args:
        d_out: Rows.
        d_in: Columns.
        scale: `lstsq` or `absmean`, see `functional.ternarize`.
        granularity: `row` or `tensor`.
        generator: Draws the latent weights N(0, 1 / d_in).
        device: Where they live.

    Source: arXiv 2601.13563 (W_base); the blend and least-squares scale ours.
    """

    _plain_tensors = ("_blend",)

    def __init__(
        self,
        d_out: int,
        d_in: int,
        *,
        scale: str = "lstsq",
        granularity: str = "row",
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d_out, self.d_in, self.scale, self.granularity = d_out, d_in, scale, granularity
        latent = torch.randn(d_out, d_in, generator=generator, dtype=torch.float32) * d_in**-0.5
        self.latent = nn.Parameter(latent.to(device))  # (d_out, d_in)
        self._blend = torch.ones((), dtype=torch.float32, device=self.latent.device)

    @property
    def blend(self) -> Tensor:
        """Lambda, 0-d float32 in [0, 1]: 0 uses the latent weight, 1 the ternary one."""
        return self._blend

    def set_blend(self, value: float) -> None:
        """Set lambda in place.

        Raises:
            ConfigError: Outside [0, 1].
        """
        if not 0.0 <= float(value) <= 1.0:
            raise ConfigError(
                "blend (lambda) must lie in [0, 1]", got=value, fix="0 is latent, 1 is ternary."
            )
        self._blend.fill_(float(value))

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The effective matrix, (d_out, d_in), with a straight-through gradient to the latent.

        Quantised anew at every call: a write through `.data` or by a fused optimizer leaves no
        trace that a cache could see. A packed substrate, which nobody trains, keeps its matrix.
        """
        return blend_to_ternary(self.latent, self._blend, self.scale, self.granularity, dtype)

    def linear(self, x: Tensor) -> Tensor:
        """Rows (rows, d_in) times the effective matrix, (rows, d_out) in the dtype of `x`.

        Under autocast in autocast's dtype: the weight is made in it, not cast to it afterwards.
        """
        dtype, kind = x.dtype, x.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        return nn.functional.linear(x, self.weight(dtype))

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Trits (int8) and scales, as a packed layer would hold them.

        Raises:
            ShapeError: The latent weight holds NaN or infinite numbers.
        """
        check_finite(self.latent, "the substrate's latent weight")
        return ternarize(self.latent, self.scale, self.granularity)

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{self.d_in} -> {self.d_out}, scale={self.scale}, granularity={self.granularity}"


class PackedSubstrate(nn.Module):
    """A substrate as it is stored: trits at 1.6 or 2 bit, and row scales. No gradient.

    The dense matrix is unpacked once and kept. With `keeps` off it is unpacked at every use and
    thrown away: slower, in the memory of the packed bytes alone.

    Args:
        d_out: Rows.
        d_in: Columns.
        bits: `1.6` (5 trits a byte) or `2` (4 a byte).
        granularity: `row` or `tensor`.
    """

    packed: Tensor
    alpha: Tensor

    def __init__(self, d_out: int, d_in: int, bits: str = "1.6", granularity: str = "row") -> None:
        super().__init__()
        self.d_out, self.d_in, self.bits, self.granularity = d_out, d_in, bits, granularity
        rows = d_out if granularity == "row" else 1
        empty = pack_trits(torch.zeros(d_out, d_in, dtype=torch.int8), bits)
        self.register_buffer("packed", empty)  # (bytes,) uint8
        self.register_buffer("alpha", torch.zeros(rows, 1))  # (rows, 1) float32
        self._keeps = True
        self._cache: tuple[tuple, Tensor] | None = None

    @classmethod
    def from_substrate(
        cls, substrate: "Substrate | PackedSubstrate", bits: str = "1.6"
    ) -> "PackedSubstrate":
        """Pack the trits and scales of a trained substrate, exactly."""
        trits, alpha = substrate.ternary()
        return cls.from_ternary(trits, alpha, bits)

    @classmethod
    def from_ternary(cls, trits: Tensor, alpha: Tensor, bits: str = "1.6") -> "PackedSubstrate":
        """Pack given trits (int8, (d_out, d_in)) and scales ((d_out, 1) or (1, 1))."""
        d_out, d_in = trits.shape
        if tuple(alpha.shape) not in {(d_out, 1), (1, 1)}:
            raise ShapeError(
                f"scales of a {d_out} x {d_in} matrix have shape ({d_out}, 1) or (1, 1)",
                got=tuple(alpha.shape),
                fix="Use functional.ternarize().",
            )
        out = cls(d_out, d_in, bits, "row" if alpha.shape[0] == d_out and d_out > 1 else "tensor")
        out.packed = pack_trits(trits, bits)
        out.alpha = alpha.to(torch.float32)
        return out

    @property
    def blend(self) -> Tensor:
        """Always 1: there is no latent weight."""
        return torch.ones((), device=self.alpha.device)

    def set_blend(self, value: float) -> None:
        """Only 1 is possible.

        Raises:
            ConfigError: Any other value.
        """
        if float(value) != 1.0:
            raise ConfigError(
                "a packed substrate is ternary (lambda = 1)",
                got=value,
                fix="Train with the latent model, then pack it again.",
            )

    @property
    def keeps(self) -> bool:
        """Whether the dense matrix stays in memory between uses."""
        return self._keeps

    @keeps.setter
    def keeps(self, value: bool) -> None:
        self._keeps = value
        if not value:
            self._cache = None

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix diag(alpha) T in `dtype`; in an exported graph it is unpacked at every use."""
        if not self.keeps or is_exporting():
            return self._unpacked(dtype)
        if torch.compiler.is_dynamo_compiling():
            from lightning_bfmoe.layers.eager import call_eagerly

            return call_eagerly(self._kept, dtype)
        return self._kept(dtype)

    def _kept(self, dtype: torch.dtype) -> Tensor:
        key = (dtype, *trace(self.packed), *trace(self.alpha))
        if self._cache is None or self._cache[0] != key:
            with torch.inference_mode(False):  # an inference tensor could not be reused in training
                self._cache = (key, dequantize_ternary(*self.ternary(), dtype))
        return self._cache[1]

    def linear(self, x: Tensor) -> Tensor:
        """Rows (rows, d_in) times the matrix; a few rows on the CPU straight from the trits."""
        if not self.keeps:
            return nn.functional.linear(x, self.weight(x.dtype))
        return ternary_linear(x, self.packed, self.alpha, self.d_out, self.bits, self.weight)

    def _unpacked(self, dtype: torch.dtype) -> Tensor:
        """The matrix from bytes that have been checked: nothing here waits for a GPU."""
        # what is made while a graph is traced is no tensor to keep
        table = (_digits if torch.compiler.is_compiling() else _kept_digits)(
            self.bits, dtype, self.packed.device
        )
        trits = nn.functional.embedding(self.packed.int(), table)  # (bytes, trits of a byte)
        weight = trits.reshape(-1)[: self.d_out * self.d_in].reshape(self.d_out, self.d_in)
        return weight.mul_(self.alpha)

    def ternary(self) -> tuple[Tensor, Tensor]:
        """Trits (int8) and scales."""
        return unpack_trits(self.packed, (self.d_out, self.d_in), self.bits), self.alpha

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move, but keep the scales float32: a rounded scale would be another model."""
        self._cache = None
        alpha = self.alpha
        super()._apply(fn, recurse)
        if self.alpha.dtype != alpha.dtype:
            self.alpha = alpha.to(self.alpha.device)
        return self

    def __getstate__(self) -> dict:
        """Leave the cached matrix behind when copied or pickled."""
        return {**self.__dict__, "_cache": None}

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        size = packed_size(self.d_out * self.d_in, self.bits)
        return f"{self.d_in} -> {self.d_out}, {self.bits} bit, {size} bytes"


def trace(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is replaced or written to in place."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def is_exporting() -> bool:
    """Whether torch.export traces, where tensors have no addresses and no numbers."""
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _digits(bits: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The trits of every byte, (256, trits of a byte)."""
    per_byte, base = (5, 3) if bits == "1.6" else (4, 4)
    value = torch.arange(256, device=device).unsqueeze(1)
    digit = value // base ** torch.arange(per_byte, device=device) % base
    return (digit - 1).to(dtype)


_kept_digits = functools.lru_cache(maxsize=16)(_digits)
