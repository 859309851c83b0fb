"""One feed-forward layer on onnxruntime: our graph in its forms, and what stands against it.

    python benchmarks/onnx_layer.py [--d 2048 --f 8192 --experts 64] [--out FILE]

Each form is a session of one thread; a figure is the smallest processor time of a call, which other
load on the machine lengthens least. All weights stay where the last call left them in the caches,
as far as they fit: a whole model reads its weights from memory, which favours fewer bytes yet more.
Outputs are compared with PyTorch before anything is timed. The opponents are standard MoEs of the
same sizes and top-2: every chosen expert's matrices, 4 bit, ternary at 2 bit, bfloat16 in torch.
Eight tokens choose 16 experts out of N, of which 14.4 are different at N = 64.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lightning_bfmoe import ButterflyMoE, export_onnx  # noqa: E402
from lightning_bfmoe.deploy.onnx_export.runner import OnnxModel, find_library  # noqa: E402

TOKENS = (1, 2, 4, 8, 64, 128)
VISITED = {1: 2, 8: 14}  # tokens -> different experts of a standard MoE
MIB = 2**20


class Shell(nn.Module):
    """The layer behind an embedding, so that it takes ids."""

    def __init__(self, d, f, experts):
        super().__init__()
        self.embed, self.layer = nn.Embedding(256, d), ButterflyMoE(d, f, experts, 2)
        nn.init.normal_(self.layer.router.weight, std=2 * d**-0.5)

    def forward(self, ids):
        return self.layer(self.embed(ids))


def fastest(call, seconds=2.0, least=5):
    """Smallest processor time of a call (ms)."""
    call()
    best, begin, count = float("inf"), time.perf_counter(), 0
    while count < least or time.perf_counter() - begin < seconds:
        start = time.process_time()
        call()
        best, count = min(best, time.process_time() - start), count + 1
    return 1e3 * best


def ours(model, folder, library, seconds):
    rows = {}
    ids = {n: np.random.default_rng(n).integers(0, 256, (1, n)) for n in TOKENS}
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids[64])).numpy()
    for products in ("2bit", "int8"):
        export_onnx(model, folder, products=products, angles="fp16", cache=False, overwrite=True)
        libraries = {"stock": ""} | ({} if library == Path() else {"custom op": library})
        for name, chosen in libraries.items():
            runner = OnnxModel(folder, 1, library=chosen)
            error = np.linalg.norm(runner(ids[64])[0] - wanted, axis=-1)
            error = float(np.median(error / np.linalg.norm(wanted, axis=-1)))
            assert error < 0.05, error
            row = {str(n): fastest(lambda r=runner, n=n: r(ids[n]), seconds) for n in TOKENS}
            files = sum(path.stat().st_size for path in folder.iterdir())
            row |= {"error": error, "folder_mib": files / MIB}
            if Path("/proc/self/status").exists():
                row["resident_mib"] = resident(folder, chosen, 1)
                row["resident_mib_64"] = resident(folder, chosen, 64)
            rows[f"ButterflyMoE, {name}, {products}"] = row
            print(f"ButterflyMoE, {name}, {products}", row, flush=True)
    return rows


RESIDENT = """
import ctypes, sys
from pathlib import Path
import numpy, onnxruntime
def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmRSS")) / 1024
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
options.enable_mem_pattern = False  # as examples/edge_app.py does
before = resident()
if sys.argv[2]:
    options.register_custom_ops_library(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], options)
if hasattr(ctypes.CDLL(None), "malloc_trim"):
    ctypes.CDLL(None).malloc_trim(0)
ids = numpy.random.default_rng(0).integers(0, 256, (1, int(sys.argv[3])))
for _ in range(3):
    session.run(None, {"input_ids": ids})
print(resident() - before)
"""


def resident(folder, library, tokens):
    """MiB that a process without torch grows by when it loads and runs the graph (Linux only)."""
    graph = folder / ("model_ops.onnx" if library else "model.onnx")
    command = [sys.executable, "-c", RESIDENT, graph, str(library and Path(library).resolve())]
    command.append(str(tokens))
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def standard(d, f, bits, visited, folder):
    """A session of the experts that are visited, one row each."""
    graph_nodes, constants, rng = [], [], np.random.default_rng(0)
    for i in range(visited):
        x = "x"
        for name, n, k in (("up", f, d), ("down", d, f)):
            codes = rng.integers(0, 256, (n, k // 128, 16 * bits), dtype=np.uint8)
            if bits == 2:
                codes |= (codes == 0).astype(np.uint8)
            constants += [
                numpy_helper.from_array(codes, f"{name}{i}"),
                numpy_helper.from_array(np.full((n, k // 128), 0.01, np.float32), f"{name}_s{i}"),
            ]
            graph_nodes.append(
                helper.make_node(
                    "MatMulNBits",
                    [x, f"{name}{i}", f"{name}_s{i}"],
                    [f"{name}_y{i}"],
                    domain="com.microsoft",
                    K=k,
                    N=n,
                    bits=bits,
                    block_size=128,
                    accuracy_level=4,
                )  # fmt: skip
            )
            x = f"{name}_y{i}"
            if name == "up":
                graph_nodes.append(helper.make_node("Gelu", [x], [f"act{i}"]))
                x = f"act{i}"
    graph_nodes.append(helper.make_node("Sum", [f"down_y{i}" for i in range(visited)], ["y"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        graph_nodes, "standard", [value("x", TensorProto.FLOAT, [1, d])],
        [value("y", TensorProto.FLOAT, [1, d])], constants,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "standard.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, ir_version=10), path,
        save_as_external_data=True, location="standard.bin",
    )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options)
    (folder / "standard.bin").unlink()
    return session


def opponents(d, f, folder, seconds):
    rows = {}
    x = np.random.default_rng(0).standard_normal((1, d)).astype(np.float32)
    for name, bits in (("standard MoE, 4 bit", 4), ("standard MoE, ternary at 2 bit", 2)):
        rows[name] = {}
        for tokens, visited in VISITED.items():
            session = standard(d, f, bits, visited, folder)
            rows[name][str(tokens)] = fastest(lambda s=session: s.run(None, {"x": x}), seconds)
        print(name, rows[name], flush=True)
    wide = torch.from_numpy(x).bfloat16()
    experts = [(torch.randn(f, d).bfloat16(), torch.randn(d, f).bfloat16()) for _ in range(2)]

    def call():
        return sum(F.linear(F.gelu(F.linear(wide, up)), down) for up, down in experts)

    with torch.no_grad():
        rows["standard MoE, bfloat16 in torch"] = {"1": fastest(call, seconds)}
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=2048)
    parser.add_argument("--f", type=int, default=8192)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each figure")
    parser.add_argument("--library", type=Path, help="with the custom op; left out: our own")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        model = Shell(options.d, options.f, options.experts).eval()
        rows = ours(model, Path(name) / "edge", options.library or find_library(), options.seconds)
        rows |= opponents(options.d, options.f, Path(name), options.seconds)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line for line in lines if "model name" in line), f": {platform.processor()}")
    setting = {
        "d": options.d, "f": options.f, "experts": options.experts, "top_k": 2, "threads": 1,
        "unit": "ms of processor time, best call", "cpu": cpu.partition(":")[2].strip(),
        "torch": version("torch"), "onnxruntime": version("onnxruntime"),
    }  # fmt: skip
    if options.out is not None:
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known[f"d={options.d}, f={options.f}, N={options.experts}"] = {
            "setting": setting,
            "rows": rows,
        }
        options.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    print("| form | " + " | ".join(f"{n} tokens" for n in TOKENS) + " |")
    for name, row in rows.items():
        cells = [f"{row[str(n)]:.2f}" if str(n) in row else "" for n in TOKENS]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
