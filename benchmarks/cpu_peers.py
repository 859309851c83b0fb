"""What `benchmarks/cpu.py` compares with: torch in three widths, and onnxruntime's packed products.

Each peer of a product is built from a ternary matrix and its scales, and called with float32 rows;
each layer is called with one token (1, d).
"""

import importlib.util
import itertools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]


def torch_fp32(trits: Tensor, alpha: Tensor) -> Product:
    weight = alpha * trits
    return lambda x: F.linear(x, weight)


def torch_bf16(trits: Tensor, alpha: Tensor) -> Product:
    weight = (alpha * trits).bfloat16()
    return lambda x: F.linear(x.bfloat16(), weight)


def torch_int8(trits: Tensor, alpha: Tensor) -> Product:
    """Activations rounded to 8 bit, one scale a tensor."""
    engines = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "onednn" if "onednn" in engines else engines[-1]
    scales, zeros = alpha.reshape(-1).double(), torch.zeros(trits.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated in favour of torchao
        weight = torch.quantize_per_channel(alpha * trits, scales, zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, None)
    return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)


def onnx_packed(bits: int) -> Callable[[Tensor, Tensor], Product]:
    """Onnxruntime's MatMulNBits; activations rounded to 8 bit, a scale for each block of 128."""

    def build(trits: Tensor, alpha: Tensor, block: int = 128) -> Product:
        import onnx
        import onnxruntime
        from onnx import TensorProto, helper

        d_out, d_in = trits.shape
        per_byte = 8 // bits
        codes = (trits.int() + 2 ** (bits - 1)).reshape(d_out, d_in // block, -1, per_byte)
        shifts = torch.arange(per_byte, dtype=torch.int32) * bits
        packed = (codes << shifts).sum(dim=-1).to(torch.uint8)
        scales = alpha.float().expand(d_out, d_in // block).contiguous()
        node = helper.make_node(
            "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=d_in,
            N=d_out, bits=bits, block_size=block, accuracy_level=4,
        )  # fmt: skip
        constants = [
            helper.make_tensor(name, kind, value.shape, value.numpy().tobytes(), raw=True)
            for name, kind, value in (
                ("codes", TensorProto.UINT8, packed),
                ("scales", TensorProto.FLOAT, scales),
            )
        ]
        graph = helper.make_graph(
            [node], "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", d_in])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", d_out])], constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # its threads would spin beside torch's and slow both down
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

    return build


def products() -> dict[str, Callable[[Tensor, Tensor], Product]]:
    """The peers that this machine can run, by name."""
    found = {"torch fp32": torch_fp32, "torch bf16": torch_bf16, "torch int8": torch_int8}
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        found |= {"onnxruntime 2-bit": onnx_packed(2), "onnxruntime 4-bit": onnx_packed(4)}
    return found


class StandardMoE:
    """Top-2 of `experts` experts with their own matrices, the chosen ones in turn.

    The time does not depend on how many experts there are, as long as they do not all fit into the
    cache; so a few stand for 64, and each token takes the next two.
    """

    def __init__(self, d: int, experts: int, build: Callable[[Tensor, Tensor], Product]) -> None:
        self.router = torch.randn(64, d) * d**-0.5
        self.up, self.down = (
            [build(*random_ternary(*shape)) for _ in range(experts)]
            for shape in ((4 * d, d), (d, 4 * d))
        )
        self.turn = itertools.cycle(range(0, experts, 2))

    def __call__(self, x: Tensor) -> Tensor:
        """(1, d) to (1, d)."""
        weights = F.linear(x, self.router).topk(2).values.softmax(dim=-1)  # (1, 2)
        first = next(self.turn)
        y = torch.zeros_like(x)
        for slot in range(2):
            hidden = F.gelu(self.up[first + slot](x)).float()
            y += weights[:, slot] * self.down[first + slot](hidden).float()
        return y


def random_ternary(d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    """Trits and row scales of about the size of trained ones."""
    trits = torch.randint(-1, 2, (d_out, d_in), dtype=torch.int8)
    return trits, (0.5 + torch.rand(d_out, 1)) * d_in**-0.5
