"""A unit of work with its inputs at fixed places: on a GPU captured once as a CUDA graph and replayed, on the CPU just called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import torch

OutT = TypeVar("OutT")

# Host rows that may be on their way to the device at a time; a unit takes a few.
_UPLOADS = 512
WARM_UP_RUNS = 2


class Uploads:
    """Small integers for the device, from pinned memory: a copy that the host does not wait for."""

    def __init__(self, device: torch.device, width: int) -> None:
        self._pinned = device.type == "cuda"
        self._ring = torch.zeros(_UPLOADS, width, dtype=torch.int32, pin_memory=self._pinned)
        self._next = 0

    def send(self, values: Sequence[int], into: torch.Tensor) -> None:
        """values into the first elements of into, (width or less,) int32."""
        source = self._ring[self._next, : len(values)]
        self._next = (self._next + 1) % _UPLOADS
        source.copy_(torch.tensor(values, dtype=torch.int32))
        into[: len(values)].copy_(source, non_blocking=True)


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
            # What compiles or sets up on first use must not happen inside a capture.
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
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
