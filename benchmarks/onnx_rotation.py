"""Forms of a rotation from standard ONNX operators, one thread of onnxruntime; correctness first.

    python benchmarks/onnx_rotation.py [--out benchmarks/results/onnx_rotation.json]

Rows gather their expert's float16 angles from a table of 16 experts. `sum` is the form of
`export_onnx`: a product and a sum over pairs a stage. `swap` adds the row and its swapped pairs;
`split` computes both halves apart. `factors n` multiplies the stages into blocks of n coordinates,
built from the gathered angles. A figure is the smallest processor time of a call.
"""

import argparse
import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from lightning_bfmoe.deploy.onnx_export.graph import quiet
from lightning_bfmoe.deploy.onnx_export.ops import deck_order
from lightning_bfmoe.functional.butterfly import apply_butterfly, num_pairs, num_stages

EXPERTS, ROWS, WIDTHS = 16, (2, 16, 128), (512, 2048)
FORMS = ("sum", "swap", "split", "factors 4", "factors 8", "factors 16")


class Forward(nn.Module):
    """B(angles) on rows of a power-of-two width, in one of the forms."""

    def __init__(self, d, form):
        super().__init__()
        self.d, self.form, self.stages = d, form, num_stages(d)
        self.natural = 0.5 * torch.randn(EXPERTS, self.stages, num_pairs(d)).half()
        index = torch.from_numpy(deck_order(d, self.stages)[0]).expand(EXPERTS, -1, -1)
        self.register_buffer("table", self.natural.gather(2, index))

    def forward(self, x, ids):
        angles = self.table.index_select(0, ids).float()
        cos, sin = angles.cos(), angles.sin()
        if self.form.startswith("factors"):
            return self.factors(x, cos, sin, int(self.form.split()[1]).bit_length() - 1)
        return getattr(self, self.form)(x, cos, sin)

    def sum(self, x, cos, sin):
        half = self.d // 2
        matrix = torch.cat([cos, -sin, sin, cos], -1).reshape(-1, self.stages, 2, 2, half)
        for step in matrix.split(1, 1):
            x = (x.reshape(-1, 1, half, 1, 2).permute(0, 1, 3, 4, 2) * step).sum(3)
        return x.reshape(-1, self.d)

    def swap(self, x, cos, sin):
        half = self.d // 2
        signed = torch.cat([-sin, sin], -1).reshape(-1, self.stages, 2, half).split(1, 1)
        for c, s in zip(cos.reshape(-1, self.stages, 1, half).split(1, 1), signed, strict=True):
            pairs = x.reshape(-1, 1, half, 2).transpose(2, 3)
            x = pairs * c + pairs[:, :, torch.tensor([1, 0])] * s
        return x.reshape(-1, self.d)

    def split(self, x, cos, sin):
        for c, s in zip(cos.split(1, 1), sin.split(1, 1), strict=True):
            a, b = x.reshape(-1, self.d // 2, 2).transpose(1, 2).split(1, 1)
            x = torch.cat([a * c - b * s, a * s + b * c], 2)
        return x.reshape(-1, self.d)

    def factors(self, x, cos, sin, most):
        start = 0
        while start < self.stages:
            count = min(most, self.stages - start)
            n = 1 << count
            block = self.block(cos, sin, start, count)  # (rows, out, in, d / n)
            view = x.reshape(-1, self.d // n, 1, n).permute(0, 2, 3, 1)
            x = (view * block).sum(2).reshape(-1, self.d)
            start += count
        return x

    def block(self, cos, sin, start, count):
        n = self.d >> count
        made = None
        for j in range(count):
            done, rest = 1 << j, 1 << (count - 1 - j)
            c, s = (
                t[:, start + j].reshape(-1, done, n, rest).permute(0, 1, 3, 2) for t in (cos, sin)
            )
            stage = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)
            if made is None:
                made = stage.reshape(-1, 2, 2, rest, n)
                continue
            earlier = made.reshape(-1, 1, done, done, rest, 2, n).permute(0, 1, 2, 5, 3, 4, 6)
            later = stage.reshape(-1, 2, 2, done, rest, n).permute(0, 1, 3, 2, 4, 5)
            later = later.reshape(-1, 2, done, 2, 1, rest, n)
            made = (later * earlier).reshape(-1, 2 * done, 2 * done, rest, n)
        return made.reshape(-1, 1 << count, 1 << count, n)


def session(module, path):
    example = (torch.randn(3, module.d), torch.tensor([0, 1, 2]))
    with quiet(), torch.no_grad():
        rows = {0: torch.export.Dim("rows")}
        torch.onnx.export(
            module, example, path, dynamo=True, opset_version=21, verbose=False,
            input_names=["x", "ids"], dynamic_shapes=(rows, rows), external_data=False,
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options)


def fastest(call, seconds):
    best, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = time.process_time()
        call()
        best = min(best, time.process_time() - start)
    return 1e6 * best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each figure")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rng, rows = np.random.default_rng(0), []
    for d in WIDTHS:
        for form in FORMS:
            module = Forward(d, form)
            with tempfile.TemporaryDirectory() as folder:
                run = session(module, Path(folder) / "rotation.onnx").run
            row = {"d": d, "form": form, "us": {}}
            for count in ROWS:
                x = rng.standard_normal((count, d)).astype(np.float32)
                ids = rng.integers(0, EXPERTS, count)
                feed = {"x": x, "ids": ids}
                exact = apply_butterfly(torch.from_numpy(x), module.natural[ids].float()).numpy()
                error = np.linalg.norm(run(None, feed)[0] - exact) / np.linalg.norm(exact)
                assert error < 1e-5, (d, form, error)
                row["us"][str(count)] = fastest(lambda f=feed, r=run: r(None, f), options.seconds)
            rows.append(row)
            print(d, form, " ".join(f"{us:.0f}" for us in row["us"].values()), flush=True)
    if options.out is not None:
        setting = {
            "experts": EXPERTS, "threads": 1, "unit": "us of processor time, best call",
            "torch": version("torch"), "onnxruntime": version("onnxruntime"),
        }  # fmt: skip
        text = json.dumps({"setting": setting, "rows": rows}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
