"""How much each chunk has waited for each question, and which questions may make it wait more. Pure.

A text unit that runs holds up every chunk that is there. Texts that step together share that: taking one out of a step of
sixteen would save nobody anything, so each of k texts answers for 1/k of the step. Towards each chunk a question has one
text unit in all. So one question alone holds a chunk up by one unit, k questions by at most k, and sixteen that decode
together may step sixteen times while the chunk is there.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence

# Of parts that add up to a whole unit: floating point makes 0.9999999999999999 or 1.0000000000000002 of them.
_ROUNDING = 1e-9


class HoldUps:
    """Keys are chunks; who holds them up are text_ids. Amounts are in text units."""

    def __init__(self) -> None:
        self._waited: dict[Hashable, dict[Hashable, float]] = {}
        # Of the text unit that runs.
        self._running: dict[Hashable, float] = {}

    @property
    def text_runs(self) -> bool:
        return bool(self._running)

    def came(self, key: Hashable) -> None:
        """A chunk; the text unit that runs holds it up."""
        self._waited[key] = dict(self._running)

    def left(self, key: Hashable) -> None:
        """It was answered, or is given up."""
        self._waited.pop(key, None)

    def text_begins(self, who: Collection[Hashable]) -> None:
        self._running = dict.fromkeys(who, 1.0 / len(who))
        for waited in self._waited.values():
            for one, part in self._running.items():
                waited[one] = waited.get(one, 0.0) + part

    def text_ends(self) -> None:
        self._running = {}

    def used(self) -> Mapping[Hashable, float]:
        """What questions have used up of their text units, each towards the chunk there that waited for it most; else 0."""
        most: dict[Hashable, float] = {}
        for waited in self._waited.values():
            for who, part in waited.items():
                most[who] = max(part, most.get(who, 0.0))
        return most


def may_run_alone(who: Hashable, used: Mapping[Hashable, float]) -> bool:
    """used: As HoldUps has it."""
    return used.get(who, 0.0) <= _ROUNDING


def may_step_together(who: Sequence[Hashable], used: Mapping[Hashable, float]) -> frozenset[Hashable]:
    """As many of them as have enough left for their part of a joint step; who used least comes first.

    The more share the step the less each needs; without those who have too little left the others need more.
    """
    by_use = sorted(who, key=lambda one: used.get(one, 0.0))
    for number in range(len(by_use), 0, -1):
        if used.get(by_use[number - 1], 0.0) + 1.0 / number <= 1.0 + _ROUNDING:
            return frozenset(by_use[:number])
    return frozenset()
