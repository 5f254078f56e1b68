"""The line of robots that wait for a chunk: one place each, earliest deadline first. Pure.

At most one observation of a robot waits: a newer one takes the older one's place in line, so a robot that updates often is
not starved by its own updates, and one that was refused for being late goes to the front with its next observation.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar


class Waits(Protocol):
    """A request in line; times on the scheduler's clock."""

    @property
    def owner(self) -> str: ...

    @property
    def arrived_s(self) -> float: ...

    @property
    def deadline_s(self) -> float: ...


WaitsT = TypeVar("WaitsT", bound=Waits)


class Line(Generic[WaitsT]):
    """Waiting requests by their owners."""

    def __init__(self) -> None:
        self._waiting: dict[str, WaitsT] = {}
        # Deadlines that an owner's next request inherits for its place in line.
        self._place_s: dict[str, float] = {}
        self._ordered: list[WaitsT] | None = []

    def __len__(self) -> int:
        return len(self._waiting)

    def waiting_of(self, owner: str) -> WaitsT | None:
        return self._waiting.get(owner)

    def add(self, work: WaitsT) -> None:
        """The owner must have nothing waiting: replace() first."""
        self._waiting[work.owner] = work
        self._ordered = None

    def replace(self, owner: str) -> WaitsT | None:
        """Takes out what the owner has waiting, since something newer came; that one gets its place."""
        replaced = self._waiting.pop(owner, None)
        if replaced is not None:
            self.inherit(replaced)
        return replaced

    def ordered(self) -> list[WaitsT]:
        """Who is first in line; not to be changed by the caller."""
        if self._ordered is None:
            self._ordered = sorted(self._waiting.values(), key=self._rank)
        return self._ordered

    def place_s(self, work: WaitsT) -> float:
        """The deadline by which the work's place in line goes: its own, or an earlier one of its owner's."""
        return min(work.deadline_s, self._place_s.get(work.owner, work.deadline_s))

    def start(self, work: WaitsT) -> None:
        """The work runs: it leaves the line, and its owner's place is used up."""
        del self._waiting[work.owner]
        self._place_s.pop(work.owner, None)
        self._ordered = None

    def refuse(self, work: WaitsT) -> None:
        """The work is too late: it leaves the line, and its owner's next one comes before others."""
        del self._waiting[work.owner]
        self.inherit(work)

    def inherit(self, work: WaitsT) -> None:
        """The owner's next work gets the place of this one."""
        self._place_s[work.owner] = self.place_s(work)
        self._ordered = None

    def withdraw(self, owner: str) -> WaitsT | None:
        """Forgets an owner; answers what it had waiting."""
        self._place_s.pop(owner, None)
        self._ordered = None
        return self._waiting.pop(owner, None)

    def _rank(self, work: WaitsT) -> tuple[float, float, str]:
        return (self.place_s(work), work.arrived_s, work.owner)
