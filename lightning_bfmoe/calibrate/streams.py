r"""What submodules write into the residual stream, and what of it a replacement would miss.

For a submodule F with input x and the residual r that its output is added to, each token counts by
:math:`1 / |r + F(x)|^2`. Then the weighted squared error of a replacement G is its eps:

.. math:: \epsilon = E_t\,\frac{|F(x_t) - G(x_t)|^2}{|r_t + F(x_t)|^2}
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_bfmoe.calibrate.batches import (
    ForwardFn,
    MaskFn,
    attention_mask,
    run_batch,
    select_tokens,
    to_device,
)
from lightning_bfmoe.calibrate.bypass import WeightedMoments
from lightning_bfmoe.calibrate.observe import evaluating
from lightning_bfmoe.errors import CalibrationError

_SAMPLE, _A_BATCH = 512, 64  # held-out tokens that are kept of each submodule, and of one batch
_SECOND = ("encoder_hidden_states", "key_value_states", "memory")  # arguments of cross-attention
_RECENT = 4  # norms that are remembered during a forward pass


@dataclass
class Submodule:
    """A place in the model that may be replaced.

    Args:
        path: Of the module that is called there.
        kind: What stands there.
        width: Of its tokens.
        function: Rows to rows, where the module alone is not the whole; None: the module's output.
        end: Path of the module whose output is the submodule's, where it is another one.
        adds_input: It is known that the output is added to the submodule's own input.
        refused: Why it cannot be replaced; empty when it may be.
    """

    path: str
    kind: Literal["feed-forward", "attention"]
    width: int
    function: Callable[[Tensor], Tensor] | None = None
    end: str | None = None
    adds_input: bool = False
    refused: str = ""


@dataclass
class Stream:
    """What was seen of one submodule.

    Args:
        moments: Weighted, of inputs and outputs of the tokens that are fitted to.
        x: Inputs of some held-out tokens, (tokens, d).
        y: Outputs of these.
        weight: 1 / |r + y|^2 of these, (tokens,).
        outputs: Length of the tuple that the module returns; 0 for a tensor.
        post_norm: Whether its output is added to its own input, not to that of the norm before it.
        refused: Why it cannot be replaced; empty when it can.
    """

    moments: WeightedMoments
    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    outputs: int = 0
    post_norm: bool | None = None
    refused: str = ""
    _turned: float = 0.0
    _ratio: float = 0.0
    _tokens: int = 0

    def count(self, r: Tensor, y: Tensor) -> None:
        """Add tokens to the two criteria."""
        r, y = r.double(), y.double()
        cosine = torch.cosine_similarity(r, r + y, dim=1)
        self._turned += float((1 - cosine).sum())
        self._ratio += float((y.norm(dim=1) / r.norm(dim=1).clamp(min=1e-30)).sum())
        self._tokens += len(r)

    @property
    def one_minus_cosine(self) -> float:
        """Mean of 1 - cos(r, r + y), as ShortGPT's block influence (arXiv 2403.03853)."""
        return self._turned / max(self._tokens, 1)

    @property
    def norm_ratio(self) -> float:
        """Mean of |y| / |r|."""
        return self._ratio / max(self._tokens, 1)

    @torch.no_grad()
    def eps(self, replacement: Callable[[Tensor], Tensor]) -> float:
        """Residual-stream error of a replacement on the held-out tokens."""
        total, tokens = 0.0, 0
        for x, y, weight in zip(self.x, self.y, self.weight, strict=True):
            miss = (y.double() - replacement(x).double()).square().sum(dim=1)
            total += float((miss * weight).sum())
            tokens += len(x)
        return total / max(tokens, 1)


def watch_streams(
    model: nn.Module,
    submodules: list[Submodule],
    batches: Iterable[tuple[Any, bool]],
    *,
    forward_fn: ForwardFn | None = None,
    mask_fn: MaskFn | None = None,
    on_batch: Callable[[], Any] | None = None,
) -> dict[str, Stream]:
    """Run the model over the batches and watch submodules; it is left as it was.

    Args:
        model: Any module.
        submodules: Places.
        batches: Each with whether it is held out.
        forward_fn: As for a calibration.
        mask_fn: As for a calibration.
        on_batch: Called after each batch.

    Returns:
        By path.

    Raises:
        CalibrationError: The model does not take a batch, or activations are not finite.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    session = _Session(submodules, device)
    with evaluating(model), session.hooked(model), torch.no_grad():
        for batch, held in batches:
            batch = to_device(batch, device)
            session.held, session.mask = held, (mask_fn or attention_mask)(batch)
            run_batch(model, batch, forward_fn)
            session.settle(None)
            session.recent.clear()
            if on_batch is not None:
                on_batch()
    for stream in session.streams.values():
        if not stream.refused and (not stream.moments.count or not stream.x):
            stream.refused = "it takes no part in the forward pass"
    return session.streams


@dataclass
class _Call:
    """One call of a submodule, its residual still unknown."""

    place: Submodule
    stream: Stream
    x: Tensor
    before: Tensor | None
    y: Tensor


class _Session:
    """The hooks of one pass and what they know."""

    def __init__(self, submodules: list[Submodule], device: torch.device) -> None:
        self.submodules = submodules
        self.streams = {
            s.path: Stream(WeightedMoments(s.width, s.width, device), refused=s.refused)
            for s in submodules
        }
        self.begun: dict[str, Tensor] = {}  # inputs of submodules that end in another module
        self.recent: list[tuple[Tensor, Tensor]] = []  # output and input of the latest norms
        self.waiting: list[_Call] = []
        self.held = self.busy = False
        self.mask: Tensor | None = None

    @contextlib.contextmanager
    def hooked(self, model: nn.Module) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                if is_norm(module):
                    stack.callback(module.register_forward_hook(self.norm).remove)
            for s in self.submodules:
                module = model.get_submodule(s.path)
                hook = module.register_forward_hook(self.see(s), with_kwargs=True)
                stack.callback(hook.remove)
                if s.end is not None:
                    last = model.get_submodule(s.end)
                    stack.callback(last.register_forward_hook(self.finish(s)).remove)
            yield

    def norm(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self.busy and args and isinstance(output, Tensor) and isinstance(args[0], Tensor):
            if self.waiting and self.waiting[0].x.shape == args[0].shape:
                self.settle(args[0].detach())
            self.recent = [*self.recent[1 - _RECENT :], (output, args[0])]

    def see(self, s: Submodule) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            stream = self.streams[s.path]
            if not stream.refused and not self.busy:
                self.take(s, stream, args, kwargs, output)

        return hook

    def finish(self, s: Submodule) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            stream, x = self.streams[s.path], self.begun.pop(s.path, None)
            if x is None or stream.refused:
                return
            if not isinstance(output, Tensor) or output.shape != x.shape:
                stream.refused = "its output has another shape than its input"
            else:
                self.arrive(s, stream, x, output)

        return hook

    def take(self, s: Submodule, stream: Stream, args: tuple, kwargs: dict, output: Any) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        named = kwargs.get("hidden_states")
        x = named if isinstance(named, Tensor) else x
        first = output[0] if isinstance(output, tuple) and output else output
        if x is None or x.shape[-1] != s.width:
            stream.refused = "it takes no tensor of tokens"
            return
        if s.function is None:
            if _second_stream(x, args, kwargs):
                stream.refused = "it reads a second stream"
                return
            if s.end is None and (not isinstance(first, Tensor) or first.shape != x.shape):
                stream.refused = f"it returns a {type(first).__name__} of another shape"
                return
        stream.outputs = len(output) if isinstance(output, tuple) and s.function is None else 0
        if s.end is not None:
            self.begun[s.path] = x
            return
        y = first
        if s.function is not None:
            self.busy = True  # a function may call the very module that is watched
            y = s.function(x.reshape(-1, s.width)).view_as(x)
            self.busy = False
        self.arrive(s, stream, x, y)

    def arrive(self, s: Submodule, stream: Stream, x: Tensor, y: Tensor) -> None:
        """Input and output are there; the residual may have to wait for the next norm."""
        before = next((i for o, i in self.recent if o is x or _same(o, x)), None)
        if before is None or before.shape != x.shape:
            stream.post_norm = True  # no norm: the input is what the output is added to
        call = _Call(s, stream, x.detach(), None if before is None else before.detach(), y.detach())
        self.waiting.append(call)
        if stream.post_norm is not None:
            self.settle(None)

    def settle(self, sum_: Tensor | None) -> None:
        """Take the calls that wait for the next norm, whose input is r + y: which r was it?"""
        calls, self.waiting = self.waiting, []
        for call in calls:
            if call.stream.post_norm is None and sum_ is not None and call.before is not None:
                call.stream.post_norm = _nearer(sum_ - call.y, call.x, call.before)
                if call.place.adds_input and not call.stream.post_norm:
                    call.stream.refused = "what it is added to was not found"
            r = call.x if call.stream.post_norm or call.before is None else call.before
            x, base, y = (select_tokens(t, self.mask, call.place.path) for t in (call.x, r, call.y))
            self.add(call.place, call.stream, x, base, y)

    def add(self, s: Submodule, stream: Stream, x: Tensor, r: Tensor, y: Tensor) -> None:
        after = (r.double() + y.double()).square().sum(dim=1)
        if not bool(torch.isfinite(after).all()):
            raise CalibrationError(
                "what a submodule adds to the residual stream is finite",
                got=f"NaN or infinite numbers at {s.path!r}",
                fix="Run the model in float32, or leave padded rows out with mask_fn.",
            )
        weight = 1 / after.clamp(min=1e-30)
        stream.count(r, y)
        if not self.held:
            stream.moments.update(x, y, weight)
            return
        room = _SAMPLE - sum(map(len, stream.x))
        if room > 0:
            step = max(1, len(x) // _A_BATCH)
            for kept, rows in ((stream.x, x), (stream.y, y), (stream.weight, weight)):
                kept.append(rows[::step][:room].clone())


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by its name: all libraries have their own classes."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _nearer(r: Tensor, x: Tensor, before: Tensor) -> bool | None:
    """Whether the residual is x; None when it is neither (both parts of a parallel block)."""
    size = r.double().norm().clamp(min=1e-30)
    errors = [float((r.double() - t.double()).norm() / size) for t in (x, before)]
    return None if min(errors) > 0.01 else errors[0] < errors[1]


def _second_stream(x: Tensor, args: tuple, kwargs: dict) -> bool:
    """Whether keys and values come from elsewhere: by name, or as arguments like torch's own."""
    if any(kwargs.get(name) is not None for name in _SECOND):
        return True
    near = (*args[:3], *(kwargs.get(name) for name in ("query", "key", "value")))
    others = [t for t in near if isinstance(t, Tensor) and t.dim() == x.dim()]
    return any(t.shape[-1] == x.shape[-1] and not (t is x or _same(t, x)) for t in others)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape
