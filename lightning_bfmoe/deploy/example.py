"""A recorded forward pass: what the packed model computed where it was packed."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.format import Example
from lightning_bfmoe.deploy.load import load_packed
from lightning_bfmoe.errors import PackedFileError

INPUT, OUTPUT = "example.input.{}", "example.output"


def record_example(
    model: nn.Module, file: Path, example: Tensor | Sequence[Tensor]
) -> tuple[dict[str, Tensor], Example]:
    """Runs a copy of the model, filled from a packed file, on the CPU.

    Args:
        model: The model that was packed; not touched.
        file: The packed file.
        example: Its input.

    Returns:
        Tensors to store, and their names.

    Raises:
        PackedFileError: An input or the output is no plain tensor.
    """
    inputs = [example] if isinstance(example, Tensor) else list(example)
    if not inputs or not all(isinstance(item, Tensor) for item in inputs):
        raise PackedFileError(
            "an example is a tensor or several",
            got=[type(item).__name__ for item in inputs],
            fix="Pass what model(*example) takes.",
        )
    inputs = [item.detach().cpu() for item in inputs]
    output = run_example(load_packed(file, copy.deepcopy(model), device="cpu"), inputs)
    names = [INPUT.format(number) for number in range(len(inputs))]
    tensors = {n: item.clone() for n, item in zip(names, inputs, strict=True)} | {OUTPUT: output}
    return tensors, Example(names, OUTPUT)


def run_example(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The model's output in eval mode, on the device of its first tensor.

    Raises:
        PackedFileError: The model refuses the input, or its output is no tensor or not finite.
    """
    first = next(iter([*model.parameters(), *model.buffers()]))
    try:
        with torch.no_grad():
            output = model.eval()(*(item.to(first.device) for item in inputs))
    except Exception as error:  # whatever a stranger's model does with an unfit input
        raise PackedFileError(
            "an example is an input of the model",
            got=f"{type(error).__name__}: {error}",
            fix="Pass what model(*example) takes.",
        ) from error
    if not isinstance(output, Tensor) or not bool(torch.isfinite(output).all()):
        kind = "NaN or infinite numbers" if isinstance(output, Tensor) else type(output).__name__
        raise PackedFileError(
            "the output of an example is one tensor of finite numbers",
            got=kind,
            fix="Wrap the model in a module that returns its logits.",
        )
    return output.detach().cpu().contiguous().clone()
