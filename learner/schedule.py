"""Learning rate, average and random numbers as pure functions of where a run is; nothing of them needs to be saved."""

from __future__ import annotations

import numpy as np

from .recipe import Recipe


def learning_rate(recipe: Recipe, *, step: int, elapsed_s: float, max_duration_s: float) -> float:
    """As recipe.schedule says for a run of recipe.max_steps.

    Where time is bounded (max_duration_s > 0) the cosine follows the clock too, and the lower of both counts; so only runs
    bounded by steps alone repeat bit for bit.
    """
    share = recipe.schedule.multiplier(step, total_steps=recipe.max_steps)
    if max_duration_s > 0:
        share = min(share, recipe.schedule.decayed(min(1.0, elapsed_s / max_duration_s)))
    return recipe.learning_rate * share


def ema_decay(recipe: Recipe, step: int) -> float:
    """The first weights are noise: the average forgets them quickly."""
    return min(recipe.ema_decay, (1.0 + step) / (10.0 + step))


def step_seed(seed: int, step: int, rank: int) -> int:
    """63 bits for all random numbers of one step of one rank."""
    return int(
        np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )
