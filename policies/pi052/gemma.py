"""One Gemma tower: the language model, and, with adaptive norms, the action expert.

The expert is a second, thinner tower of the same depth. Its layer n attends to the keys and values that layer n of the
language tower made, followed by its own; that is the only way from one tower to the other. So a tower takes the keys and
values it may look back at and returns those of its own tokens, and training, sampling and decoding are the same code.

Shapes: B rows, S tokens, L keys looked at, D width, C condition width, G conditions a row (S is a multiple of G; token s
takes condition s // (S / G)), N query heads, V key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from ..attention import KeysValues, attend, rotate, rotation
from ..configuration import TowerSize

RMS_EPS = 1e-6


class RmsNorm(nn.Module):
    """x / rms(x) * (1 + weight), in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        return (normalized(x_BSD) * (1.0 + self.weight.float())).to(x_BSD.dtype)


class AdaptiveRmsNorm(nn.Module):
    """x / rms(x) * (1 + scale) + shift, and a gate for the branch that follows; all three come from the condition."""

    def __init__(self, width: int, condition_width: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(condition_width, 3 * width)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x_BSD: torch.Tensor, condition_BGC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed tokens (B, S, D) and the gate, (B, S, D) or (B, 1, D)."""
        modulation = self.modulation(condition_BGC.to(self.modulation.weight.dtype)).float()
        groups = modulation.shape[1]
        if groups > 1:
            modulation = modulation.repeat_interleave(x_BSD.shape[1] // groups, dim=1)
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return (normalized(x_BSD) * (1.0 + scale) + shift).to(x_BSD.dtype), gate.to(x_BSD.dtype)


def normalized(x: torch.Tensor) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + RMS_EPS)


class GemmaLayer(nn.Module):
    """condition_width 0: plain norms and residuals; else adaptive norms and gated residuals."""

    def __init__(self, size: TowerSize, condition_width: int) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.norm_1 = _norm(size.width, condition_width)
        self.q = nn.Linear(size.width, size.heads * size.head_dim, bias=False)
        self.k = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.v = nn.Linear(size.width, size.kv_heads * size.head_dim, bias=False)
        self.o = nn.Linear(size.heads * size.head_dim, size.width, bias=False)
        self.norm_2 = _norm(size.width, condition_width)
        self.gate = nn.Linear(size.width, size.mlp, bias=False)
        self.up = nn.Linear(size.width, size.mlp, bias=False)
        self.down = nn.Linear(size.mlp, size.width, bias=False)

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor,
        past: KeysValues | None,
        condition_BGC: torch.Tensor | None,
        keys_values_only: bool,
    ) -> tuple[torch.Tensor, KeysValues]:
        """The tokens after this layer and their own keys and values; with keys_values_only the tokens as they came."""
        normed_BSD, attention_gate = _apply(self.norm_1, x_BSD, condition_BGC)
        k = rotate(self._heads(self.k(normed_BSD)), *cos_sin)
        v = self._heads(self.v(normed_BSD))
        if keys_values_only:
            return x_BSD, (k, v)
        q = rotate(self._heads(self.q(normed_BSD)), *cos_sin)
        if past is None:
            mixed = attend(q, k, v, bias)
        else:
            mixed = attend(q, torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2), bias)
        x_BSD = _residual(x_BSD, self.o(mixed), attention_gate)

        normed_BSD, mlp_gate = _apply(self.norm_2, x_BSD, condition_BGC)
        hidden = functional.gelu(self.gate(normed_BSD), approximate="tanh") * self.up(normed_BSD)
        return _residual(x_BSD, self.down(hidden), mlp_gate), (k, v)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class GemmaTower(nn.Module):
    def __init__(self, size: TowerSize, *, condition_width: int = 0, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(GemmaLayer(size, condition_width) for _ in range(size.depth))
        self.norm = _norm(size.width, condition_width)

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions_BS: torch.Tensor,
        bias: torch.Tensor,
        *,
        past: Sequence[KeysValues] | None = None,
        condition_BGC: torch.Tensor | None = None,
        keys_values_only: bool = False,
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """
        Args:
            x_BSD: Embedded tokens.
            positions_BS: int64.
            bias: (B, 1, S, L + S), added to scores; L are the keys of past.
            past: Per layer, keys and values that come before these tokens' own.
            condition_BGC: Of an expert's norms.
            keys_values_only: The hidden states are not wanted; the last layer then stops at its keys and values.

        Returns:
            Hidden states after the final norm (B, S, D), which are meaningless with keys_values_only; and per layer the
            keys and values of these tokens.
        """
        cos_sin = rotation(positions_BS, self.head_dim)
        made: list[KeysValues] = []
        for index, layer in enumerate(self.layers):
            arguments: tuple[Any, ...] = (
                x_BSD,
                cos_sin,
                bias,
                None if past is None else past[index],
                condition_BGC,
                keys_values_only and index == len(self.layers) - 1,
            )
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BSD, keys_values = checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BSD, keys_values = layer(*arguments)
            made.append(keys_values)
        if not keys_values_only:
            x_BSD, _ = _apply(self.norm, x_BSD, condition_BGC)
        return x_BSD, made


def _norm(width: int, condition_width: int) -> RmsNorm | AdaptiveRmsNorm:
    return AdaptiveRmsNorm(width, condition_width) if condition_width else RmsNorm(width)


def _apply(
    norm: RmsNorm | AdaptiveRmsNorm, x_BSD: torch.Tensor, condition_BGC: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(norm, RmsNorm):
        return norm(x_BSD), None
    assert condition_BGC is not None
    normed, gate = norm(x_BSD, condition_BGC)
    return normed, gate


def _residual(x_BSD: torch.Tensor, branch_BSD: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    return x_BSD + branch_BSD if gate is None else x_BSD + branch_BSD * gate
