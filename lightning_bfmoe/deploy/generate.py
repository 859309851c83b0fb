"""`TokenGenerator`: text from a model, token by token, for several prompts at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.decoding import PrefixDecoding, find_decoding, is_hugging_face
from lightning_bfmoe.deploy.sampling import Chooser, Sampling
from lightning_bfmoe.deploy.slots import unwrap
from lightning_bfmoe.errors import BFMoEError, ConfigError, ShapeError

Prompt = Sequence[int] | Tensor
DEFAULT = Sampling()


class Step(NamedTuple):
    """What one step adds to each prompt."""

    tokens: list[int | None]
    """The new token; None for a row that has ended."""
    finished: list[str | None]
    """Why a row has ended: `stop` (a stop token) or `length`; None while it goes on."""


@dataclass
class Continuation:
    """What was added to one prompt."""

    tokens: list[int] = field(default_factory=list)
    finished: str = ""
    """`stop` or `length`."""


class TokenGenerator:
    """Continues prompts with a causal language model, as a stream or at once.

    With a cache each token costs one position's work. A model takes part in one of three ways:

    * its `forward(tokens, cache=None)` uses a `deploy.KVCache`, as that of `examples/gpt.py` does;
    * it is a causal model of `transformers`, which brings its own static cache;
    * anything else, and only when asked with `cache=False`, computes the whole prefix anew for
      every token. The tokens are the same.

    On CUDA the step is captured as a CUDA graph, once per number of prompts; the buffers of each
    stay allocated for the whole context. On the CPU the same code runs step by step, with a cache
    as long as the request needs.

    Example:
        >>> class Next(nn.Module):  # the token that follows t is t + 1
        ...     context = 10
        ...     def forward(self, tokens):
        ...         return torch.nn.functional.one_hot(tokens + 1, 20).float()
        >>> generator = TokenGenerator(Next(), cache=False)
        >>> generator.generate([[1, 2], [7]], Sampling(3, temperature=0, stop=[9]))
        [Continuation(tokens=[3, 4, 5], finished='length'),
         Continuation(tokens=[8], finished='stop')]

    Args:
        model: Put in eval mode. It is loaded, cast and moved before: a graph knows addresses.
        context: Most tokens of a prompt with its continuation; None: what the model says
            (`model.context`, or `config.max_position_embeddings`).
        cache: False: compute the prefix anew for every token.
        cuda_graph: None: on CUDA, with a cache.

    Raises:
        ConfigError: The model has no context, or cannot decode with a cache.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        context: int | None = None,
        cache: bool = True,
        cuda_graph: bool | None = None,
    ) -> None:
        self.model = model.eval()
        tensors = [*model.parameters(), *model.buffers()]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.context = _context(model, context)
        kind = find_decoding(model, cache)
        can = self.device.type == "cuda" and kind is not PrefixDecoding
        if cuda_graph and not can:
            raise ConfigError(
                "a CUDA graph needs a model on CUDA that decodes with a cache",
                got=f"{self.device}, cache={cache}",
                fix="Leave cuda_graph out.",
            )
        self.decoding = kind(model, self.context, self.device, can and cuda_graph is not False)
        tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
        self.vocabulary = max(tables, default=None)
        """Ids the model knows, by its largest embedding; None without one."""
        self._addresses = self._where()
        self._busy = False

    def stream(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = DEFAULT
    ) -> Iterator[Step]:
        """Yield the new tokens, one step after the other; all checks come before the first.

        Args:
            prompts: Token ids, at least one a prompt.
            sampling: Settings for all prompts, or for each.

        Raises:
            ConfigError: A prompt is empty, too long or has unknown tokens, or settings do not fit.
            ShapeError: A prompt is no row of integers.
        """
        rows = [self.check(prompt) for prompt in prompts]
        settings = [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
        if not rows or len(settings) != len(rows):
            raise ConfigError(
                "there is at least one prompt, and one Sampling for all or for each",
                got=f"{len(rows)} prompts, {len(settings)} settings",
                fix="Pass lists of equal length.",
            )
        new = [self.room(len(row), s.max_new_tokens) for row, s in zip(rows, settings, strict=True)]
        if self._busy:
            raise ConfigError(
                "one stream of a generator runs at a time",
                fix="Exhaust or close() the one before, or use a second TokenGenerator.",
            )
        here, before = self._where(), self._addresses
        if here[0] != before[0] or (self.decoding.keeps and here != before):
            raise ConfigError(
                "the model stays where it is while a generator uses it",
                fix="Make a new TokenGenerator after moving, casting or loading.",
            )
        return self._stream(rows, settings, new)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling | Sequence[Sampling] = DEFAULT
    ) -> list[Continuation]:
        """All new tokens of each prompt; arguments and errors as in `stream`."""
        found = [Continuation() for _ in prompts]
        for step in self.stream(prompts, sampling):
            for row, token, reason in zip(found, *step, strict=True):
                if token is not None:
                    row.tokens.append(token)
                row.finished = reason or ""
        return found

    def check(self, prompt: Prompt) -> list[int]:
        """A prompt's ids, checked.

        Raises:
            ConfigError: It is empty, fills the context, or has a token unknown to the model.
            ShapeError: It is no row of integers.
        """
        ids = prompt.tolist() if isinstance(prompt, Tensor) else list(prompt)
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise ShapeError(
                "a prompt is one row of integer token ids",
                got=f"{prompt!r:.80}",
                fix="Pass each prompt as a list of ints or a 1-d int64 tensor.",
            )
        if not ids:
            raise ConfigError("a prompt has at least one token", got="none", fix="Add one.")
        unknown = [t for t in ids if t < 0 or (self.vocabulary and t >= self.vocabulary)]
        if unknown:
            raise ConfigError(
                f"the model knows the tokens 0 .. {(self.vocabulary or 0) - 1}",
                got=f"token {unknown[0]}",
                fix="Use the tokenizer of the training.",
            )
        self.room(len(ids), None)
        return ids

    def room(self, length: int, new: int | None) -> int:
        """How many tokens a prompt of `length` tokens may add.

        Raises:
            ConfigError: More are asked for than the context has room for.
        """
        free = self.context - length
        if free < (new or 1):
            raise ConfigError(
                f"a prompt and its continuation fit the context of {self.context} tokens",
                got=f"{length} tokens and {new or 1} new",
                fix="Shorten the prompt or ask for fewer tokens.",
            )
        return new or free

    def _stream(
        self, rows: list[list[int]], settings: list[Sampling], new: list[int]
    ) -> Iterator[Step]:
        self._busy = True
        try:
            chooser = Chooser(settings, max(new), self.device)
            stops = [frozenset(s.stop) for s in settings]
            finished: list[str | None] = [None] * len(rows)
            logits = self._run(self.decoding.prefill, rows, new)
            for step in range(max(new)):
                chosen = chooser(logits, step)
                tokens: list[int | None] = list(chosen.tolist())
                for row, token in enumerate(tokens):
                    if token == -1 and finished[row] is None:
                        raise BFMoEError(
                            "the logits of a model are finite",
                            got=f"NaN or infinite ones for prompt {row} after {step} new tokens",
                            fix="Check its weights; fp16 may need bfloat16.",
                        )
                    if finished[row] is not None or token in stops[row]:
                        tokens[row] = None
                        finished[row] = finished[row] or "stop"
                    elif step + 1 == new[row]:
                        finished[row] = "length"
                yield Step(tokens, list(finished))
                if None not in finished:
                    return
                logits = self._run(self.decoding.step, chosen.clamp(min=0))
        finally:
            self._busy = False

    def _run(self, function: Callable[..., Tensor], *args: object) -> Tensor:
        with torch.no_grad():
            return function(*args)

    def _where(self) -> tuple[object, ...]:
        """The model's device and dtype, and the addresses of its tensors."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        first = (tensors[0].device, tensors[0].dtype) if tensors else None
        return first, *(tensor.data_ptr() for tensor in tensors)


def _context(model: nn.Module, given: int | None) -> int:
    """Most tokens that a model looks at."""
    inner = unwrap(model)
    own = getattr(inner, "context", None)
    if is_hugging_face(model):
        own = getattr(inner.config, "max_position_embeddings", None)
    context = own if given is None else given
    limit = own if isinstance(own, int) else math.inf
    if not isinstance(context, int) or not 1 <= context <= limit:
        raise ConfigError(
            "context is the number of tokens that the model can look at",
            got=f"context={given!r}, and the model says {own!r}",
            fix="Pass context=, or give the model an attribute `context`.",
        )
    return context
