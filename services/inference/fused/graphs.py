"""A unit of work with its inputs at fixed places: on a GPU captured once as a CUDA graph and replayed, on the CPU called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

OutT = TypeVar("OutT")

# Copies that may be on their way to the device at a time; a unit takes one or a few.
_SEGMENTS, _SEGMENT = 4, 32
WARM_UP_RUNS = 2


class Uploads:
    """Integers for the device, from pinned memory: copies that the host does not wait for.

    Copies take places in turn. A place is written again only when its copy is done: one event stands for a segment of them.
    """

    def __init__(self, device: torch.device, width: int) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self._events = [torch.cuda.Event() for _ in range(_SEGMENTS)]  # type: ignore[no-untyped-call]
        self._places = torch.zeros(_SEGMENTS * _SEGMENT, width, dtype=torch.int32, pin_memory=bool(self._events))
        self._next = 0

    def send(self, values: Sequence[int], into: torch.Tensor) -> None:
        """values into the first elements of into, (width or less,) int32."""
        segment, place = divmod(self._next, _SEGMENT)
        if self._events and place == 0:
            self._events[segment - 1].record()
            self._events[segment].synchronize()
        source = self._places[self._next, : len(values)]
        source.copy_(torch.tensor(values, dtype=torch.int32))
        into[: len(values)].copy_(source, non_blocking=True)
        self._next = (self._next + 1) % (_SEGMENTS * _SEGMENT)


class Recorded(Generic[OutT]):
    """Calls unit(**inputs).

    Attributes:
        inputs: Written before run().
        outputs: What unit answered; the same memory at every run, so read it before the next one.
    """

    def __init__(self, unit: Callable[..., OutT], inputs: Mapping[str, torch.Tensor], pool: GraphPool) -> None:
        self.inputs = dict(inputs)
        self._unit = unit
        self._graph: torch.cuda.CUDAGraph | None = None
        self.outputs: OutT
        with torch.inference_mode():
            if pool.handle is None:
                return
            assert pool.stream is not None
            # What compiles or sets up on first use must not happen inside a capture; it reads the inputs as just filled.
            pool.stream.wait_stream(torch.cuda.current_stream(pool.stream.device))
            with torch.cuda.stream(pool.stream):
                for _ in range(WARM_UP_RUNS):
                    unit(**self.inputs)
            pool.stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool.handle, stream=pool.stream):
                self.outputs = unit(**self.inputs)

    def run(self) -> OutT:
        if self._graph is None:
            with torch.inference_mode():
                self.outputs = self._unit(**self.inputs)
        else:
            self._graph.replay()
        return self.outputs


class GraphPool:
    """Memory that all graphs of one network share: they never run at the same time.

    Outputs that outlive a replay of another graph must be copied: the memory behind them is reused.
    """

    def __init__(self, device: torch.device) -> None:
        self.handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
