"""A unit of work with its inputs at fixed places: on a GPU captured once as a CUDA graph and replayed, on the CPU called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy.typing as npt
import torch

OutT = TypeVar("OutT")

# Events that stand for the copies on their way to the device.
_SEGMENTS = 4
WARM_UP_RUNS = 2


class Uploads:
    """Numbers for the device, from pinned memory: copies that the host does not wait for.

    Copies take places in turn. A place is written again only when its copy is done: one event stands for a segment of them.

    Args:
        width: Numbers of a place.
        num_places: Copies that may be on their way at a time, a multiple of 4; a unit takes one or a few.
    """

    def __init__(self, device: torch.device, width: int, dtype: torch.dtype = torch.int32, num_places: int = 128) -> None:
        self._events: list[torch.cuda.Event] = []
        self._device = device
        if device.type == "cuda":
            self._events = [torch.cuda.Event() for _ in range(_SEGMENTS)]  # type: ignore[no-untyped-call]
        self._num_places, self._segment = num_places, num_places // _SEGMENTS
        self._pinned = torch.zeros(num_places, width, dtype=dtype, pin_memory=bool(self._events))
        # The same memory: writing through NumPy takes a tenth of the time.
        self._places: npt.NDArray[Any] = self._pinned.numpy()
        self._next = 0

    def place(self) -> npt.NDArray[Any]:
        """(width,) to be filled for the next send_place()."""
        segment, place = divmod(self._next, self._segment)
        if self._events and place == 0:
            self._events[segment - 1].record(torch.cuda.current_stream(self._device))
            self._events[segment].synchronize()
        found: npt.NDArray[Any] = self._places[self._next]
        return found

    def send_place(self, into: torch.Tensor) -> None:
        """What place() was filled with, into the elements of into, which are in one piece."""
        source = self._pinned[self._next, : into.numel()]
        into.view(-1).copy_(source, non_blocking=True)
        self._next = (self._next + 1) % self._num_places

    def send(self, values: Sequence[int], into: torch.Tensor) -> None:
        """values into the first elements of into, (width or less,)."""
        self.place()[: len(values)] = values
        self.send_place(into[: len(values)])


class Recorded(Generic[OutT]):
    """Calls unit(**inputs).

    Attributes:
        inputs: Written before run().
        outputs: What unit answered; the same memory at every run, so read it before the next one.
    """

    def __init__(self, unit: Callable[..., OutT], inputs: Mapping[str, torch.Tensor], pool: GraphPool) -> None:
        self.inputs = dict(inputs)
        self._unit = unit
        self._pool = pool
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
        self._pool.num_runs += 1
        if self._graph is None:
            with torch.inference_mode():
                self.outputs = self._unit(**self.inputs)
        else:
            self._graph.replay()
        return self.outputs


class GraphPool:
    """Memory that all graphs of one network share: they never run at the same time.

    Outputs that outlive a replay of another graph must be copied: the memory behind them is reused.

    Attributes:
        num_runs: Of all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self.num_runs = 0
        self.handle = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
