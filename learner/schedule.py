"""Learning rate, average and random numbers as pure functions of where a run is; nothing of them needs to be saved."""

from __future__ import annotations

import math

import numpy as np

from .recipe import Recipe


def progress(recipe: Recipe, *, step: int, elapsed_s: float, max_duration_s: float) -> float:
    """0 at the start, 1 at the end: the share of steps or, where time is bounded, of time, whichever is further.

    With a bound on time the learning rate follows the clock, so only runs bounded by steps alone repeat bit for bit.
    """
    by_step = step / recipe.max_steps
    by_time = elapsed_s / max_duration_s if max_duration_s > 0 else 0.0
    return min(1.0, max(by_step, by_time))


def learning_rate(recipe: Recipe, *, step: int, progress: float) -> float:
    """Linear warm-up, then a cosine down to the final share."""
    warmup = min(1.0, (step + 1) / (recipe.warmup_steps + 1))
    final = recipe.final_learning_rate_share
    cosine = final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return recipe.learning_rate * warmup * cosine


def ema_decay(recipe: Recipe, step: int) -> float:
    """The first weights are noise: the average forgets them quickly."""
    return min(recipe.ema_decay, (1.0 + step) / (10.0 + step))


def step_seed(seed: int, step: int, rank: int) -> int:
    """63 bits for all random numbers of one step of one rank."""
    return int(
        np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )
