"""Guided real-time chunking: a new chunk is pulled towards what is still to be executed of the previous one.

Black et al., "Real-Time Execution of Action Chunking Flow Policies" (arXiv 2506.07339). As in lerobot's implementation the
Jacobian of the denoised estimate is taken as the identity, so the correction is the weighted error itself. Every row of a
batch has its own length, delay and horizon.

Shapes: B rows, H horizon, A action size of the model. Time t runs from 1 (noise) to 0 (actions).
"""

from __future__ import annotations

import enum
import math

import torch

from .policy import CommittedPrefix

DEFAULT_MAX_GUIDANCE_WEIGHT = 10.0


class PrefixSchedule(enum.Enum):
    """How the weight falls from 1 (will have been executed: must be kept) to 0 (free)."""

    ZEROS = "zeros"  # 1 for the delay, then 0.
    ONES = "ones"  # 1 up to the horizon, then 0.
    LINEAR = "linear"
    EXP = "exp"


def prefix_weights(
    schedule: PrefixSchedule,
    *,
    delay_steps: torch.Tensor,
    execution_horizon: torch.Tensor,
    length: torch.Tensor,
    horizon: int,
) -> torch.Tensor:
    """(B, H) float32 weights; all arguments (B,) int64. A row without a previous chunk (length 0) gets zeros."""
    end = torch.minimum(execution_horizon, length).clamp(min=0, max=horizon)[:, None]
    start = torch.minimum(delay_steps.clamp(min=0)[:, None], end)
    step = torch.arange(horizon, device=end.device)[None, :]
    if schedule is PrefixSchedule.ZEROS:
        return (step < start).float()
    if schedule is PrefixSchedule.ONES:
        return (step < end).float()
    # Between start and end: the inner points of an even division of 1 to 0 into end - start + 1 parts.
    fade = (end - step).float() / (end - start + 1).float()
    if schedule is PrefixSchedule.EXP:
        fade = fade * torch.expm1(fade) / (math.e - 1.0)
    weights = torch.where(step < start, torch.ones_like(fade), fade)
    return torch.where(step < end, weights, torch.zeros_like(weights))


def guidance_weight(time: torch.Tensor, max_weight: float) -> torch.Tensor:
    """(B,) weight at flow time (B,): t/tau * (t^2 + tau^2) / t^2 with tau = 1 - t, at most max_weight, also at tau = 0."""
    tau = 1.0 - time
    squared = time * time
    unbounded = (time / tau) * ((squared + tau * tau) / squared)
    return torch.where(tau <= 0, torch.full_like(tau, max_weight), unbounded).clamp(max=max_weight)


def guide(
    velocity: torch.Tensor,
    x: torch.Tensor,
    time: torch.Tensor,
    committed: CommittedPrefix,
    weights: torch.Tensor,
    max_weight: float = DEFAULT_MAX_GUIDANCE_WEIGHT,
) -> torch.Tensor:
    """The velocity (B, H, A) at x (B, H, A) and time (B,), pulled towards committed.actions by weights (B, H).

    A row whose weights are all zero comes back as it was.
    """
    denoised = x - time[:, None, None] * velocity
    error = (committed.actions - denoised) * weights[:, :, None]
    return velocity - guidance_weight(time, max_weight)[:, None, None] * error
