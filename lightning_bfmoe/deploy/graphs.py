"""A decode step as a CUDA graph: captured once, then replayed without Python in between."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_bfmoe.errors import BFMoEError

_WARM_UP = 3  # kernels are compiled and libraries set up before anything is captured


class GraphedStep:
    """A function of one tensor, captured with its buffers; call it with new values.

    Args:
        function: From a tensor to a tensor; all else that it reads or writes keeps its address, and
            it does not wait for the GPU.
        example: An input; replays read it from here.
        state: What the function moves on: put back after the trial runs.
        alive: What it reads besides; held as long as the graph, which knows only addresses.

    Raises:
        BFMoEError: The function cannot be captured.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        example: Tensor,
        state: Sequence[Tensor],
        alive: object = None,
    ) -> None:
        self._input, self._alive = example, alive
        before = [tensor.clone() for tensor in state]

        def put_back() -> None:
            for tensor, value in zip(state, before, strict=True):
                tensor.copy_(value)

        with torch.cuda.device(example.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    function(self._input)
                    put_back()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(self._graph):
                    self._output = function(self._input)
            except Exception as error:  # whatever a stranger's model does
                raise BFMoEError(
                    "a step that is captured as a CUDA graph must not wait for the GPU",
                    got=f"{type(error).__name__}: {str(error).splitlines()[0]}",
                    fix="Decode without: TokenGenerator(model, cuda_graph=False).",
                ) from error

    def __call__(self, values: Tensor) -> Tensor:
        """Replay; the result is overwritten by the next call."""
        self._input.copy_(values)
        self._graph.replay()
        return self._output
