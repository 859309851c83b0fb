"""Gradients of the shared matrices travel in bfloat16, all others as they are.

A step's traffic is nearly all latent matrices, whose gradients pass a straight-through estimator
and are noisy anyway; angles, gains and routers are small and take small steps. DDP mixes both in a
bucket, so a bucket is split by parameter: two collectives for a mixed one, one for a pure one.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_bfmoe.layers import parameter_roles

COMPRESSIONS = ("bf16",)


def substrates(module: nn.Module) -> list[nn.Parameter]:
    """The latent matrices of all our layers in a module."""
    parameters = dict(module.named_parameters())
    roles = parameter_roles(module)
    return [parameters[n] for n, role in roles.items() if role == "latent" and n in parameters]


@dataclass
class Traffic:
    """State of the hook: what to narrow, and how much went over the wire."""

    narrow: set[int] = field(default_factory=set)
    """`id` of each parameter whose gradient is narrowed."""
    sent: int = 0
    """Bytes that this process has given to all-reduce (count)."""

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter]) -> "Traffic":
        """A state that narrows these parameters."""
        return cls({id(p) for p in parameters})


# torch wants the second argument to be named `bucket` and reads both annotations.
def mixed_precision_hook(state: Traffic, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    r"""Average a bucket over the processes, the wide part exactly and the narrow part in bfloat16.

    .. math:: g = \sum_r g_r / R, \qquad
        g_{latent} = \mathrm{fp32}\Big(\sum_r \mathrm{bf16}(g_r / R)\Big)

    Every process receives the same sums, so the copies of the model stay equal bit by bit.

    Args:
        state: What to narrow.
        bucket: Gradients of some parameters.

    Source: `torch.distributed.algorithms.ddp_comm_hooks.default_hooks.bf16_compress_hook`, for a
    part of a bucket.
    """
    buffer = bucket.buffer().div_(dist.get_world_size())
    pairs = list(zip(bucket.parameters(), bucket.gradients(), strict=True))
    narrow = [g for p, g in pairs if id(p) in state.narrow and g.dtype == torch.float32]
    if not narrow:
        return _whole(state, buffer)
    chosen = set(map(id, narrow))
    wide = [g for _, g in pairs if id(g) not in chosen]
    packed_wide = torch.cat([g.reshape(-1) for g in wide]) if wide else None
    packed = torch.cat([g.reshape(-1).to(torch.bfloat16) for g in narrow])
    # On every process the wide part first; the second one is waited for by the future.
    first = None
    if packed_wide is not None:
        state.sent += packed_wide.nbytes
        first = dist.all_reduce(packed_wide, async_op=True)
    state.sent += packed.nbytes
    future = dist.all_reduce(packed, async_op=True).get_future()

    def unpack(_: torch.futures.Future) -> Tensor:
        if first is not None and packed_wide is not None:
            first.wait()  # on a GPU: the stream on which this runs waits, not the host
            _copy_back(packed_wide, wide)
        _copy_back(packed, narrow)
        return buffer

    return future.then(unpack)


def _whole(state: Traffic, buffer: Tensor) -> torch.futures.Future[Tensor]:
    state.sent += buffer.nbytes
    future = dist.all_reduce(buffer, async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


def _copy_back(packed: Tensor, parts: list[Tensor]) -> None:
    if packed.is_cuda:  # made on another stream, whose allocator must not reuse it yet
        packed.record_stream(torch.cuda.current_stream(packed.device))
    for part, values in zip(parts, packed.split([p.numel() for p in parts]), strict=True):
        part.copy_(values.view_as(part))
