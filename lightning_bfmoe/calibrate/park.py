"""Finished layers wait as packed trits, so that a model and all its new layers fit into memory."""

import torch
from torch import Tensor

from lightning_bfmoe.functional.packing import pack_trits, unpack_trits
from lightning_bfmoe.layers import ButterflyExperts, ButterflyMoE, Substrate


class Parked:
    """A calibrated layer whose latents, which lie on a grid, are held as trits and row scales.

    `unpark` gives back the very same layer with bit-equal latents.

    Example:
        >>> layer = ButterflyExperts(8, 16, num_experts=2)
        >>> with torch.no_grad():
        ...     _ = layer.up.substrate.latent.sign_()
        ...     _ = layer.down.substrate.latent.sign_()
        >>> parked = Parked(layer)
        >>> layer.up.substrate.latent.numel(), parked.unpark().up.substrate.latent.shape
        (0, torch.Size([16, 8]))

    Args:
        layer: Each row of its latents holds one magnitude and zeros.
    """

    def __init__(self, layer: ButterflyMoE | ButterflyExperts) -> None:
        self.layer = layer
        self.held: list[tuple[Substrate, Tensor, Tensor, torch.Size]] = []
        experts = layer.experts if isinstance(layer, ButterflyMoE) else layer
        for linear in experts.linears().values():
            substrate = linear.substrate
            assert isinstance(substrate, Substrate)
            latent = substrate.latent.detach()
            trits = pack_trits(latent.sign().to(torch.int8), "2")
            scale = latent.abs().amax(dim=1, keepdim=True)  # (d_out, 1)
            self.held.append((substrate, trits, scale, latent.shape))
            substrate.latent.data = latent.new_zeros(0)

    def unpark(self) -> ButterflyMoE | ButterflyExperts:
        """The layer, whole again; once."""
        for substrate, trits, scale, shape in self.held:
            rows = unpack_trits(trits, tuple(shape), "2").to(scale.dtype)
            substrate.latent.data = rows.mul_(scale)
        self.held.clear()
        return self.layer
