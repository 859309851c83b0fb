r"""The whole method in one place: slow, dense, in the paper's symbols. The oracle of every test.

Expert i of a layer is a rotated view of ONE shared ternary matrix T (arXiv 2601.13563):

.. math:: W_i = \mathrm{diag}(g^{out}_i)\; B(\varphi_i)\; \mathrm{diag}(\alpha)\; T\;
          B(\theta_i)^T\; \mathrm{diag}(g^{in}_i)

and a token x with the chosen experts S(x) and routing weights w_i(x), summing to 1, becomes

.. math:: y = \sum_{i \in S(x)} w_i(x)\; W^{down}_i\, a(W^{up}_i x + b^{up}) + b^{down}

(gated: :math:`a(W^{gate}_i x + b^{gate}) \odot (W^{up}_i x + b^{up})`). Nothing here is fast: every
expert's matrix is formed in full, and tokens are visited one by one. Read this file first.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_bfmoe.functional.butterfly import butterfly_matrix
from lightning_bfmoe.functional.ternary import dequantize_ternary, ternarize


@dataclass
class OrbitMatrix:
    """One shared matrix and the angles that turn it into N experts' matrices."""

    w: Float[Tensor, "d_out d_in"]  # latent weight; T and alpha come from it
    theta: Float[Tensor, "experts stages_in pairs_in"]  # input angles, radians
    phi: Float[Tensor, "experts stages_out pairs_out"]  # output angles, radians
    gain_in: Float[Tensor, "experts d_in"] | None = None
    gain_out: Float[Tensor, "experts d_out"] | None = None
    bias: Float[Tensor, " d_out"] | None = None
    lam: float = 1.0  # lambda: 0 latent, 1 ternary
    scale: str = "lstsq"
    granularity: str = "row"

    def shared(self) -> Float[Tensor, "d_out d_in"]:
        """diag(alpha) T, or its blend with the latent weight; straight-through gradient."""
        t, alpha = ternarize(self.w, self.scale, self.granularity)
        q = dequantize_ternary(t, alpha, self.w.dtype)
        return self.w + self.lam * (q - self.w).detach()

    def expert(self, i: int) -> Float[Tensor, "d_out d_in"]:
        """The dense matrix W_i of expert i."""
        d_out, d_in = self.w.shape
        w_i = (
            butterfly_matrix(self.phi[i], d_out)
            @ self.shared()
            @ butterfly_matrix(self.theta[i], d_in).T
        )
        if self.gain_in is not None:
            w_i = w_i * self.gain_in[i]
        if self.gain_out is not None:
            w_i = self.gain_out[i].unsqueeze(1) * w_i
        return w_i

    def __call__(self, i: int, x: Float[Tensor, " d_in"]) -> Float[Tensor, " d_out"]:
        """W_i x + b."""
        y = self.expert(i) @ x
        return y if self.bias is None else y + self.bias


def feed_forward_expert(
    i: int,
    x: Float[Tensor, " d_model"],
    up: OrbitMatrix,
    down: OrbitMatrix,
    gate: OrbitMatrix | None,
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, " d_out"]:
    """Expert i's feed-forward network on one token."""
    hidden = activation(up(i, x)) if gate is None else activation(gate(i, x)) * up(i, x)
    return down(i, hidden)


def butterfly_moe_reference(
    x: Float[Tensor, "tokens d_model"],
    router: Float[Tensor, "experts d_model"],
    up: OrbitMatrix,
    down: OrbitMatrix,
    gate: OrbitMatrix | None = None,
    *,
    top_k: int = 2,
    activation: Callable[[Tensor], Tensor] = torch.nn.functional.gelu,
    balance_bias: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, "tokens d_out"]:
    """The whole layer, token by token and expert by expert.

    Args:
        x: Tokens.
        router: Router weights; logits are ``router @ x``.
        up: First matrix, d_model -> d_ff.
        down: Second matrix, d_ff -> d_out.
        gate: Gating matrix of the same shape as `up`, or None.
        top_k: Experts a token.
        activation: Applied to the hidden units (to the gate's when gated).
        balance_bias: Steers the choice of experts, not the weights.

    Returns:
        One row a token.

    Source: arXiv 2601.13563 for W_i; non-linearity, gate and gains ours.
    """
    rows = []
    for x_t in x:
        logits = router @ x_t  # (experts,)
        score = logits if balance_bias is None else logits.sigmoid() + balance_bias
        chosen = score.topk(top_k).indices  # (k,)
        weights = logits[chosen].softmax(dim=0)  # (k,), sums to 1
        outputs = [feed_forward_expert(int(i), x_t, up, down, gate, activation) for i in chosen]
        rows.append(sum(w * y for w, y in zip(weights, outputs, strict=True)))
    return torch.stack(rows)
