"""Standard mixtures under onnxruntime, for `benchmarks/deploy.py`: its own operator `QMoE`.

    com.microsoft::QMoE   router, top-k and every chosen expert in one node; matrices at 4 or 2 bit

At 2 bit the matrices are ternary, so that this is the control of equal precision. The rest of the
model, its cache and its files come from `export_onnx`'s own parts.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.onnx_export.cache import CachedModel, trace
from lightning_bfmoe.deploy.onnx_export.folder import new_folder, write_settings
from lightning_bfmoe.deploy.onnx_export.graph import to_onnx, write_graph

ZERO = {4: 8, 2: 2}  # the code of the number 0


class QuantizedMoE(nn.Module):
    """A standard MoE as one node of onnxruntime; random codes, as no time depends on them.

    Args:
        d: Width.
        d_ff: Hidden width of an expert.
        experts: Their number.
        k: Experts a token.
        bits: 4, or 2 for ternary matrices.
    """

    def __init__(self, d: int, d_ff: int, experts: int, k: int, bits: int) -> None:
        super().__init__()
        self.k, self.bits = k, bits
        self.router = nn.Linear(d, experts, bias=False)
        top = 7 if bits == 4 else 1
        for name, rows, columns in (("up", d_ff, d), ("down", d, d_ff)):
            codes = torch.zeros(experts, rows, columns * bits // 8, dtype=torch.uint8)
            for shift in range(0, 8, bits):
                codes |= (torch.randint_like(codes, 2 * top + 1) + ZERO[bits] - top) << shift
            self.register_buffer(name, codes)
            scale = (1.5 / columns) ** 0.5 / (4 if bits == 4 else 1)
            self.register_buffer(f"{name}_scale", torch.full((experts, rows), scale))

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> same; computed by onnxruntime alone."""
        rows = x.reshape(-1, x.shape[-1])
        y = torch.onnx.ops.symbolic(
            "com.microsoft::QMoE",
            (rows, self.router(rows), self.up, self.up_scale, None, self.down, self.down_scale),
            {
                "k": self.k, "activation_type": "gelu", "normalize_routing_weights": 1,
                "expert_weight_bits": self.bits,
            },
            dtype=rows.dtype, shape=rows.shape, version=1,
        )  # fmt: skip
        return y.reshape(x.shape)


def export_standard(model: nn.Module, vocabulary: int, context: int, path: Path) -> None:
    """A model with `QuantizedMoE` blocks as a folder of `export_onnx`'s format."""
    ids = torch.randint(vocabulary, (2, 13), generator=torch.Generator().manual_seed(0))
    cached = CachedModel(trace(model.eval(), ids), ids)
    with new_folder(path, overwrite=False) as folder:
        write_graph(to_onnx(cached, ids, 21), folder, "2bit")
        write_settings(
            folder,
            {
                "context": context, "vocab_size": vocabulary, "tokenizer": "bytes",
                "cache": [
                    {"heads": heads, "key_width": key, "value_width": value}
                    for heads, key, value in cached.shapes
                ],
                "generation": {},
            },
        )  # fmt: skip
