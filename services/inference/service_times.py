"""How long work takes, by kind and size, learned from what ran. Pure: the clock is an argument."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

# Weight of the newest measurement, as in TCP's round-trip estimate (RFC 6298): mean 1/8, deviation 1/4.
_MEAN_GAIN = 1 / 8
_DEVIATION_GAIN = 1 / 4
# Without new measurements an estimate halves each second: one stall must not make the service refuse everybody for good.
_FORGET_AFTER_S = 1.0
_LATELY_S = 2.0
FRESH_S = 10.0


@dataclass(kw_only=True)
class _Measured:
    mean_s: float
    deviation_s: float
    at_s: float


class ServiceTimes:
    """Estimates of durations.

    Args:
        forgets: For work whose duration depends on what else the machine does: estimates fade, and a size that did not run
            lately is judged by the smaller ones that did. Without it for work that always takes the same, as captured graphs
            on a device of their own.
    """

    def __init__(self, *, forgets: bool = True) -> None:
        self._forgets = forgets
        self._forget_after_s = _FORGET_AFTER_S if forgets else math.inf
        self._lately_s = _LATELY_S if forgets else math.inf
        self._measured: dict[Hashable, dict[int, _Measured]] = {}
        # By group, sizes and deviations asked for, before they fade: they stay until the group is measured again, and a
        # scheduler asks for the same few numbers in every decision.
        self._kept: dict[Hashable, dict[tuple[int, float], float]] = {}

    def observe(self, group: Hashable, num_rows: int, duration_s: float, now_s: float) -> None:
        by_rows = self._measured.setdefault(group, {})
        self._kept.pop(group, None)
        known = by_rows.get(num_rows)
        if known is None or now_s - known.at_s > FRESH_S:
            by_rows.pop(num_rows, None)
            deviation_s = duration_s / 2
            if by_rows:
                # The sizes measured so far foretold this one: it is as uncertain as they are, or as they were wrong.
                foretold_s, uncertain_s = self._foretell(by_rows, num_rows)
                deviation_s = min(deviation_s, max(uncertain_s, abs(duration_s - foretold_s)))
            by_rows[num_rows] = _Measured(mean_s=duration_s, deviation_s=deviation_s, at_s=now_s)
            return
        error_s = duration_s - known.mean_s
        known.mean_s += _MEAN_GAIN * error_s
        known.deviation_s += _DEVIATION_GAIN * (abs(error_s) - known.deviation_s)
        known.at_s = now_s

    def careful_s(self, group: Hashable, num_rows: int, now_s: float, *, times: int = 1) -> float:
        """Of so many one after the other: means and two deviations of their sum; 0 where nothing is known.

        What delays one of them seldom delays all, so the deviation of a sum grows with the root of how many they are.
        """
        return times * self._estimate_s(group, num_rows, now_s, 2.0 / math.sqrt(times)) if times else 0.0

    def likely_s(self, group: Hashable, num_rows: int, now_s: float) -> float:
        """The mean; 0 where nothing is known."""
        return self._estimate_s(group, num_rows, now_s, 0.0)

    def at_best_s(self, group: Hashable, num_rows: int, now_s: float) -> float:
        """Mean less two deviations; 0 where nothing is known."""
        return self._estimate_s(group, num_rows, now_s, -2.0)

    def mean_s(self, group: Hashable, num_rows: int) -> float | None:
        """Of exactly this size, however long ago; None where it never ran."""
        known = self._measured.get(group, {}).get(num_rows)
        return known.mean_s if known is not None else None

    def sizes(self, group: Hashable) -> tuple[int, ...]:
        """Numbers of rows that ran, ascending."""
        return tuple(sorted(self._measured.get(group, ())))

    def _estimate_s(self, group: Hashable, num_rows: int, now_s: float, num_deviations: float) -> float:
        by_rows = self._measured.get(group)
        if not by_rows:
            return 0.0
        kept = self._kept.setdefault(group, {})
        found_s = kept.get((num_rows, num_deviations))
        if found_s is None:
            mean_s, deviation_s = self._foretell(by_rows, num_rows)
            found_s = kept[num_rows, num_deviations] = max(0.0, mean_s + num_deviations * deviation_s)
        if not self._forgets:
            return found_s
        silent_s = max(0.0, now_s - max(known.at_s for known in by_rows.values()))
        forgotten: float = 0.5 ** max(0.0, silent_s / self._forget_after_s - 1.0)
        return found_s * forgotten

    def _foretell(self, by_rows: Mapping[int, _Measured], num_rows: int) -> tuple[float, float]:
        """(mean, deviation); of a size that did not run lately in proportion to the nearest smaller one that did, and no
        more than the next bigger one: else a size that once was slow would never be tried again.

        Prepared units are different: a size that is not prepared runs as the next bigger one, and takes as long.
        """
        newest_s = max(known.at_s for known in by_rows.values())
        lately = {rows: known for rows, known in by_rows.items() if newest_s - known.at_s <= self._lately_s}
        if num_rows in lately:
            return lately[num_rows].mean_s, lately[num_rows].deviation_s
        smaller = max((rows for rows in lately if rows < num_rows), default=0)
        bigger = min((rows for rows in lately if rows > num_rows), default=0)
        if not smaller or (bigger and not self._forgets):
            return lately[bigger].mean_s, lately[bigger].deviation_s
        scale = num_rows / smaller
        foretold = lately[smaller].mean_s * scale, lately[smaller].deviation_s * scale
        if bigger and lately[bigger].mean_s < foretold[0]:
            return lately[bigger].mean_s, lately[bigger].deviation_s
        return foretold

    def rows_per_s(self, group: Hashable, now_s: float) -> float | None:
        """The best rate of passes in the last FRESH_S; None where none ran, so that nobody is judged by old times."""
        by_rows = self._measured.get(group, {})
        fresh = [rows / known.mean_s for rows, known in by_rows.items() if now_s - known.at_s < FRESH_S and known.mean_s > 0]
        return max(fresh, default=None)
