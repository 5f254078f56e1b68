"""SigLIP vision tower: pictures to patch features (Zhai et al., arXiv 2303.15343), without its pooling head.

Shapes: N pictures, P patches (row by row), D width, M MLP width.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from .configuration import VisionSize

LAYER_NORM_EPS = 1e-6


class SiglipLayer(nn.Module):
    def __init__(self, size: VisionSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_1 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.q = nn.Linear(size.width, size.width)
        self.k = nn.Linear(size.width, size.width)
        self.v = nn.Linear(size.width, size.width)
        self.o = nn.Linear(size.width, size.width)
        self.norm_2 = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)
        self.up = nn.Linear(size.width, size.mlp)
        self.down = nn.Linear(size.mlp, size.width)

    def forward(self, x_NPD: torch.Tensor) -> torch.Tensor:
        normed_NPD = self.norm_1(x_NPD)
        q, k, v = (
            project(normed_NPD).view(*x_NPD.shape[:2], self.heads, -1).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        mixed_NPD = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_NPD = x_NPD + self.o(mixed_NPD)
        hidden_NPM = functional.gelu(self.up(self.norm_2(x_NPD)), approximate="tanh")
        mlp_NPD: torch.Tensor = self.down(hidden_NPM)
        return x_NPD + mlp_NPD


class Siglip(nn.Module):
    """(N, 3, height, width) float32 in [-1, 1] to (N, P, D)."""

    def __init__(self, size: VisionSize, num_patches: int, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.patch = nn.Conv2d(3, size.width, kernel_size=size.patch, stride=size.patch)
        self.position = nn.Embedding(num_patches, size.width)
        self.layers = nn.ModuleList(SiglipLayer(size) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width, eps=LAYER_NORM_EPS)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x_NPD = self.patch(pictures.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2) + self.position.weight
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_NPD = checkpoint.checkpoint(layer, x_NPD, use_reentrant=False)
            else:
                x_NPD = layer(x_NPD)
        normed: torch.Tensor = self.norm(x_NPD)
        return normed
