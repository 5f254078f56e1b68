"""A fleet that is simulated: what is given, what each robot saw, what came out. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from . import capacity


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What is simulated.

    Attributes:
        interval_steps: Of control that a robot executes of each chunk, unless the service asks for more.
        deadline_s: That a robot gives from sending to receiving; the service hears of it less the way there.
        keeps_rate: Robots replan at interval_steps whatever the service asks for, and begin evenly out of step, as those of
            the load test do.
        jitter: How far a robot's replanning strays from its interval, as a share of it, evenly.
        network_s, network_jitter_s: One way: the shortest, and the mean of what comes on top.
        ask_every_s: Between a robot's questions; 0 for none.
        ramp_up_s: Robots come at random within it.
        draft_hit_share: Of questions whose draft, the last answer, is still right; below 0 nothing is drafted.
    """

    num_robots: int
    seconds: float
    control_rate_hz: float
    interval_steps: int
    horizon: int
    num_steps: int
    deadline_s: float
    keeps_rate: bool = False
    jitter: float = 0.1
    network_s: float = 0.001
    network_jitter_s: float = 0.0005
    ask_every_s: float = 0.0
    ask_tokens: int = 20
    ask_deadline_s: float = 10.0
    ask_within_s: float = capacity.TEXT_WITHIN_S
    draft_hit_share: float = -1.0
    ramp_up_s: float = 5.0
    max_rows: int = 8
    max_texts: int = 32
    max_prefixes: int = 6


@dataclass(kw_only=True)
class Robot:
    """One robot's side, and what it saw.

    Attributes:
        seen_request_id: Whose pictures the device saw last.
    """

    name: str
    interval_steps: int
    is_open: bool = False
    next_due_s: float = 0.0
    request_id: int = 0
    seen_request_id: int | None = None
    in_flight: tuple[int, float] | None = None
    actions_until_s: float = 0.0
    num_texts: int = 0
    next_question_s: float = 0.0
    num_missed: int = 0
    latencies_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question.

    Attributes:
        request_id: Whose pictures it is about.
        is_draft_right: The last answer comes again.
    """

    request_id: int
    is_draft_right: bool


@dataclass(kw_only=True)
class Outcome:
    """What a fleet saw; times in seconds.

    Attributes:
        num_missed: Chunks received after their deadline, and refusals for being late.
        num_starved: Times that a robot had no action left before its next chunk came.
        busy_s: Of the device, by kind of unit.
        stretch: By how much the service lengthened everyone's interval.
    """

    robots: list[Robot]
    seconds: float = 0.0
    num_requests: int = 0
    num_missed: int = 0
    num_starved: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    refused_robots: int = 0
    stretch: float = 1.0
    text_share: float = 0.0
    chunks_per_s: float = 0.0
    num_tokens: int = 0
    num_texts: int = 0
    first_token_s: list[float] = field(default_factory=list)
    text_s: list[float] = field(default_factory=list)
    busy_s: dict[str, float] = field(default_factory=dict)
    sizes: dict[str, Counter[int]] = field(default_factory=dict)

    @property
    def latencies_s(self) -> list[float]:
        return [latency_s for robot in self.robots for latency_s in robot.latencies_s]
