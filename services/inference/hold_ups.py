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


# By text_id.
Parts = Mapping[Hashable, float]


class HoldUps:
    """Keys are chunks; who holds them up are text_ids. Amounts are in text units."""

    def __init__(self) -> None:
        self._waited: dict[Hashable, dict[Hashable, float]] = {}
        # By text unit that runs or is about to.
        self._running: dict[Hashable, Parts] = {}

    def came(self, key: Hashable) -> None:
        """A chunk; the text units that run hold it up."""
        self._waited[key] = self._of_running()

    def left(self, key: Hashable) -> None:
        """It was answered, or is given up."""
        self._waited.pop(key, None)

    def text_begins(self, unit: Hashable, who: Collection[Hashable]) -> None:
        parts = dict.fromkeys(who, 1.0 / len(who))
        self._running[unit] = parts
        for waited in self._waited.values():
            _add(waited, parts)

    def text_ends(self, unit: Hashable) -> None:
        del self._running[unit]

    def used(self) -> Mapping[Hashable, float]:
        """What questions have used up of their text units, each towards the chunk that waited for it most; else 0.

        A chunk may come at any time, and would wait for all that runs: it counts as if it were there.
        """
        most = self._of_running()
        for waited in self._waited.values():
            for who, part in waited.items():
                most[who] = max(part, most.get(who, 0.0))
        return most

    def _of_running(self) -> dict[Hashable, float]:
        found: dict[Hashable, float] = {}
        for parts in self._running.values():
            _add(found, parts)
        return found


def _add(to: dict[Hashable, float], parts: Parts) -> None:
    for who, part in parts.items():
        to[who] = to.get(who, 0.0) + part


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
