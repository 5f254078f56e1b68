"""An action chunk from noise, with the prefix's keys and values made once.

Real-time chunking comes in two kinds, each with a delay per row of the batch: guided (policies/rtc.py), and trained, where
the committed actions stay what they are at time 0 and the rest is filled in (arXiv 2512.05964).

Shapes: B rows, T horizon, A action size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import flow_matching, rtc
from ..policy import CommittedPrefix
from .model import Pi052Network, PrefixState

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def velocity_of(network: Pi052Network, state: PrefixState) -> Velocity:
    """x (B, T, A) and time (B,) or (B, T) to the velocity (B, T, A)."""
    return lambda x, time: network.expert_step(state, x[:, None], time[:, None])[:, 0]


def guided_chunk(
    velocity: Velocity,
    noise: torch.Tensor,
    num_steps: int,
    *,
    committed: CommittedPrefix | None = None,
    schedule: rtc.PrefixSchedule = rtc.PrefixSchedule.LINEAR,
    max_guidance_weight: float = rtc.DEFAULT_MAX_GUIDANCE_WEIGHT,
) -> torch.Tensor:
    """(B, T, A) float32 from noise of that shape."""
    return flow_matching.euler(
        velocity, noise, num_steps, committed=committed, schedule=schedule, max_guidance_weight=max_guidance_weight
    )


def clean_prefix(committed: CommittedPrefix, horizon: int, max_delay: int) -> torch.Tensor:
    """(B, T) bool: committed actions that a chunk keeps. No row keeps more than training did (max_delay) or than it has."""
    kept = torch.minimum(committed.delay_steps, committed.length).clamp(min=0, max=max_delay)
    return torch.arange(horizon, device=kept.device)[None, :] < kept[:, None]


def trained_chunk(
    velocity: Velocity, noise: torch.Tensor, num_steps: int, *, committed: CommittedPrefix, max_delay: int
) -> torch.Tensor:
    """(B, T, A) float32; its first actions are the committed ones of the row's delay, bit for bit."""
    clean = clean_prefix(committed, noise.shape[1], max_delay)
    x = torch.where(clean[:, :, None], committed.actions, noise)
    for step in range(num_steps):
        time = torch.full(clean.shape, 1.0 - step / num_steps, device=noise.device).masked_fill(clean, 0.0)
        x = x - velocity(x, time) / num_steps
        x = torch.where(clean[:, :, None], committed.actions, x)
    return x
