"""How many robots one server carries. Pure.

A robot at rate f that replans every s steps asks f / s chunks a second; X chunks a second can be made. Over budget,
everyone's interval grows before anyone is refused; a robot is refused when even whole chunks between replans are too much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The rest is for jitter: a queue at full use waits without bound.
USABLE_SHARE = 0.8


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One robot: control rate in Hz, and the steps between replans that it asked for, at most the horizon."""

    rate_hz: float
    interval_steps: int
    horizon: int


def stretch(demands: Sequence[Demand], chunks_per_s: float | None) -> float:
    """Factor, at least 1, by which everyone's interval must grow; 1 where nothing was measured."""
    if not chunks_per_s:
        return 1.0
    asked_per_s = sum(demand.rate_hz / demand.interval_steps for demand in demands)
    return max(1.0, asked_per_s / (USABLE_SHARE * chunks_per_s))


def interval_steps(demand: Demand, factor: float) -> int:
    """The interval to ask of a robot, never beyond its horizon."""
    return min(demand.horizon, math.ceil(demand.interval_steps * factor - 1e-9))


def fits(demands: Sequence[Demand], chunks_per_s: float | None) -> bool:
    """Whether all of them can be served at all, each executing whole chunks."""
    if not chunks_per_s:
        return True
    return sum(demand.rate_hz / demand.horizon for demand in demands) <= USABLE_SHARE * chunks_per_s
