"""Packed layers rewritten with the opaque ops and plain tensor operations, ready for export."""

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.onnx_export.ops import code_trits, product, rotate_rows
from lightning_bfmoe.errors import PackedFileError
from lightning_bfmoe.functional.activation_quant import round_rows
from lightning_bfmoe.layers import (
    ButterflyExperts,
    ButterflyLinear,
    ButterflyMoE,
    CodedNumbers,
    CodedRotation,
    PackedSubstrate,
    Rotation,
    TopKRouter,
)


class ExportedRotation(nn.Module):
    """`layers.Rotation` on rows in any order, with its numbers as they are stored.

    Args:
        rotation: Of a packed layer.
        d: Width of the rows.
        inverse: Apply B^T.
    """

    angles: Tensor
    scales: Tensor

    def __init__(self, rotation: Rotation | CodedRotation, d: int, *, inverse: bool) -> None:
        super().__init__()
        self.d, self.inverse = d, inverse
        if isinstance(rotation, CodedRotation):
            angles, scales = rotation.codes, rotation.scales
        else:
            angles, scales = rotation.angles.detach(), torch.zeros(0, dtype=torch.float16)
        self.register_buffer("angles", angles)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Rows (rows, d), each by its expert's rotation."""
        y: Tensor = rotate_rows(x, ids, self.angles, self.scales, self.d, self.inverse)
        return y


class ExportedLinear(nn.Module):
    """`layers.ButterflyLinear` on rows in any order, with the expert of each.

    Args:
        linear: Of a packed layer.
    """

    codes: Tensor
    alpha: Tensor
    bias: Tensor | None

    def __init__(self, linear: ButterflyLinear) -> None:
        super().__init__()
        self.d_in, self.activation_bits = linear.d_in, linear.activation_bits
        self.rotate_in = ExportedRotation(linear.rotate_in, linear.d_in, inverse=True)
        self.rotate_out = ExportedRotation(linear.rotate_out, linear.d_out, inverse=False)
        assert isinstance(linear.substrate, PackedSubstrate)
        trits, alpha = linear.substrate.ternary()
        self.register_buffer("codes", code_trits(trits))
        self.register_buffer("alpha", alpha.float())
        self.gain_in, self.gain_out = _gain(linear.gain_in), _gain(linear.gain_out)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """Rows (rows, d_in) to (rows, d_out)."""
        if self.gain_in is not None:
            x = x * self.gain_in(ids)
        x = self.rotate_in(x, ids)
        # at 8 bit the product rounds its input itself
        if self.activation_bits is not None and self.activation_bits != 8:
            x = round_rows(x, self.activation_bits)
        y: Tensor = self.rotate_out(product(x, self.codes, self.alpha, self.d_in), ids)
        if self.gain_out is not None:
            y = y * self.gain_out(ids)
        return y if self.bias is None else y + self.bias


class ExportedGain(nn.Module):
    """A table of gains, of which the graph decodes the rows it needs."""

    gains: Tensor
    scales: Tensor | None

    def __init__(self, gain: Tensor | CodedNumbers) -> None:
        super().__init__()
        if isinstance(gain, CodedNumbers):
            gains, scales = gain.codes, gain.scales
        else:
            gains, scales = gain.detach(), None
        self.register_buffer("gains", gains)
        self.register_buffer("scales", scales)

    def forward(self, ids: Tensor) -> Tensor:
        """(rows, d) float32."""
        rows = self.gains.index_select(0, ids).float()
        if self.scales is None:
            return rows
        return rows * self.scales.index_select(0, ids).float().unsqueeze(-1) + 1


class ExportedExperts(nn.Module):
    """`layers.ButterflyExperts` without sorting: the opaque ops take rows in any order.

    Args:
        experts: A packed layer.
    """

    def __init__(self, experts: ButterflyExperts) -> None:
        super().__init__()
        self.activation = experts.activation
        self.up = ExportedLinear(experts.up)
        self.gate = None if experts.gate is None else ExportedLinear(experts.gate)
        self.down = (
            ExportedLinear(experts.down)
            if isinstance(experts.down, ButterflyLinear)
            else experts.down.float()
        )

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Tokens (tokens, d_model), their experts and weights, both (tokens, k)."""
        k = experts.shape[1]
        ids = experts.reshape(-1)
        rows = x.unsqueeze(1).expand(-1, k, -1).reshape(-1, x.shape[1])  # (tokens * k, d_model)
        if self.gate is None:
            hidden = self.activation(self.up(rows, ids))
        else:
            hidden = self.activation(self.gate(rows, ids)) * self.up(rows, ids)
        if isinstance(self.down, ExportedLinear):
            return _combine(self.down(hidden, ids), weights)
        y: Tensor = self.down(_combine(hidden, weights))
        return y


class ExportedMoE(nn.Module):
    """`layers.ButterflyMoE` in eval mode.

    Args:
        layer: A packed layer.
    """

    router: Tensor
    balance_bias: Tensor

    def __init__(self, layer: ButterflyMoE) -> None:
        super().__init__()
        router = layer.router
        assert isinstance(router, TopKRouter)
        self.top_k, self.d_model, self.d_out = router.top_k, layer.d_model, layer.d_out
        self.experts = ExportedExperts(layer.experts)
        self.correction = None if layer.correction is None else layer.correction.float()
        self.register_buffer("router", router.weight.detach().float())  # (experts, d_model)
        self.register_buffer("balance_bias", router.balance_bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., d_model) to (..., d_out)."""
        tokens = x.reshape(-1, self.d_model)
        logits = nn.functional.linear(tokens, self.router)
        chosen = torch.topk(logits.sigmoid() + self.balance_bias, self.top_k, dim=-1).indices
        weights = logits.gather(-1, chosen).softmax(dim=-1)  # (tokens, k)
        y: Tensor = self.experts(tokens, chosen, weights)
        if self.correction is not None:
            y = y + self.correction(tokens)
        return y.reshape(*x.shape[:-1], self.d_out)


def replace_layers(model: nn.Module) -> int:
    """Puts the exported form of every packed layer in its place; returns how many.

    Raises:
        PackedFileError: A layer is still latent, or the model itself is the layer.
    """
    memo: dict[int, nn.Module] = {}
    if isinstance(model, ButterflyMoE | ButterflyExperts):
        raise PackedFileError(
            "an exported model holds its layers in submodules",
            got=type(model).__name__,
            fix="Wrap it: torch.nn.Sequential(layer).",
        )

    def visit(parent: nn.Module) -> None:
        for name, child in list(parent._modules.items()):
            if isinstance(child, ButterflyMoE | ButterflyExperts):
                if id(child) not in memo:
                    memo[id(child)] = _exported(child)
                parent._modules[name] = memo[id(child)]
            elif child is not None:
                visit(child)

    visit(model)
    return len(memo)


def _exported(layer: ButterflyMoE | ButterflyExperts) -> nn.Module:
    return ExportedMoE(layer) if isinstance(layer, ButterflyMoE) else ExportedExperts(layer)


def _gain(gain: Tensor | CodedNumbers | None) -> ExportedGain | None:
    return None if gain is None else ExportedGain(gain)


def _combine(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows (tokens * k, d) weighted and added up to (tokens, d)."""
    slots = rows.reshape(-1, weights.shape[1], rows.shape[1])
    return (slots * weights.unsqueeze(-1)).sum(dim=1)
