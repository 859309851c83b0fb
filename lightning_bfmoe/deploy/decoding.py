"""Three ways to get the next token's logits: with a cache, through Hugging Face's, or with none.

Each has `prefill(prompts)` and `step(tokens)`, from ids to logits (rows, vocabulary). All rows go
on together; one that has ended is computed along and ignored.
"""

import inspect
import sys
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bfmoe.deploy.cache import KVCache
from lightning_bfmoe.deploy.graphs import GraphedStep
from lightning_bfmoe.deploy.slots import unwrap
from lightning_bfmoe.errors import ConfigError

Prompts = list[list[int]]


class Decoding(ABC):
    """One batch at a time: `prefill`, then `step` after `step`.

    Args:
        model: From ids (rows, time) to logits (rows, time, vocabulary), bare or as `.logits`.
        context: Most tokens of a row.
        device: Where the model computes.
        graph: Capture a step as a CUDA graph, once per number of rows.
    """

    def __init__(self, model: nn.Module, context: int, device: torch.device, graph: bool) -> None:
        self.model, self.context, self.device, self.graph = model, context, device, graph

    @property
    def keeps(self) -> bool:
        """Whether buffers outlive a batch, so that the model must stay as it is."""
        return self.graph

    @abstractmethod
    def prefill(self, prompts: Prompts, new: list[int]) -> Tensor:
        """Take in the prompts; the logits behind the last token of each.

        Args:
            prompts: Ids, at least one a row.
            new: Tokens that each row may add.
        """

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Take in one token a row, (rows,) int64; the logits behind it."""

    def logits(self, *args: Any, **options: Any) -> Tensor:
        """What the model says, (rows, time, vocabulary)."""
        output = self.model(*args, **options)
        output = getattr(output, "logits", output)
        if not isinstance(output, Tensor) or output.dim() != 3:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ConfigError(
                "a model that generates maps ids (rows, time) to logits (rows, time, vocabulary)",
                got=shape,
                fix="Wrap it in a module that does.",
            )
        return output


class CachedDecoding(Decoding):
    """A model whose `forward(tokens, cache=None)` reads and fills a `KVCache`."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._steps: dict[int, tuple[KVCache, GraphedStep]] = {}  # by number of rows
        self._cache: KVCache | None = None
        self._captured: GraphedStep | None = None
        self._longest = 0

    def prefill(self, prompts: Prompts, new: list[int]) -> Tensor:
        rows, lengths = len(prompts), [len(prompt) for prompt in prompts]
        self._longest = max(lengths)
        known = self._steps.get(rows)
        if known is not None:  # a graph reads and writes the buffers it was captured with
            cache = known[0]
            cache.lengths.zero_()
        else:
            ends = [length + more for length, more in zip(lengths, new, strict=True)]
            cache = KVCache(rows, self.context if self.graph else max(ends), self.device)
        self._cache = cache
        cache.begin(self._longest, self._longest)
        ids = torch.zeros(rows, self._longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : len(prompt)] = torch.tensor(prompt)
        last = torch.tensor(lengths, device=self.device) - 1
        logits = self.logits(ids.to(self.device), cache=cache)
        cache.lengths.copy_(last + 1)
        if self.graph and known is None:
            self._steps[rows] = cache, self._capture(cache, rows)
        self._captured = self._steps[rows][1] if self.graph else None
        return logits[torch.arange(rows, device=self.device), last]

    def step(self, tokens: Tensor) -> Tensor:
        if self._captured is not None:
            return self._captured(tokens)
        assert self._cache is not None
        self._longest = min(self._longest + 1, self._cache.length)
        return self._advance(tokens, self._cache, self._longest)

    def _advance(self, tokens: Tensor, cache: KVCache, visible: int) -> Tensor:
        cache.begin(1, visible)
        logits = self.logits(tokens[:, None], cache=cache)[:, -1]
        cache.lengths.add_(1)
        return logits

    def _capture(self, cache: KVCache, rows: int) -> GraphedStep:
        return GraphedStep(
            lambda tokens: self._advance(tokens, cache, cache.length),
            torch.zeros(rows, dtype=torch.int64, device=self.device),
            state=[cache.lengths],
            alive=_kept(self.model),
        )


class HuggingFaceDecoding(Decoding):
    """A causal model of `transformers`, with its own `StaticCache`.

    That cache has one place for all rows, so prompts of unequal length are filled up on the left,
    and the longest prompt with the most new tokens must fit the context.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._states: dict[int, dict[str, Any]] = {}  # by number of rows
        self._state: dict[str, Any] = {}

    @property
    def keeps(self) -> bool:
        return True

    def prefill(self, prompts: Prompts, new: list[int]) -> Tensor:
        rows, longest = len(prompts), max(map(len, prompts))
        if longest + max(new) > self.context:
            raise ConfigError(
                f"the longest prompt and the most new tokens of a batch fit {self.context} places",
                got=f"{longest} + {max(new)}",
                fix="Ask for prompts of such different length one after the other.",
            )
        ids = torch.zeros(rows, longest, dtype=torch.int64)
        mask = torch.ones(rows, self.context, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, : longest - len(prompt)] = 0
        places = (mask[:, :longest].cumsum(1) - 1).clamp(min=0)
        fresh = rows not in self._states
        if fresh:
            self._states[rows] = {
                "cache": self._new_cache(rows),
                "mask": mask.to(self.device),
                "places": places[:, -1:].to(self.device),
            }
        self._state = state = self._states[rows]
        state["cache"].reset()
        state["mask"].copy_(mask)
        logits = self._run(ids.to(self.device), places.to(self.device))
        state["places"].copy_(places[:, -1:])
        if self.graph and fresh:
            state["step"] = GraphedStep(
                self._advance,
                torch.zeros(rows, dtype=torch.int64, device=self.device),
                state=[state["places"], *_lengths(state["cache"])],
                alive=_kept(self.model),
            )
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self._state.get("step", self._advance)(tokens)
        return logits

    def _advance(self, tokens: Tensor) -> Tensor:
        places = self._state["places"].add_(1)
        return self._run(tokens[:, None], places)

    def _run(self, ids: Tensor, places: Tensor) -> Tensor:
        state = self._state
        return self.logits(
            input_ids=ids, attention_mask=state["mask"], position_ids=places,
            past_key_values=state["cache"], use_cache=True,
        )[:, -1]  # fmt: skip

    def _new_cache(self, rows: int) -> Any:
        from transformers import StaticCache

        config = unwrap(self.model).config
        dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        cache: Any = StaticCache(
            config=config, max_cache_len=self.context, max_batch_size=rows, device=self.device,
            dtype=dtype,
        )  # fmt: skip
        return cache


class PrefixDecoding(Decoding):
    """Any causal model: the whole prefix is computed anew for every token."""

    def prefill(self, prompts: Prompts, new: list[int]) -> Tensor:
        self._rows = [list(prompt) for prompt in prompts]
        return self._run()

    def step(self, tokens: Tensor) -> Tensor:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            if len(row) < self.context:  # longer only is a row that has ended
                row.append(token)
        return self._run()

    def _run(self) -> Tensor:
        lengths = torch.tensor([len(row) for row in self._rows], device=self.device)
        longest = max(map(len, self._rows))
        # What stands behind a row's last token is not looked at from before it.
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in self._rows])
        logits = self.logits(ids.to(self.device))
        return logits[torch.arange(len(self._rows), device=self.device), lengths - 1]


def _kept(model: nn.Module) -> list[Any]:
    """Dense matrices and angles that packed layers keep until they are asked for another dtype."""
    return [getattr(module, "_cache", None) for module in model.modules()]


def _lengths(cache: Any) -> list[Tensor]:
    """What a step moves on in each layer of a `StaticCache`, as far as a graph may move it.

    Raises:
        ConfigError: A layer counts in Python (a sliding window): a replay would not move that.
    """
    layers = getattr(cache, "layers", [])
    lengths = [layer.cumulative_length for layer in layers if type(layer).__name__ == "StaticLayer"]
    if not lengths or len(lengths) != len(layers):
        raise ConfigError(
            "a CUDA graph needs plain static layers in the cache",
            got=sorted({type(layer).__name__ for layer in layers}) or type(cache).__name__,
            fix="Decode without: TokenGenerator(model, cuda_graph=False).",
        )
    return lengths


def is_hugging_face(model: nn.Module) -> bool:
    """Whether it is a model of `transformers`; which is not imported for the question."""
    library = sys.modules.get("transformers")
    return library is not None and isinstance(unwrap(model), library.PreTrainedModel)


def find_decoding(model: nn.Module, cache: bool) -> type[Decoding]:
    """The way for a model.

    Raises:
        ConfigError: It cannot decode with a cache, and nobody said that it may go without.
    """
    if not cache:
        return PrefixDecoding
    inner = unwrap(model)
    if is_hugging_face(model):
        static = (
            getattr(inner, n, True) for n in ("_can_compile_fullgraph", "_supports_static_cache")
        )
        needed = {"attention_mask", "position_ids", "past_key_values"}
        if all(static) and needed <= set(inspect.signature(inner.forward).parameters):
            return HuggingFaceDecoding
        fix = "This architecture has no static cache; pass cache=False."
    elif "cache" in inspect.signature(inner.forward).parameters:
        return CachedDecoding
    else:
        fix = (
            "Give its forward a `cache=None` (docs/deploy.md, three lines), or pass cache=False "
            "(bfmoe run: --cache false): then every token computes the whole prefix anew."
        )
    raise ConfigError(
        "a model that decodes with a cache takes one in forward(tokens, cache=None)",
        got=type(inner).__name__,
        fix=fix,
    )
