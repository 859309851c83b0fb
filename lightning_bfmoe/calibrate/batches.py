"""Turning what a dataloader yields into forward passes: arguments, device, mask, held-out share."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import CalibrationError

ForwardFn = Callable[[nn.Module, Any], Any]
MaskFn = Callable[[Any], Tensor | None]


class Batches:
    """A limited number of batches, the same in every pass, each marked as fitted to or held out.

    Example:
        >>> batches = Batches([torch.zeros(2, 3)] * 5, max_batches=4, held_out=0.5)
        >>> [held for _, held in batches]
        [False, True, False, True]

    Args:
        data: A dataloader, any iterable of batches, or a datamodule, whose training loader is taken
            after `prepare_data` and `setup`. An iterator, which can be read once only, is read into
            memory up to `max_batches`.
        max_batches: Batches a pass (count); None for all.
        held_out: Share of the batches that judge instead of being fitted to, above 0, below 1.

    Raises:
        CalibrationError: No batches, too few to hold one out, or no data at all.
    """

    def __init__(
        self, data: Iterable[Any], *, max_batches: int | None = 32, held_out: float = 0.2
    ) -> None:
        if not 0 < held_out < 1:
            raise CalibrationError(
                "held_out is a share of the batches between 0 and 1",
                got=held_out,
                fix="Use held_out=0.2.",
            )
        if max_batches is not None and max_batches < 2:
            raise CalibrationError(
                "calibration takes at least two batches, one of which judges",
                got=f"max_batches={max_batches}",
                fix="Use more and smaller batches.",
            )
        self.max_batches, self.held_out = max_batches, held_out
        data = loader_of(data)
        if iter(data) is data:
            data = list(self._first(data))
        self.data = data

    def _first(self, data: Iterable[Any]) -> Iterator[Any]:
        for index, batch in enumerate(data):
            yield batch
            if self.max_batches is not None and index + 1 >= self.max_batches:
                return

    def __len__(self) -> int:
        """Batches a pass as far as the data tells; 0 when it does not."""
        try:
            total = len(self.data)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            return self.max_batches or 0
        return total if self.max_batches is None else min(total, self.max_batches)

    def __iter__(self) -> Iterator[tuple[Any, bool]]:
        """Batches, each with whether it is held out; random numbers start alike in every pass."""
        count = 0
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles gives one order
            for count, batch in enumerate(self._first(self.data), start=1):
                yield batch, int(count * self.held_out) > int((count - 1) * self.held_out)
        if int(count * self.held_out) == 0:
            raise CalibrationError(
                f"held_out={self.held_out} of the batches must be at least one",
                got=f"{count} batches",
                fix="Give more and smaller batches, or raise held_out.",
            )


def loader_of(data: Any) -> Iterable[Any]:
    """What is read: the data, or the training loader of a datamodule.

    Raises:
        CalibrationError: It is neither.
    """
    if isinstance(data, Iterable):
        return data
    if not callable(getattr(data, "train_dataloader", None)):
        raise CalibrationError(
            "calibration reads a dataloader, an iterable of batches or a datamodule",
            got=type(data).__name__,
            fix="Pass for instance datamodule.train_dataloader(), or a list of batches.",
        )
    for name, arguments in (("prepare_data", ()), ("setup", ("fit",))):
        if callable(step := getattr(data, name, None)):
            step(*arguments)
    return loader_of(data.train_dataloader())


def call_model(model: nn.Module, batch: Any) -> Any:
    """The default `forward_fn`: ``model(**batch)``, or the model on the batch or its first part.

    Of a mapping only those entries are passed that the model's forward names.

    Example:
        >>> call_model(nn.Identity(), (torch.ones(2), torch.zeros(2))).tolist()
        [1.0, 1.0]
    """
    if isinstance(batch, Mapping):
        names = inspect.signature(model.forward).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in names.values()):
            batch = {key: value for key, value in batch.items() if key in names}
        return model(**{key: value for key, value in batch.items() if key != "labels"})
    return model(batch[0] if isinstance(batch, list | tuple) else batch)


def attention_mask(batch: Any) -> Tensor | None:
    """The default `mask_fn`: the entry `attention_mask` of a mapping, 1 where a token counts."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def run_batch(model: nn.Module, batch: Any, forward_fn: ForwardFn | None) -> None:
    """One forward pass, with an error that says how to feed this model.

    Raises:
        CalibrationError: The forward pass raises.
    """
    try:
        (forward_fn or call_model)(model, batch)
    except CalibrationError:
        raise
    except Exception as error:  # a foreign forward may raise anything
        text = str(error).strip().split("\n")[0][:200]
        raise CalibrationError(
            "the model must take what the dataloader yields",
            got=f"{describe(batch)}, for which {type(model).__name__} raises "
            f"{type(error).__name__}: {text}",
            fix="Pass forward_fn=lambda model, batch: model(...) that feeds one batch.",
        ) from error


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with all its tensors on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def describe(batch: Any) -> str:
    """A batch's kind and shapes in a few words."""
    if isinstance(batch, Tensor):
        return f"a tensor {list(batch.shape)}"
    if isinstance(batch, Mapping):
        return "a mapping of " + ", ".join(f"{k}: {describe(v)}" for k, v in batch.items())
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of " + ", ".join(map(describe, batch[:4]))
    return f"a {type(batch).__name__}"


def select_tokens(x: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """The rows of a layer's input that count, (tokens, d).

    Args:
        x: (..., d).
        mask: 1 where a token counts, over the leading axes of `x` or their transpose.
        name: Of the layer, for messages.

    Raises:
        CalibrationError: The mask has another shape.
    """
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    lead = tuple(x.shape[:-1])
    if tuple(mask.shape) != lead and mask.dim() == 2 and tuple(mask.T.shape) == lead:
        mask = mask.T
    if tuple(mask.shape) != lead and not (len(lead) == 1 and mask.numel() == lead[0]):
        raise CalibrationError(
            "a mask has the leading axes of the activations that it masks",
            got=f"mask {list(mask.shape)}, input {list(x.shape)} of {name}",
            fix="Pass mask_fn=lambda batch: ..., or mask_fn=lambda batch: None to count all.",
        )
    return x.reshape(-1, x.shape[-1])[mask.reshape(-1).bool()]
