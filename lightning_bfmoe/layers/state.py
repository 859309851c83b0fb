"""What a layer writes into a state_dict besides its tensors: its settings, lambda and placement."""

import json
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.errors import CheckpointError

STATE_VERSION = 1
LATER_SETTINGS = {"correction_rank": 0}
"""What a layer had when it was written before it knew the setting."""


def encode_extra_state(data: dict[str, Any]) -> Tensor:
    """Plain data as the uint8 tensor of its JSON text.

    A tensor, because much code assumes that a state_dict holds nothing else: `{k: v.cpu() ...}`,
    safetensors, `save_pretrained`.
    """
    text = json.dumps(data, sort_keys=True, allow_nan=False).encode()
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()


def decode_extra_state(value: Any) -> dict[str, Any] | None:
    """What `encode_extra_state` wrote; None for anything else.

    Example:
        >>> decode_extra_state(encode_extra_state({"blend": 0.5}))
        {'blend': 0.5}
    """
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.is_meta:
        return None
    try:
        data = json.loads(bytes(value.cpu().tolist()))
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


class RemembersSettings(nn.Module):
    """Mixin: settings travel in the state_dict, so that a checkpoint alone rebuilds the layer.

    They are one small uint8 tensor (`torch.load(weights_only=True)` reads it), survive
    `save_weights_only=True`, and are compared when a state is loaded.
    """

    settings: dict[str, Any]
    """Keyword arguments of the constructor, plain data."""
    placement: dict[str, Any] | None = None
    """Where a swap put this layer (`layers.surgery`); None when it was built by hand."""
    last_routing: Any = None

    @property
    def blend(self) -> float:
        """Lambda of the layer."""
        raise AttributeError("a layer with settings has a blend")  # overridden by each layer

    def set_blend(self, value: float) -> None:
        """Set lambda of the layer."""
        raise AttributeError("a layer with settings has a blend")  # overridden by each layer

    def get_extra_state(self) -> Tensor:
        """Version, class name, settings, lambda and placement, see `decode_extra_state`."""
        return encode_extra_state(
            {
                "version": STATE_VERSION,
                "kind": type(self).__name__,
                "settings": self.settings,
                "blend": self.blend,
                "placement": self.placement,
            }
        )

    def set_extra_state(self, state: Any) -> None:
        """Take over lambda after checking that the settings agree.

        Raises:
            CheckpointError: Another version, class or setting.
        """
        if not isinstance(state, Tensor) or state.is_meta:
            return  # torch.distributed.checkpoint passes a placeholder first
        state = decode_extra_state(state) or {}
        if state.get("version") != STATE_VERSION or state.get("kind") != type(self).__name__:
            raise CheckpointError(
                f"the checkpoint holds version {STATE_VERSION} of a {type(self).__name__}",
                got=f"version {state.get('version')} of {state.get('kind')}",
                fix="Load it with the library version that wrote it.",
            )
        theirs = {**LATER_SETTINGS, **state["settings"]}
        ignored = {"angle_std", "seed"}  # only the start depends on them
        different = {
            name: (value, theirs.get(name))
            for name, value in self.settings.items()
            if name not in ignored and theirs.get(name) != value
        }
        if different:
            raise CheckpointError(
                "a checkpoint fits a layer with the same settings",
                got=", ".join(
                    f"{k}: layer {a!r}, checkpoint {b!r}" for k, (a, b) in different.items()
                ),
                fix="Use the settings of the checkpoint, or lightning_bfmoe.load_from_checkpoint.",
            )
        self.set_blend(state["blend"])

    def _load_from_state_dict(self, state_dict, prefix, *others):  # type: ignore[no-untyped-def]
        """Load as usual; a dense state is told apart from a damaged one."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        metadata, strict, missing, unexpected, errors = others
        if strict and prefix + "_extra_state" not in state_dict:
            errors.append(
                f"{prefix.rstrip('.') or 'the model'} is a {type(self).__name__} layer, but the "
                "state was saved without one. To start from a dense checkpoint load its weights "
                "into the module before the swap, then train without resuming."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave the record of the last forward pass behind when copied or pickled."""
        return {**self.__dict__, "last_routing": None}
