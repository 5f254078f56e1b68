"""How many robots one server carries. Pure.

A robot at rate f that replans every s steps asks f / s chunks a second; X chunks a second can be made, less what text takes
of the device. Over budget, everyone's interval grows before anyone is refused; a robot is refused when even whole chunks
between replans are too much: N robots never starve while N <= X (H - d) / f, with horizon H and delay d in steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The rest is for jitter: a queue at full use waits without bound.
USABLE_SHARE = 0.8
# Text may not promise more of the device than this, or chunks would have nothing left to be admitted to.
MAX_TEXT_SHARE = 0.9
# Of it, for one robot: who asks again as soon as an answer is there gets what is left over, and keeps nobody out for it.
MAX_ROBOT_TEXT_SHARE = 0.25
# How soon an answer is wanted. Robots give longer deadlines, but a subtask that comes late is for a scene that has changed.
TEXT_WITHIN_S = 1.0


class DeviceFull(Exception):
    """One robot more would not be served, even if everybody replanned as rarely as can be; says by what it is full."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One robot: control rate in Hz, steps between replans that it asked for, steps that pass before a chunk arrives.

    cost: Of a chunk of its model, in chunks of the model whose capacity is meant: models share the device.
    """

    rate_hz: float
    interval_steps: int
    horizon: int
    delay_steps: int = 0
    cost: float = 1.0

    @property
    def longest_interval_steps(self) -> int:
        """Beyond it the robot runs out of actions before the next chunk is there."""
        return max(1, self.horizon - self.delay_steps)


@dataclass(frozen=True, kw_only=True)
class TextDemand:
    """One robot's questions: how many a second, tokens of an answer, and within how many seconds it is wanted."""

    questions_per_s: float
    tokens: float
    within_s: float = TEXT_WITHIN_S


@dataclass(frozen=True, kw_only=True)
class DeviceCapacity:
    """What a device makes of one model's work.

    Attributes:
        chunks_per_s: Of chunks, while there is no text; above 0.
        question_s: Of a question's own prefix, and its draft's check where it has one.
        text_step_s: Of a step that decodes a token of all texts in progress, when there are max_texts. Both are 0 where
            nobody measured them: what text takes is not known then, and not counted.
        max_texts: In progress at once.
    """

    chunks_per_s: float
    question_s: float = 0.0
    text_step_s: float = 0.0
    max_texts: int = 1


def text_share(demands: Sequence[TextDemand], device: DeviceCapacity) -> float:
    """Share of the device that text takes, 0 to MAX_TEXT_SHARE."""
    asking = [demand for demand in demands if demand.questions_per_s > 0]
    if not asking:
        return 0.0
    counted_per_s = [_counted_per_s(demand, device) for demand in asking]
    tokens_per_s = sum(rate * demand.tokens for rate, demand in zip(counted_per_s, asking, strict=True))
    # Texts decode together: what the most hurried one needs serves all, up to the batch; alone, a token is a step. A robot
    # asks one question at a time, so a step never has more texts than there are robots that ask.
    hurried_per_s = max(demand.tokens / demand.within_s for demand in asking)
    steps_per_s = max(min(tokens_per_s, hurried_per_s), tokens_per_s / min(device.max_texts, len(asking)))
    prefixes = sum(counted_per_s) * device.question_s
    return min(MAX_TEXT_SHARE, prefixes + steps_per_s * device.text_step_s)


def _counted_per_s(demand: TextDemand, device: DeviceCapacity) -> float:
    """Of a robot's questions a second, those that MAX_ROBOT_TEXT_SHARE would answer one after the other."""
    alone_s = device.question_s + demand.tokens * device.text_step_s
    return min(demand.questions_per_s, MAX_ROBOT_TEXT_SHARE / alone_s) if alone_s > 0 else demand.questions_per_s


def stretch(demands: Sequence[Demand], chunks_per_s: float | None, text_share: float = 0.0) -> float:
    """Factor, at least 1, by which everyone's interval must grow; 1 where nothing was measured."""
    if not chunks_per_s:
        return 1.0
    return max(1.0, asked_per_s(demands) / usable_per_s(chunks_per_s, text_share))


def asked_per_s(demands: Sequence[Demand]) -> float:
    """Chunks a second that robots ask for, at the intervals they want, in those of the model that is meant."""
    return sum((demand.cost * demand.rate_hz / demand.interval_steps for demand in demands), 0.0)


def interval_steps(demand: Demand, factor: float) -> int:
    """The interval to ask of a robot, never beyond what its horizon leaves."""
    longest = max(demand.interval_steps, demand.longest_interval_steps)
    return min(longest, math.ceil(demand.interval_steps * factor - 1e-9))


def fits(demands: Sequence[Demand], chunks_per_s: float | None, text_share: float = 0.0) -> bool:
    """Whether all of them can be served at all, each executing whole chunks."""
    if not chunks_per_s:
        return True
    least_per_s = sum(demand.cost * demand.rate_hz / demand.longest_interval_steps for demand in demands)
    return least_per_s <= usable_per_s(chunks_per_s, text_share)


def admit(
    others: Sequence[Demand],
    wanted: Demand,
    *,
    chunks_per_s: float | None,
    text_share: float = 0.0,
) -> float:
    """Lets a robot in beside others; answers the factor by which everyone's interval then grows.

    Args:
        text_share: With the newcomer's questions, where they are known.

    Raises:
        DeviceFull: Even at the longest intervals they would not all be served.
    """
    everyone = [*others, wanted]
    if not fits(everyone, chunks_per_s, text_share):
        raise DeviceFull(
            f"{len(others)} robots use what can be done here, {chunks_per_s:.1f} chunks/s"
            + (f" of which text takes {text_share:.0%}" if text_share else "")
            + "; serve this one elsewhere or close a session"
            + (", or ask fewer questions" if text_share else "")
        )
    return stretch(everyone, chunks_per_s, text_share)


def usable_per_s(chunks_per_s: float, text_share: float = 0.0) -> float:
    """What may be promised of what can be made."""
    return USABLE_SHARE * chunks_per_s * (1.0 - text_share)
