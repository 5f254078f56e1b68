"""Matrices in FP8, every row with a scale of its own, and what their products mean in plain torch.

A row is an output of a weight, or a token of what it is multiplied with: both are summed along, so both scales stand before
the sum, and a token does not depend on its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
# A row of zeros divides by its scale too.
SMALLEST_SCALE = 1e-12
# The matrix units read so many numbers at a time, of rows and of columns.
MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """values * scale is the matrix.

    Attributes:
        values: (rows, N) FP8.
        scale: (rows, 1) float32, never 0.
    """

    values: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Fp8Mlp:
    """The two products of an MLP, beside their matrices in the layer's dtype. D width, M MLP width.

    Attributes:
        gate_up: (2 * M, D).
        down: (D, M).
    """

    gate_up: Quantized
    down: Quantized


def quantized(matrix: torch.Tensor) -> Quantized:
    """(..., N) of any floating type; leading dimensions become rows. What is not a number stays one that is not."""
    rows = matrix.flatten(0, -2)
    scale = (rows.abs().amax(dim=1, keepdim=True).float() / LARGEST).clamp(min=SMALLEST_SCALE)
    # No clamp of the values: the largest lands on LARGEST, but for a rounding that the conversion rounds away.
    return Quantized(values=(rows / scale).to(FP8), scale=scale)


def product(x: Quantized, weight: Quantized) -> torch.Tensor:
    """(rows of x, rows of weight) float32, summed in float32 as matrix units do."""
    return (x.values.float() * x.scale) @ (weight.values.float() * weight.scale).T
