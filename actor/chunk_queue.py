"""Which action of which chunk is for which tick: bookkeeping of real-time chunking (Black et al. 2025, arXiv 2506.07339).

Shapes: S steps of a chunk, R action size of the robot, A action size of the model.

A tick here counts executed actions of the episode, not time: a robot that holds has not moved on, so a chunk that arrives
after a hold starts at the action its observation asked for. Pure: no clock, no thread, no network.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manyhands.common.v1 import common_pb2

from .interpolation import interpolate

# Round trips that the delay estimate looks back on.
DELAY_WINDOW = 16
DELAY_QUANTILE = 0.9


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a policy answered for one observation.

    Attributes:
        request_id: Of the request.
        first_tick: Tick of the first row; the tick of the observation.
        actions: (S, R) float32, the robot's units.
        model_actions: (S, A) float32, normalised; row i is the same step as actions[i].
        version: Weights that made it.
        observed_s: When the observation was asked for, on the caller's monotonic clock, seconds.
    """

    request_id: int
    first_tick: int
    actions: npt.NDArray[np.float32]
    model_actions: npt.NDArray[np.float32]
    version: common_pb2.PolicyVersion
    observed_s: float


@dataclass(frozen=True, kw_only=True)
class PlannedAction:
    """One action to execute: (R,) float32, with the weights and the age (seconds) of the observation behind it."""

    values: npt.NDArray[np.float32]
    version: common_pb2.PolicyVersion
    age_s: float
    request_id: int


@dataclass(frozen=True, kw_only=True)
class Merge:
    """What became of a chunk.

    Attributes:
        delay_steps: Actions executed since its observation: the real delay, dropped from its front.
        replaced_used_count: Actions executed of the chunk that it replaces.
        accepted: False when a newer chunk is here already or every action of this one came too late.
    """

    delay_steps: int
    replaced_used_count: int
    accepted: bool


class ChunkQueue:
    """Actions by tick, newest observation first.

    Args:
        replan_interval_steps: Actions to execute between two requests, > 0.
        max_age_s: An action whose observation is older is never handed out.
        ticks_per_step: Robot ticks in a step of the model (interpolation).
    """

    def __init__(self, *, replan_interval_steps: int, max_age_s: float, ticks_per_step: int = 1) -> None:
        self._own_interval_steps = replan_interval_steps
        self.replan_interval_steps = replan_interval_steps
        self._max_age_s = max_age_s
        self._factor = ticks_per_step
        self._waits: deque[int] = deque(maxlen=DELAY_WINDOW)
        self._chunk: Chunk | None = None
        self._by_tick: npt.NDArray[np.float32] = np.zeros((0, 0), np.float32)
        self._used_count = 0
        self._last_request_tick: int | None = None

    def clear(self) -> None:
        """A new episode, or a person moved the robot: nothing planned so far counts. The delay estimate stays."""
        self._chunk = None
        self._by_tick = np.zeros((0, 0), np.float32)
        self._used_count = 0
        self._last_request_tick = None

    def merge(self, chunk: Chunk, *, now_tick: int, waited_ticks: int) -> Merge:
        """Takes a chunk in, at the moment before tick now_tick is executed.

        waited_ticks: Control periods from the observation to now. Equal to the real delay unless the robot held meanwhile;
        only the delay estimate uses it.

        Actions for ticks before now_tick are dropped, the rest replaces what was planned. A chunk of an older observation
        than the present one's, or without an action left, changes nothing.
        """
        self._waits.append(waited_ticks)
        delay = now_tick - chunk.first_tick
        by_tick = interpolate(chunk.actions, self._factor)
        outdated = self._chunk is not None and chunk.first_tick < self._chunk.first_tick
        if outdated or delay < 0 or delay >= len(by_tick):
            return Merge(delay_steps=delay, replaced_used_count=0, accepted=False)
        replaced_used_count = self._used_count
        self._chunk, self._by_tick, self._used_count = chunk, by_tick, 0
        return Merge(delay_steps=delay, replaced_used_count=replaced_used_count, accepted=True)

    def take(self, tick: int, now_s: float) -> PlannedAction | None:
        """The action for tick; None when no chunk covers it or the observation behind it is over the age bound."""
        if self._chunk is None or self.remaining(tick) == 0:
            return None
        age_s = now_s - self._chunk.observed_s
        if age_s > self._max_age_s:  # wants_chunk() says the same, or the robot would hold for ever.
            return None
        self._used_count += 1
        return PlannedAction(
            values=self._by_tick[tick - self._chunk.first_tick],
            version=self._chunk.version,
            age_s=age_s,
            request_id=self._chunk.request_id,
        )

    def remaining(self, tick: int) -> int:
        """Actions planned from tick on."""
        if self._chunk is None or tick < self._chunk.first_tick:
            return 0
        return max(0, len(self._by_tick) - (tick - self._chunk.first_tick))

    def leftover(self, tick: int) -> npt.NDArray[np.float32] | None:
        """The committed prefix of a request made at tick: (steps left, A) float32 in model space, row 0 for tick itself."""
        if self._chunk is None or self.remaining(tick) == 0:
            return None
        # Requests are made on the chunk's own steps (wants_chunk), so the division leaves nothing.
        rows = self._chunk.model_actions[(tick - self._chunk.first_tick) // self._factor :]
        return rows if len(rows) else None

    def delay_steps(self, tick: int) -> int:
        """Steps of the model that will have been executed when the answer to a request made at tick arrives.

        A high quantile of recent round trips: guessing too long costs a little reactivity, too short costs a jump. Never
        more than what is left to execute.
        """
        if not self._waits:
            return 0
        expected_ticks = float(np.quantile(np.asarray(self._waits), DELAY_QUANTILE, method="higher"))
        steps = math.ceil(expected_ticks / self._factor)
        leftover = self.leftover(tick)
        return min(steps, 0 if leftover is None else len(leftover))

    def wants_chunk(self, tick: int, now_s: float) -> bool:
        """Whether to ask now: the interval is over, what is left is too old or would not outlast a round trip."""
        if self._chunk is None or self._last_request_tick is None or self.remaining(tick) == 0:
            return True
        if now_s - self._chunk.observed_s > self._max_age_s:
            return True
        if (tick - self._chunk.first_tick) % self._factor:
            return False
        if tick - self._last_request_tick >= self.replan_interval_steps:
            return True
        return self.remaining(tick) <= (self.delay_steps(tick) + 1) * self._factor

    def server_interval(self, steps: int) -> None:
        """A busy server asks for a longer interval between requests; never shorter than the robot's own."""
        self.replan_interval_steps = max(self._own_interval_steps, steps)

    def requested(self, tick: int) -> None:
        """A request was made at tick."""
        self._last_request_tick = tick

    def request_failed(self) -> None:
        """No chunk will come of the last request: the next tick asks again."""
        self._last_request_tick = None
