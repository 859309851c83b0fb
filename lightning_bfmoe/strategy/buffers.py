"""Our layers' buffers, which DDP would send from the first process before every forward pass.

A balance bias is moved on every process by the same summed load (`RouterBalance`), so the copies
are equal, and sending them costs a collective and, on a GPU, a stop a pass. They are shared once
when the model is wrapped, as torch does with parameters, and kept out of the broadcast after that.
Lambda, the loss scale and the pending load are plain tensors, so DDP never sees them.
"""

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_MARK = "_ddp_params_and_buffers_to_ignore"


class KeptApart:
    """The buffers of all our layers in a module, kept out of DDP's broadcast until `release`.

    Args:
        module: Not wrapped yet. A list of its own of what DDP shall ignore is kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._before: list[str] | None = getattr(module, _MARK, None)
        self._names = [
            f"{path}.{name}" if path else name
            for path, inner in module.named_modules()
            if type(inner).__module__.startswith("lightning_bfmoe.layers")
            for name, _ in inner.named_buffers(recurse=False)
        ]
        ignored = [*(self._before or ()), *self._names]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, ignored)

    def tensors(self) -> dict[str, Tensor]:
        """The buffers by their full names."""
        return {name: self._module.get_buffer(name) for name in self._names}

    def share(self) -> None:
        """Copy them from the first process, where there are several."""
        if dist.is_initialized():
            for buffer in self.tensors().values():
                dist.broadcast(buffer, src=0)

    def release(self) -> None:
        """Let DDP, and Lightning in other stages, see them again."""
        if self._before is not None:
            setattr(self._module, _MARK, self._before)
        elif hasattr(self._module, _MARK):
            delattr(self._module, _MARK)
