"""What the page knows, by topic, and who has seen how much of it.

Upstream watchers write here once; every browser tab reads from its own position. A tab that reads slowly skips what has
fallen out of a topic's window and holds no memory, so a hundred tabs cost a robot exactly what one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

# JSON as Python writes it.
Json = Any


@dataclass(kw_only=True)
class _Topic:
    keep: int
    reset_at: int
    values: deque[tuple[int, Json]] = field(default_factory=deque)


class Feed:
    """One event loop's business: no locks."""

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}
        self._sequence = itertools.count(1)
        self._newest = 0
        self._news = asyncio.Event()
        self._num_viewers = 0

    @staticmethod
    def now_s() -> float:
        """The clock of every "t" on the page: this process's, monotonic. No other machine's clock reaches the page."""
        return time.monotonic()

    @property
    def num_viewers(self) -> int:
        return self._num_viewers

    def set(self, topic: str, value: Json) -> None:
        """The topic's only value. An equal one is not news."""
        known = self._topics.get(topic)
        if known is not None and known.keep == 1 and known.values and known.values[-1][1] == value:
            return
        sequence = self._next()
        self._topics[topic] = _Topic(keep=1, reset_at=sequence, values=deque([(sequence, value)]))
        self._wake()

    def append(self, topic: str, value: Json, *, keep: int) -> None:
        """One more value; the topic remembers the last keep of them."""
        known = self._topics.setdefault(topic, _Topic(keep=keep, reset_at=self._newest))
        known.values.append((self._next(), value))
        while len(known.values) > keep:
            known.values.popleft()
        self._wake()

    def clear(self, topic: str) -> None:
        """Forgets the topic's values; viewers are told."""
        known = self._topics.get(topic)
        if known is not None and known.values:
            known.values.clear()
            known.reset_at = self._next()
            self._wake()

    def latest(self, topic: str) -> Json | None:
        known = self._topics.get(topic)
        return known.values[-1][1] if known is not None and known.values else None

    def since(self, position: int) -> tuple[int, dict[str, Json]]:
        """The newest position, and per topic what came after position; "reset" says that earlier values are void."""
        changes: dict[str, Json] = {}
        for name, topic in self._topics.items():
            reset = topic.reset_at > position
            values = [value for sequence, value in topic.values if reset or sequence > position]
            if reset or values:
                changes[name] = {"reset": reset, "keep": topic.keep, "values": values}
        return self._newest, changes

    async def follow(self, *, interval_s: float, idle_s: float = 5.0) -> AsyncIterator[Json]:
        """Messages for one tab, at most one every interval_s and, as a sign of life, at least one every idle_s."""
        position = 0
        while True:
            news = self._news
            position, changes = self.since(position)
            yield {"now": self.now_s(), "topics": changes}
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(idle_s):
                    await news.wait()
            await asyncio.sleep(interval_s)

    @contextlib.contextmanager
    def viewing(self) -> Iterator[None]:
        """Inside, somebody looks: cameras are worth rendering."""
        self._num_viewers += 1
        try:
            yield
        finally:
            self._num_viewers -= 1

    def _next(self) -> int:
        self._newest = next(self._sequence)
        return self._newest

    def _wake(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
