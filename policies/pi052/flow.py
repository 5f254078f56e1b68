"""Flow matching in training: K noises and times per sample over one prefix.

Rows of what is drawn are repeat-major, row k * B + b, as in lerobot: the same draws then mean the same loss.

Shapes: B rows, K repeats, T horizon, A action size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import flow_matching
from .model import Pi052Network, PrefixState


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Attributes:
    noise: (K*B, T, A) float32 standard normal.
    time: (K*B,) float32 in (0, 1], 1 is pure noise.
    clean: (K*B,) int64, first actions that stay as they are, at time 0; None where training knows no such prefix.
    """

    noise: torch.Tensor
    time: torch.Tensor
    clean: torch.Tensor | None = None

    def to(self, device: torch.device) -> Draws:
        clean = None if self.clean is None else self.clean.to(device)
        return Draws(noise=self.noise.to(device), time=self.time.to(device), clean=clean)


def draw(num_rows: int, horizon: int, action_size: int, max_clean: int, generator: torch.Generator) -> Draws:
    """num_rows is K * B; max_clean 0 is no clean prefix. Drawn on the CPU, noise first."""
    noise = torch.randn(num_rows, horizon, action_size, generator=generator)
    time = flow_matching.draw_times(num_rows, generator)
    clean = torch.randint(0, max_clean + 1, (num_rows,), generator=generator) if max_clean else None
    return Draws(noise=noise, time=time, clean=clean)


def squared_errors(
    network: Pi052Network, state: PrefixState, actions: torch.Tensor, draws: Draws
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, K, T, A) squared errors of the velocity for actions (B, T, A), and (B, K, T) bool which of them count."""
    rows, horizon = actions.shape[:2]
    repeats = draws.noise.shape[0] // rows
    x, target = flow_matching.interpolate(actions.repeat(repeats, 1, 1), draws.noise, draws.time)
    time, counted = draws.time, None
    if draws.clean is not None:
        clean = torch.arange(horizon, device=actions.device)[None, :] < draws.clean[:, None]
        x = torch.where(clean[:, :, None], actions.repeat(repeats, 1, 1), x)
        time = time[:, None].expand(clean.shape).masked_fill(clean, 0.0)
        counted = _by_row(~clean, repeats)
    velocity = network.expert_step(state, _by_row(x, repeats), _by_row(time, repeats))
    return (_by_row(target, repeats) - velocity).square(), counted


def _by_row(values: torch.Tensor, repeats: int) -> torch.Tensor:
    """(K*B, ...) to (B, K, ...)."""
    return values.view(repeats, -1, *values.shape[1:]).transpose(0, 1)
