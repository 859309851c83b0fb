"""Looking at an optimizer's groups where it reads them: in the middle of its step."""

from collections.abc import Callable

from torch.optim import Optimizer


def spy_on_steps(optimizer: Optimizer, note: Callable[[dict], None]) -> Callable[[], None]:
    """Call `note` with each group that a step of torch's Adam, AdamW or SGD works on.

    Returns:
        What ends it.
    """
    original = optimizer._init_group

    def spy(group, *others):
        note(group)
        return original(group, *others)

    optimizer._init_group = spy
    return lambda: vars(optimizer).pop("_init_group")
