"""Copies of a model on several processes: are they equal, and do they change at the same time?"""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from lightning_bfmoe.errors import ReplicaError

_SHOWN = 4
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def parameter_checksums(module: nn.Module, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
    r"""One integer for each parameter: the sum of its bit patterns modulo 2^64.

    .. math:: c(p) = \sum_j \mathrm{bits}(p_j) \bmod 2^{64}

    A sum of integers does not depend on its order, so equal tensors have equal sums on any device,
    and a single flipped bit shows.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> parameter_checksums(layer).shape
        torch.Size([2])

    Args:
        module: Its parameters, in the order of `named_parameters`.
        buffers: Further tensors, counted behind them.

    Returns:
        One number for each tensor, int64, on the device of the parameters.
    """
    tensors = [*module.parameters(), *(buffers or {}).values()]
    return torch.stack([_bits(t).sum(dtype=torch.int64) for t in tensors])


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach().contiguous()
    parts = torch.view_as_real(plain) if plain.is_complex() else plain
    if parts.dtype == torch.bool:
        return parts.to(torch.uint8)
    return parts.view(_INTEGERS[parts.element_size()])


def check_replicas(module: nn.Module, buffers: Mapping[str, Tensor], step: int) -> None:
    """Compare all parameters of all processes, by one collective of eight bytes a tensor.

    Raises:
        ReplicaError: Some differ; on every process.
    """
    own = parameter_checksums(module, buffers)
    everyone = [own.clone() for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    names = [*(name for name, _ in module.named_parameters()), *buffers]
    table = torch.stack(everyone).cpu()  # (ranks, tensors)
    differ = (table != table[0]).any(dim=0).tolist()
    wrong = [name for name, differs in zip(names, differ, strict=True) if differs]
    if wrong:
        raise ReplicaError(
            "every process holds the same parameters after an optimizer step",
            got=f"{len(wrong)} of {len(names)} that differ after step {step} ({_list(wrong)})",
            fix="Do the processes run the same code on the same settings? A change of parameters "
            "or of requires_grad that depends on the rank is the usual cause.",
        )


def agree_on_trainable(flags: Mapping[str, bool], round_number: int, timeout: timedelta) -> None:
    """Wait until all processes want to wrap the same parameters.

    Through the key-value store of the process group, not by a collective: a process that does not
    come is somewhere else in its program, and its next collective would be taken for the answer.

    Args:
        flags: `requires_grad` by name.
        round_number: How often this was asked before; part of the key.
        timeout: How long to wait.

    Raises:
        ReplicaError: The sets differ, or a process did not come.
    """
    store = dist.PrefixStore(f"bfmoe/trainable/{round_number}", _get_default_store())
    own = "".join(str(int(flag)) for flag in flags.values())
    ranks = range(dist.get_world_size())
    store.set(str(dist.get_rank()), own)
    for rank in ranks:
        try:
            store.wait([str(rank)], timeout)
        except RuntimeError as error:
            raise ReplicaError(
                "requires_grad changes on every process before the same training step",
                got=f"a change on process {dist.get_rank()} that process {rank} did not make in "
                f"{timeout.total_seconds():g} s",
                fix="Let the change depend on the step, not on the rank or on local data.",
            ) from error
        theirs = store.get(str(rank)).decode()
        if theirs != own:
            names = [n for n, a, b in zip(flags, own, theirs, strict=False) if a != b]
            raise ReplicaError(
                "the same parameters are trainable on every process",
                got=f"{len(names)} that are on one of the processes {dist.get_rank()} and {rank} "
                f"only ({_list(names)})",
                fix="Let the change depend on the step, not on the rank or on local data.",
            )


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
