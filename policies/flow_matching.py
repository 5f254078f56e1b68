"""Flow matching over action chunks, as in pi0 (arXiv 2410.24164): what every flow policy here shares.

t = 1 is noise and t = 0 is actions: x_t = t * noise + (1 - t) * actions, and the network learns noise - actions.
Shapes: B rows, H horizon, A action size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from . import rtc
from .policy import CommittedPrefix

# Beta(1.5, 1) favours the noisy end, where the direction is decided; the offset keeps t above 0.
BETA_ALPHA, BETA_BETA = 1.5, 1.0
TIME_SCALE, TIME_OFFSET = 0.999, 0.001


def draw_times(num_rows: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) float32 flow times, Beta(1.5, 1) * 0.999 + 0.001, mean about 0.6."""
    # With beta = 1 the distribution function is t^alpha, so its inverse is a root: torch's own Beta takes no generator.
    uniform = torch.rand(num_rows, generator=generator)
    return uniform.pow(1.0 / BETA_ALPHA) * TIME_SCALE + TIME_OFFSET


def embed_time(time: torch.Tensor, size: int, min_period: float, max_period: float) -> torch.Tensor:
    """(..., size) float32: sines, then cosines, of periods in equal ratios from min_period to max_period.

    Computed in float64: the shortest period turns a rounding error of time into one 1500 times as large.
    """
    fraction = torch.linspace(0.0, 1.0, size // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2.0 * math.pi * time.double()[..., None] / period
    return torch.cat([angle.sin(), angle.cos()], dim=-1).float()


def interpolate(actions: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t and the velocity to learn, both (B, H, A)."""
    t = time[:, None, None]
    return t * noise + (1.0 - t) * actions, noise - actions


def euler(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    num_steps: int,
    *,
    committed: CommittedPrefix | None = None,
    schedule: rtc.PrefixSchedule = rtc.PrefixSchedule.LINEAR,
    max_guidance_weight: float = rtc.DEFAULT_MAX_GUIDANCE_WEIGHT,
) -> torch.Tensor:
    """Integrates velocity(x (B, H, A), t (B,)) from noise at t = 1 to actions at t = 0, guided where rows have a prefix."""
    x = noise
    weights = None
    if committed is not None:
        weights = rtc.prefix_weights(
            schedule,
            delay_steps=committed.delay_steps,
            execution_horizon=committed.execution_horizon,
            length=committed.length,
            horizon=noise.shape[1],
        )
    for step in range(num_steps):
        time = torch.full((noise.shape[0],), 1.0 - step / num_steps, device=noise.device)
        v = velocity(x, time)
        if committed is not None and weights is not None:
            guided = rtc.guide(v, x, time, committed, weights, max_guidance_weight)
            # Rows without a prefix take the very same numbers as without guidance.
            v = torch.where((committed.length > 0)[:, None, None], guided, v)
        x = x - v / num_steps
    return x
