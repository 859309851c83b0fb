"""Parameters that stay at least float32 when the model around them is cast down."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class KeepsFloat32(nn.Module):
    """Mixin: `.to(bfloat16)`, `.half()` and Lightning's `bf16-true` move but do not narrow.

    Angles, latent weights, router and gains take many small steps that a 16-bit number loses
    (100 SGD steps of 1e-3 from 1.0 leave 1.0 in bfloat16). Computation follows the dtype of the
    input instead. Wider is allowed: `.double()` works.

    Plain tensors named in `_plain_tensors` are not buffers (no broadcast, no averaging, no
    checkpoint key) yet follow the module to another device.
    """

    _plain_tensors: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        keeping = _keep_float32(fn)
        for module in self.children() if recurse else ():
            # our own children keep theirs; foreign ones (a user's activation) are cast as asked
            module._apply(fn)
        super()._apply(keeping, recurse=False)
        for name in self._plain_tensors:
            setattr(self, name, keeping(getattr(self, name)))
        return self


def _keep_float32(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def keeping(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return fn(tensor)
        target = fn(tensor.detach()[:0] if tensor.dim() else tensor.detach())
        floor = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps)
        if torch.finfo(target.dtype).eps > floor:  # by precision: float16 -> bfloat16 loses too
            return tensor.to(target.device)
        return fn(tensor)

    return keeping
