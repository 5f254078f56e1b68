"""Whom each chunk had to wait for, so that no question is in a chunk's way twice. Pure.

A text unit that runs holds up every chunk that is there. Who was in a chunk's way pauses while the chunk is there. A chunk
that waits for others is there for long: after as long as it would have taken alone it may be held up again, if it has the
time.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class _Chunk:
    """Attributes:
    alone_s: From beginning to end, undisturbed.
    waited_for: By whom it was held up, when last.
    """

    alone_s: float
    waited_for: dict[Hashable, float] = field(default_factory=dict)


class HoldUps:
    """Keys are chunks; who holds them up are text_ids, and whatever else stands for many of them."""

    def __init__(self) -> None:
        self._chunks: dict[Hashable, _Chunk] = {}
        # Of the text unit that runs.
        self._running: frozenset[Hashable] = frozenset()

    @property
    def text_runs(self) -> bool:
        return bool(self._running)

    def came(self, key: Hashable, alone_s: float, now_s: float) -> None:
        """A chunk; the text unit that runs holds it up."""
        self._chunks[key] = _Chunk(alone_s=alone_s, waited_for=dict.fromkeys(self._running, now_s))

    def left(self, key: Hashable) -> None:
        """It was answered, or is given up."""
        self._chunks.pop(key, None)

    def text_begins(self, who: Iterable[Hashable], now_s: float) -> None:
        self._running = frozenset(who)
        for chunk in self._chunks.values():
            chunk.waited_for.update(dict.fromkeys(self._running, now_s))

    def text_ends(self) -> None:
        self._running = frozenset()

    def pausing(self, now_s: float, *, again: bool) -> Collection[Hashable]:
        """Who has held a chunk up that is still there; again: But not longer ago than the chunk would have taken alone."""
        return {
            who
            for chunk in self._chunks.values()
            for who, at_s in chunk.waited_for.items()
            if not again or now_s - at_s < chunk.alone_s
        }
