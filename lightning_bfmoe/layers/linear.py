"""All experts' linear maps over one shared matrix."""

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import ShapeError
from lightning_bfmoe.functional.activation_quant import check_bits, quantize_activations
from lightning_bfmoe.functional.butterfly import apply_butterfly
from lightning_bfmoe.functional.routing import ExpertGroups, group_by_expert
from lightning_bfmoe.kernels import PackedLinear, packed_linear, rotate
from lightning_bfmoe.layers.coded import gain_values
from lightning_bfmoe.layers.precision import KeepsFloat32
from lightning_bfmoe.layers.rotation import Rotation
from lightning_bfmoe.layers.substrate import PackedSubstrate, Substrate


class ButterflyLinear(KeepsFloat32):
    r"""y = diag(g_out_i) B(phi_i) diag(alpha) T B(theta_i)^T diag(g_in_i) x + b for expert i.

    All rows of all experts go through ONE matrix product with the shared matrix; only the
    rotations before and behind it differ by expert.

    Args:
        d_in: Width of the input.
        d_out: Width of the output.
        num_experts: Experts.
        bias: One bias, shared by all experts.
        gains: Per-expert diagonal gains on both sides, all ones at the start.
        stages: Stages a rotation; all when None.
        angle_std: Standard deviation of the initial angles (radians).
        scale: Ternary scale, see `functional.ternarize`.
        granularity: `row` or `tensor`.
        activation_bits: Width of the integers that enter the shared matrix, blended in with lambda
            (`functional.quantize_activations`); None leaves them as they are.
        generator: Draws latent weights and angles.
        device: Where parameters live.

    Source: arXiv 2601.13563, W_i = B(phi_i) W_base B(theta_i)^T; gains and bias ours.
    """

    substrate: Substrate | PackedSubstrate
    gain_in: Tensor | None  # in a packed layer at 8 bit a `CodedNumbers`, see `gain_values`
    gain_out: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        d_in: int,
        d_out: int,
        num_experts: int,
        *,
        bias: bool = True,
        gains: bool = False,
        stages: int | None = None,
        angle_std: float = 0.5,
        scale: str = "lstsq",
        granularity: str = "row",
        activation_bits: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation_bits is not None:
            check_bits(activation_bits)
        self.d_in, self.d_out, self.num_experts = d_in, d_out, num_experts
        self.activation_bits = activation_bits
        self.substrate = Substrate(
            d_out, d_in, scale=scale, granularity=granularity, generator=generator, device=device
        )

        def rotation(d: int) -> Rotation:
            full = None if stages is None else min(stages, Rotation(d, 1).stages)
            return Rotation(
                d, num_experts, stages=full, angle_std=angle_std, generator=generator, device=device
            )

        self.rotate_in, self.rotate_out = rotation(d_in), rotation(d_out)
        for name, d in (("gain_in", d_in), ("gain_out", d_out)):
            gain = nn.Parameter(torch.ones(num_experts, d, device=device)) if gains else None
            self.register_parameter(name, gain)  # (experts, d)
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(d_out, device=device)) if bias else None
        )

    def forward(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        """Rows (rows, d_in), sorted by expert, to (rows, d_out) in the dtype of `x`."""
        numbers = self.packed_numbers()
        if numbers is None:
            return self._parts(x, groups)
        return packed_linear(x, groups, numbers, self._parts)

    def packed_numbers(self) -> PackedLinear | None:
        """What a fused kernel takes; None when this is no packed layer that computes in one go.

        That is one in training form, one that keeps nothing decoded, one that rounds activations.
        """
        substrate = self.substrate
        if isinstance(substrate, Substrate) or not substrate.keeps or self.activation_bits:
            return None
        return PackedLinear(
            substrate.packed,
            substrate.alpha,
            self.d_in,
            self.d_out,
            substrate.bits,
            self.rotate_in.angles,
            self.rotate_out.angles,
            None if self.gain_in is None else gain_values(self.gain_in),
            None if self.gain_out is None else gain_values(self.gain_out),
            self.bias,
        )

    def _parts(self, x: Tensor, groups: ExpertGroups) -> Tensor:
        if self.gain_in is not None:
            x = x * gain_values(self.gain_in).to(x.dtype).index_select(0, groups.expert)
        x = self.rotate_in(x, groups, inverse=True)  # (rows, d_in)
        if self.activation_bits is not None:
            x = quantize_activations(x, self.activation_bits, self.substrate.blend)
        y = self.substrate.linear(x)  # (rows, d_out)
        y = self.rotate_out(y, groups)
        if self.gain_out is not None:
            y = y * gain_values(self.gain_out).to(y.dtype).index_select(0, groups.expert)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def load_dense_(self, weight: Tensor, bias: Tensor | None = None) -> "ButterflyLinear":
        """Take over a dense weight: with equal angles every expert computes it exactly at lambda 0.

        Writes the latent matrix B(phi)^T W B(theta) with the experts' mean angles phi and theta;
        an expert whose angles differ computes a rotation of W that is as near as its angles are.

        Args:
            weight: (d_out, d_in).
            bias: (d_out,) or None.

        Raises:
            ShapeError: Shapes do not fit, or a bias comes to a layer that has none.
        """
        if tuple(weight.shape) != (self.d_out, self.d_in):
            raise ShapeError(
                f"this layer maps {self.d_in} -> {self.d_out}, "
                f"so its weight is ({self.d_out}, {self.d_in})",
                got=tuple(weight.shape),
                fix="Transpose a Conv1D-style weight first.",
            )
        if bias is not None and self.bias is None:
            raise ShapeError(
                "a bias needs a layer that has one", got="bias=False", fix="Build with bias=True."
            )
        if isinstance(self.substrate, PackedSubstrate):
            raise ShapeError(
                "weights are loaded into a latent substrate",
                got="a packed one",
                fix="Build a new layer, load it, then pack that.",
            )
        latent = self.substrate.latent
        device = latent.device
        wide = weight.detach().to(device, torch.float64)
        theta, phi = (r.angles.double().mean(dim=0) for r in (self.rotate_in, self.rotate_out))
        # B^T applied to each row of a matrix is the matrix times B
        wide = _rotate_all(wide, theta.to(device))  # W B(theta)
        wide = _rotate_all(wide.T, phi.to(device)).T  # B(phi)^T W B(theta)
        latent.copy_(wide)
        if self.bias is not None:
            self.bias.zero_() if bias is None else self.bias.copy_(bias)
        return self

    def expert_weight(self, expert: int) -> Tensor:
        """The dense matrix W_i of one expert, (d_out, d_in); for reading and merging."""
        theta, phi = self.rotate_in.angles[expert].float(), self.rotate_out.angles[expert].float()
        weight = apply_butterfly(self.substrate.weight(), theta)  # T B(theta)^T: B on each row
        weight = apply_butterfly(weight.T, phi).T
        if self.gain_in is not None and self.gain_out is not None:
            left, right = gain_values(self.gain_out)[expert], gain_values(self.gain_in)[expert]
            weight = left.unsqueeze(1) * weight * right
        return weight

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"{self.d_in} -> {self.d_out}, num_experts={self.num_experts}"


def _rotate_all(rows: Tensor, angles: Tensor) -> Tensor:
    """B(angles)^T on each row, through the fast kernel: all rows belong to one expert."""
    one = group_by_expert(torch.zeros(rows.shape[0], 1, dtype=torch.int64, device=rows.device), 1)
    return rotate(rows, angles.unsqueeze(0), one, inverse=True)
