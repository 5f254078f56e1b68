"""Picture features to language tokens: neighbouring patches become one wide one, then one projection.

Shapes: N pictures, h x w patches, W vision width, s patches to a side of a cell, D language width.
"""

from __future__ import annotations

import torch
from torch import nn


def shuffle_patches(features_NPW: torch.Tensor, patches: tuple[int, int], side: int) -> torch.Tensor:
    """(N, h*w, W) to (N, (h/s)*(w/s), s*s*W): cells row by row, in each its rows, in each its columns, channels last."""
    height, width = patches
    count, _, channels = features_NPW.shape
    cells = features_NPW.view(count, height // side, side, width // side, side, channels).transpose(2, 3)
    return cells.reshape(count, (height // side) * (width // side), side * side * channels)


class Connector(nn.Module):
    """(N, h*w, W) to (N, (h/s)*(w/s), D)."""

    def __init__(self, vision_width: int, language_width: int, patches: tuple[int, int], side: int) -> None:
        super().__init__()
        self.patches, self.side = patches, side
        self.projection = nn.Linear(vision_width * side * side, language_width, bias=False)

    def forward(self, features_NPW: torch.Tensor) -> torch.Tensor:
        tokens: torch.Tensor = self.projection(shuffle_patches(features_NPW, self.patches, self.side))
        return tokens
