"""What a worker process is told to do, and what it counted; both travel as JSON on its pipes."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from manyhands.security import SecuritySettings

STAGES = ("decode", "queue", "prefix", "sample", "postprocess", "total")


class Plan(BaseModel):
    """Robots first to first + number - 1 of a fleet.

    Attributes:
        kind: "service" for the inference service, "plain" for the reference server.
        spec: The robot's, a serialised manyhands.common.v1.Spec in hexadecimal.
        begins_s: On this machine's monotonic clock, which its processes share: when the first robot begins.
        shared_memory: Pictures go that way, as they are.
        ask_every_s: Between a robot's questions, which wait for each other; 0 for none.
        with_timeline: Each chunk is told by itself, in Tally.timeline.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["service", "plain"]
    address: str
    model: str
    spec: str
    task: str
    name: str
    first: int
    number: int
    fleet: int
    rate_hz: float
    seconds: float
    ramp_up_s: float
    begins_s: float
    deadline_s: float
    jpeg_quality: int
    shared_memory: bool
    replan_interval_steps: int
    with_prefix: bool
    ask_every_s: float
    ask_tokens: int
    with_timeline: bool
    security: SecuritySettings


class Tally(BaseModel):
    """What robots saw. Times in milliseconds.

    Attributes:
        requests: Observations sent.
        missed_deadlines: Chunks that came after their deadline, and refusals for being late.
        skipped: Ticks without a request, because the robot's last one was not answered yet.
        errors: Broken streams, failed calls, wrong answers, refusals that no good client should get; by what they say.
        refusals: By reason.
        lag_ms: How much later than planned this tool sent: large where it is itself overloaded.
        versions: Chunks by the number of the weights that made them.
        replan_steps: Chunks by the interval that the server asked for with them.
        timeline: Of each chunk when it came, in seconds since the epoch as logs tell it, its latency and its version.
        text_tokens: Of each answer that came to its end.
    """

    model_config = ConfigDict(extra="forbid")

    requests: int = 0
    chunks: int = 0
    missed_deadlines: int = 0
    skipped: int = 0
    drains: int = 0
    robots_served: int = 0
    errors: dict[str, int] = Field(default_factory=Counter)
    refusals: dict[str, int] = Field(default_factory=Counter)
    latency_ms: list[float] = Field(default_factory=list)
    stage_ms: dict[str, list[float]] = Field(default_factory=dict)
    batch_sizes: dict[int, int] = Field(default_factory=Counter)
    lag_ms: list[float] = Field(default_factory=list)
    versions: dict[int, int] = Field(default_factory=Counter)
    replan_steps: dict[int, int] = Field(default_factory=Counter)
    timeline: list[tuple[float, float, int]] = Field(default_factory=list)
    questions: int = 0
    texts: int = 0
    tokens: int = 0
    text_tokens: list[int] = Field(default_factory=list)
    first_token_ms: list[float] = Field(default_factory=list)
    text_ms: list[float] = Field(default_factory=list)
    cpu_s: float = 0.0

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())

    def add(self, other: Tally) -> None:
        """Another worker's counts, into this one."""
        for name in type(self).model_fields:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, list):
                mine.extend(theirs)
            elif isinstance(mine, dict):
                for key, value in theirs.items():
                    if isinstance(value, list):
                        mine.setdefault(key, []).extend(value)
                    else:
                        mine[key] = mine.get(key, 0) + value
            else:
                setattr(self, name, mine + theirs)


def count(counts: dict[str, int], what: str) -> None:
    counts[what] = counts.get(what, 0) + 1
