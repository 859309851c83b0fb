"""The learned rotation of every expert at one side of a matrix: one stacked tensor of angles."""

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.butterfly import check_stages, num_pairs
from lightning_bfmoe.functional.routing import ExpertGroups
from lightning_bfmoe.kernels import rotate
from lightning_bfmoe.layers.precision import KeepsFloat32


class Rotation(KeepsFloat32):
    """B(theta_i) for all experts i of a layer.

    Example:
        >>> Rotation(512, num_experts=8).angles.shape
        torch.Size([8, 9, 256])

    Args:
        d: Width, >= 2.
        num_experts: Experts, stacked in the first axis of `angles`.
        stages: Stages a rotation; all when None.
        base_angle: Angle shared by all experts at the start (radians): 0 is the identity, pi/4
            a Hadamard-like matrix.
        angle_std: Standard deviation around it (radians).
        generator: Draws the angles.
        device: Where they live.

    Source: arXiv 2601.13563; one stacked tensor (so that an expert without tokens still has a
    gradient under DDP) ours.
    """

    angles: Tensor

    def __init__(
        self,
        d: int,
        num_experts: int,
        *,
        stages: int | None = None,
        base_angle: float = 0.0,
        angle_std: float = 0.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.d, self.num_experts, self.stages = d, num_experts, check_stages(d, stages)
        shape = (num_experts, self.stages, num_pairs(d))
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        self.angles = nn.Parameter(
            (base_angle + angle_std * noise).to(device)
        )  # (experts, stages, pairs)

    def forward(self, x: Tensor, groups: ExpertGroups, inverse: bool = False) -> Tensor:
        """Rotate rows (rows, d), sorted by expert, each by its expert's B or B^T."""
        angles = self.angles
        # packed: widen, and on a GPU tabulate, the angles of the chosen experts only
        if is_few(x, self.num_experts) and (angles.dtype.itemsize < 4 or is_frozen_on_gpu(angles)):
            angles, groups = angles[groups.expert], each_alone(groups)
        return rotate(x, angles, groups, inverse)

    def freeze(self, dtype: torch.dtype = torch.float16) -> "Rotation":
        """Turn the angles into a buffer of `dtype`, wrapped to (-pi, pi]; in place.

        Raises:
            ConfigError: Not float16, bfloat16 or float32.
        """
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ConfigError(
                "stored angles are float16, bfloat16 or float32",
                got=dtype,
                fix="Use torch.float16.",
            )
        angles = self.angles.detach()
        if dtype != torch.float32:  # a narrow format spends its bits best near zero
            turns = torch.round(angles.double() / (2 * torch.pi))
            angles = angles.double() - 2 * torch.pi * turns
        del self.angles
        self.register_buffer("angles", angles.to(dtype))
        return self

    def extra_repr(self) -> str:
        """Sizes shown by `print(model)`."""
        return f"d={self.d}, num_experts={self.num_experts}, stages={self.stages}"


def is_few(x: Tensor, num_experts: int) -> bool:
    """Whether gathering the angles row by row makes less work than those of all experts.

    Not in a compiled or exported graph, which serves all numbers of rows.
    """
    return x.shape[0] < num_experts and not torch.compiler.is_compiling()


def is_frozen_on_gpu(angles: Tensor) -> bool:
    """Whether the kernel makes a table of all these angles, and no gradient goes to them."""
    return angles.is_cuda and not angles.requires_grad


def each_alone(groups: ExpertGroups) -> ExpertGroups:
    """The same rows, each under an expert of its own: for angles gathered row by row.

    Example:
        >>> from lightning_bfmoe.functional.routing import group_by_expert
        >>> each_alone(group_by_expert(torch.tensor([[5, 5]]), 9)).counts.tolist()
        [1, 1]
    """
    rows = torch.arange(groups.expert.shape[0], device=groups.expert.device)
    return ExpertGroups(groups.order, rows, torch.ones_like(rows))
