"""The command `bfmoe export`: a packed file becomes a folder for onnxruntime."""

from pathlib import Path
from typing import Any, Literal

from rich.console import Console


def export(
    file: str,
    out: str | None = None,
    module: str | None = None,
    init: dict[str, Any] | None = None,
    tokenizer: str | None = None,
    products: Literal["2bit", "int8", "both"] = "2bit",
    context: int | None = None,
    cache: bool = True,
    opset: int = 21,
    force: bool = False,
) -> None:
    """Export a packed language model to ONNX, to run on onnxruntime without torch.

    Args:
        file: A packed file.
        out: The new folder; left out: beside the file, its name with -onnx.
        module: Its class, as `my_package.models:MyModule`; forward takes ids, returns logits.
        init: Arguments of the class that the file does not hold, e.g. '{"width": 64}'.
        tokenizer: JSON file of the package `tokenizers`, copied along; left out: a model of bytes.
        products: Ternary products at 2bit (least memory), as int8 (faster for prompts and batches,
            more memory), or both, chosen by the number of rows.
        context: Most tokens the model can look at; left out: found in the model.
        cache: false exports a model without a key-value cache.
        opset: ONNX opset: 21, 22 or 23.
        force: Replace an exported folder.
    """
    from lightning_bfmoe.cli_packed import build_module
    from lightning_bfmoe.deploy import export_onnx
    from lightning_bfmoe.deploy.onnx_export.folder import check_target

    source = Path(file)
    target = source.with_name(f"{source.stem}-onnx") if out is None else Path(out)
    check_target(target, force)  # before the model is built
    report = export_onnx(
        file,
        target,
        model=build_module(module, file, init),
        products=products,
        cache=cache,
        context=context,
        tokenizer=tokenizer,
        opset=opset,
        overwrite=force,
    )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(str(report))
    console.print(f"Try it without torch: python examples/edge_app.py {target} --prompt 'Hello'")
