"""Units that were handed to a device which runs them one after the other: when each is done, and when the device is free."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import torch

# The next unit is decided so long before the device is free: late, for a chunk that comes in between, and early enough for a
# thread that has to wait for the interpreter. With 1.2 ms a device that was full of text and chunks stood still for 6 % of
# the time.
LEAD_S = 0.0025
# Units that the device may have before it, the running one included, those counted that nobody has noticed the end of.
MAX_AHEAD = 8


class DeviceTimes:
    """When a device began with what was launched, and when it was done with it; called, it waits for that and answers the
    seconds between.
    """

    def __init__(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._begin = begin
        self._end = end

    def __call__(self) -> float:
        self._end.synchronize()
        return _seconds(self._begin, self._end)

    def gap_s(self, before: DeviceTimes) -> float:
        """How long it stood still between what was launched before and this, which are both done."""
        return _seconds(before._end, self._begin)


def _seconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3


def timed(device: torch.device, launch: Callable[[], torch.cuda.Event | None]) -> Callable[[], float]:
    """Launches work; what is answered waits until the device has done it and says how many seconds it took there.

    Args:
        launch: Answers when the device began, where that was with something that was launched before.
    """
    if device.type != "cuda":
        started_s = time.perf_counter()
        launch()
        seconds = time.perf_counter() - started_s
        return lambda: seconds
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    stream = torch.cuda.current_stream(device)
    begin.record(stream)
    begin = launch() or begin
    end.record(stream)
    return DeviceTimes(begin, end)


def gap_s(before: Callable[[], float] | None, after: Callable[[], float]) -> float | None:
    """How long a device stood still between two that timed() answered, which are both done; None where nobody knows."""
    return after.gap_s(before) if isinstance(before, DeviceTimes) and isinstance(after, DeviceTimes) else None


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that is there when the device has done what was asked."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def arrival(device: torch.device) -> Callable[[], None]:
    """What is answered waits until copies that were asked of the device so far have arrived in the host's memory."""
    if device.type != "cuda":
        return _is_here
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))
    wait: Callable[[], None] = copied.synchronize
    return wait


def _is_here() -> None:
    """On the CPU a copy is made at once."""


class DeviceLine:
    """What a device has before it, by what units are expected to take. Pure: the clock is an argument."""

    def __init__(self, *, lead_s: float = LEAD_S, max_ahead: int = MAX_AHEAD) -> None:
        self._lead_s = lead_s
        self._max_ahead = max_ahead
        # When each unit was launched, and how long it is expected to take.
        self._units: deque[tuple[float, float]] = deque()
        self._free_s = 0.0

    def __len__(self) -> int:
        return len(self._units)

    def add(self, expected_s: float, now_s: float) -> None:
        """A unit was launched."""
        self._free_s = self.free_s(now_s) + expected_s
        self._units.append((now_s, expected_s))

    def done(self, ended_s: float) -> None:
        """The first unit is done, since then."""
        self._units.popleft()
        self._free_s = ended_s
        for launched_s, expected_s in self._units:
            self._free_s = max(self._free_s, launched_s) + expected_s

    def free_s(self, now_s: float) -> float:
        """When a unit that is launched now would begin."""
        return max(now_s, self._free_s) if self._units else now_s

    def patience_s(self, now_s: float) -> float | None:
        """How long the next decision can wait; None: until a unit is done."""
        if len(self._units) >= self._max_ahead:
            return None
        return max(0.0, self.free_s(now_s) - self._lead_s - now_s)
