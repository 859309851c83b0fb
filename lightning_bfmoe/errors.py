"""The one exception family: every message names the invariant, the value, the way out."""


class BFMoEError(ValueError):
    """Base of all errors raised on purpose by `lightning_bfmoe`.

    The message reads ``{rule}: got {got}. {fix}``.

    Example:
        >>> from lightning_bfmoe.errors import BFMoEError
        >>> print(BFMoEError("top_k must be at most 8", got="top_k=9", fix="Lower top_k."))
        top_k must be at most 8: got top_k=9. Lower top_k.

    Args:
        rule: The invariant that was broken, as a sentence.
        got: The value that came; left out of the message when `None`.
        fix: What the caller can do about it, as one or more sentences.
    """

    def __init__(self, rule: str, *, got: object = None, fix: str = "") -> None:
        self.rule, self.got, self.fix = rule, got, fix
        message = rule if got is None else f"{rule}: got {got}."
        super().__init__(f"{message} {fix}".strip())

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.rule, self.got, self.fix))


def _rebuild(cls: type[BFMoEError], rule: str, got: object, fix: str) -> BFMoEError:
    return cls(rule, got=got, fix=fix)


class ConfigError(BFMoEError):
    """A setting is out of its range, or two settings contradict each other."""


class ShapeError(BFMoEError):
    """A tensor's shape or dtype does not fit the operation."""


class SwapError(BFMoEError):
    """A model's feed-forward blocks cannot be exchanged as asked."""


class CalibrationError(BFMoEError):
    """Activations for a calibrated swap cannot be collected, or are of no use."""


class PackedFileError(BFMoEError):
    """A packed file is damaged, foreign, newer than this library, or does not fit the model."""


class ExportError(BFMoEError):
    """A model cannot be exported, or an exported folder cannot be run."""


class CheckpointError(BFMoEError):
    """A training checkpoint does not fit the model or the callback's settings."""


class ReplicaError(BFMoEError):
    """Copies of a model on several processes are not, or would not stay, equal."""
