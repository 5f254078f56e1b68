"""When it pays to begin another chunk before those in progress are finished, because their steps are then shared. Pure.

Alone, ten Euler steps of a chunk may take as long as its prefix; two chunks share most of that. So a prefix that goes first
saves device time for everybody behind it, and costs the chunks in progress the time of a prefix. On a device whose steps are
nearly free nothing is saved, and finishing first has the lowest mean.
"""

from __future__ import annotations

from collections.abc import Callable

# Of a prefix, that must be saved. In simulated time (docs/design/0016) less makes chunks wait for a little; from 0.1 to 0.42
# text and late chunks are about the same. With 0.45, and other constants than now, faster steps were no longer shared.
WORTHWHILE_SHARE = 0.3
# Rows that a promise counts on, although more would pay: with deadlines of 100 ms there seldom are more.
ROWS_COUNTED_ON = 8


def pays(*, prefix_s: float, step_s: Callable[[int], float], num_rows: int, steps_left: int, num_steps: int) -> bool:
    """Whether a chunk that waits should begin before the chunks in progress go on.

    Args:
        prefix_s: Of the one that waits.
        step_s: Of an Euler step of so many rows.
        num_rows, steps_left: Chunks in progress, and steps until the last of them is finished.
        num_steps: Of a chunk.
    """
    apart_s = steps_left * step_s(num_rows) + num_steps * step_s(1)
    together_s = num_steps * step_s(num_rows + 1)
    return apart_s - together_s > WORTHWHILE_SHARE * prefix_s


def chunks_per_s(*, prefix_s: float, step_s: Callable[[int], float], num_steps: int, max_rows: int) -> float:
    """What a device makes of units whose steps are shared as far as pays() says; above 0."""
    rows = 1
    while rows < min(max_rows, ROWS_COUNTED_ON) and pays(
        prefix_s=prefix_s, step_s=step_s, num_rows=rows, steps_left=num_steps, num_steps=num_steps
    ):
        rows += 1
    return 1.0 / (prefix_s + num_steps * step_s(rows) / rows)
