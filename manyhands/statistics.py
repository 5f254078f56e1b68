"""Small statistics that several reports show and must show alike."""

from __future__ import annotations

import math

# Two-sided 95 %.
_Z = 1.959963984540054


def wilson_interval(num_successes: int, num_trials: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate, in [0, 1] (Wilson 1927); honest at 0 and at n of n."""
    if not 0 <= num_successes <= num_trials:
        raise ValueError(f"num_successes ({num_successes}) must be between 0 and num_trials ({num_trials})")
    if num_trials == 0:
        return 0.0, 1.0
    rate = num_successes / num_trials
    z2 = _Z * _Z / num_trials
    centre = (rate + z2 / 2) / (1 + z2)
    half = _Z * math.sqrt(rate * (1 - rate) / num_trials + z2 / (4 * num_trials)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)
