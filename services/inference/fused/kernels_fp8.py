"""An MLP of many tokens in FP8: cuBLAS between two kernels that quantise.

Shapes: B rows, T tokens of a row, D width, M MLP width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton

from . import fp8, triton_fp8
from .fp8 import Fp8Mlp, Quantized
from .slots import Residual

# Warps of a program that holds a whole token: of the stream, and of gelu(gate) * up, eight times as wide.
QUANTIZE_WARPS, GELU_MUL_QUANTIZE_WARPS = 4, 8
_RANGE = {"LARGEST": fp8.LARGEST, "SMALLEST": fp8.SMALLEST_SCALE}


def mlp(residual: Residual, normed: torch.Tensor, weights: Fp8Mlp, launch: Mapping[str, Any]) -> None:
    """The stream gets the MLP of normed (B, T, D). launch: How kernels start, PDL."""
    gate_up = product(quantized(normed.flatten(0, 1), launch), weights.gate_up)
    out = product(gelu_mul_quantized(gate_up, launch), weights.down)
    # Now, and not pending: between two slices of a prefix the stream is all there is.
    residual.x.view(out.shape).add_(out)


def quantized(x: torch.Tensor, launch: Mapping[str, Any]) -> Quantized:
    """Of (rows, N)."""
    num_rows, size = x.shape
    out = _empty(num_rows, size, x.device)
    triton_fp8.quantize_kernel[(num_rows,)](
        x, out.values, out.scale, SIZE=size, BLOCK=triton.next_power_of_2(size), num_warps=QUANTIZE_WARPS, **_RANGE, **launch
    )
    return out


def gelu_mul_quantized(gate_up: torch.Tensor, launch: Mapping[str, Any]) -> Quantized:
    """(rows, 2 * M) to (rows, M)."""
    num_rows, mlp = gate_up.shape[0], gate_up.shape[1] // 2
    out = _empty(num_rows, mlp, gate_up.device)
    triton_fp8.gelu_mul_quantize_kernel[(num_rows,)](
        gate_up, out.values, out.scale, MLP=mlp, BLOCK=triton.next_power_of_2(mlp), num_warps=GELU_MUL_QUANTIZE_WARPS,
        **_RANGE, **launch,
    )  # fmt: skip
    return out


def product(x: Quantized, weight: Quantized) -> torch.Tensor:
    """(rows of x, rows of weight) bfloat16."""
    return torch._scaled_mm(x.values, weight.values.T, scale_a=x.scale, scale_b=weight.scale.T, out_dtype=torch.bfloat16)


def _empty(num_rows: int, size: int, device: torch.device) -> Quantized:
    return Quantized(
        values=torch.empty(num_rows, size, dtype=fp8.FP8, device=device),
        scale=torch.empty(num_rows, 1, dtype=torch.float32, device=device),
    )
