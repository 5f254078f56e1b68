"""Layers that stay in float32 whatever precision training runs in."""

from __future__ import annotations

import torch
from torch import nn


class PreciseLinear(nn.Linear):
    """A linear layer that autocast leaves alone: actions, states and flow times are few numbers, a chunk hangs on each."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
