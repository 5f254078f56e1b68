"""The two towers of SmolVLA: Llama's layers, which read the prefix, and the expert's, which read actions and the prefix.

The expert has as many layers. Some attend, as in pi0, to the keys and values that the same layer of the language tower made
followed by their own; the others only to the language tower's, which they first project anew.

Shapes: B rows, S tokens of the prefix, T actions, L keys looked at, D width, N query heads, V key heads, H head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.utils import checkpoint

from ..attention import KeysValues, attend, rotate, rotation
from ..configuration import TowerSize

CosSin = tuple[torch.Tensor, torch.Tensor]


class RmsNorm(nn.Module):
    """x / rms(x) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        x = x_BSD.float()
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return (x * self.weight.float()).to(x_BSD.dtype)


class Block(nn.Module):
    """Weights and halves that both kinds of layers have.

    key_width: Of what keys and values are projected from; the tower's own width unless told otherwise.
    """

    def __init__(self, size: TowerSize, eps: float, *, key_width: int | None = None) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.norm_1 = RmsNorm(size.width, eps)
        self.q = nn.Linear(size.width, size.heads * size.head_dim, bias=False)
        self.k = nn.Linear(key_width or size.width, size.kv_heads * size.head_dim, bias=False)
        self.v = nn.Linear(key_width or size.width, size.kv_heads * size.head_dim, bias=False)
        self.o = nn.Linear(size.heads * size.head_dim, size.width, bias=False)
        self.norm_2 = RmsNorm(size.width, eps)
        self.gate = nn.Linear(size.width, size.mlp, bias=False)
        self.up = nn.Linear(size.width, size.mlp, bias=False)
        self.down = nn.Linear(size.mlp, size.width, bias=False)

    def _after_attention(self, x_BSD: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        x_BSD = x_BSD + self.o(mixed)
        normed_BSD = self.norm_2(x_BSD)
        mlp: torch.Tensor = self.down(functional.silu(self.gate(normed_BSD)) * self.up(normed_BSD))
        return x_BSD + mlp

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class LlamaLayer(Block):
    """Self attention, over keys and values that came before and the tokens' own."""

    def forward(
        self,
        x_BSD: torch.Tensor,
        cos_sin: CosSin,
        bias: torch.Tensor,
        past: KeysValues | None,
        keys_values_only: bool = False,
    ) -> tuple[torch.Tensor, KeysValues]:
        """The tokens after this layer and their own keys and values; with keys_values_only the tokens as they came."""
        normed_BSD = self.norm_1(x_BSD)
        k = rotate(self._heads(self.k(normed_BSD)), *cos_sin)
        v = self._heads(self.v(normed_BSD))
        if keys_values_only:
            return x_BSD, (k, v)
        q = rotate(self._heads(self.q(normed_BSD)), *cos_sin)
        if past is None:
            mixed = attend(q, k, v, bias)
        else:
            mixed = attend(q, torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2), bias)
        return self._after_attention(x_BSD, mixed), (k, v)


class CrossLayer(Block):
    """An expert layer that attends to the prefix alone."""

    def __init__(self, size: TowerSize, eps: float) -> None:
        super().__init__(size, eps, key_width=size.kv_heads * size.head_dim)

    def project(self, keys_values: KeysValues) -> KeysValues:
        """The language tower's keys, rotated as they are, and values to this layer's own."""
        k, v = (x.transpose(1, 2).flatten(2) for x in keys_values)
        return self._heads(self.k(k)), self._heads(self.v(v))

    def forward(
        self, x_BTD: torch.Tensor, cos_sin: CosSin, bias: torch.Tensor, keys_values: KeysValues, is_projected: bool
    ) -> torch.Tensor:
        """The tokens after this layer. keys_values: What project() made, or with is_projected False what it takes."""
        if not is_projected:
            keys_values = self.project(keys_values)
        q = rotate(self._heads(self.q(self.norm_1(x_BTD))), *cos_sin)
        return self._after_attention(x_BTD, attend(q, *keys_values, bias))


class LlamaTower(nn.Module):
    def __init__(self, size: TowerSize, eps: float, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(LlamaLayer(size, eps) for _ in range(size.depth))
        self.norm = RmsNorm(size.width, eps)

    def forward(
        self,
        x_BSD: torch.Tensor,
        positions_BS: torch.Tensor,
        bias: torch.Tensor,
        *,
        past: Sequence[KeysValues] | None = None,
        keys_values_only: bool = False,
    ) -> tuple[torch.Tensor, list[KeysValues]]:
        """
        Args:
            x_BSD: Embedded tokens.
            positions_BS: int64.
            bias: (B, 1, S, L + S), added to scores; L are the keys of past.
            past: Per layer, keys and values that come before these tokens' own.
            keys_values_only: The hidden states are not wanted; the last layer then stops at its keys and values.

        Returns:
            Hidden states after the final norm (B, S, D), which are meaningless with keys_values_only; and per layer the
            keys and values of these tokens.
        """
        cos_sin = rotation(positions_BS, self.head_dim)
        made: list[KeysValues] = []
        for index, layer in enumerate(self.layers):
            only = keys_values_only and index == len(self.layers) - 1
            arguments = (x_BSD, cos_sin, bias, None if past is None else past[index], only)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BSD, keys_values = checkpoint.checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BSD, keys_values = layer(*arguments)
            made.append(keys_values)
        return x_BSD if keys_values_only else self.norm(x_BSD), made


class ExpertTower(nn.Module):
    """is_self: Of each layer, that it attends to the actions before too."""

    def __init__(
        self, size: TowerSize, eps: float, is_self: Sequence[bool], *, gradient_checkpointing: bool = False
    ) -> None:
        super().__init__()
        self.head_dim = size.head_dim
        self.gradient_checkpointing = gradient_checkpointing
        self.layers = nn.ModuleList(LlamaLayer(size, eps) if own else CrossLayer(size, eps) for own in is_self)
        self.norm = RmsNorm(size.width, eps)

    def project(self, keys_values: Sequence[KeysValues]) -> list[KeysValues]:
        """Per layer what actions see of the language tower: the same for every Euler step."""
        return [
            layer.project(made) if isinstance(layer, CrossLayer) else made
            for layer, made in zip(self.layers, keys_values, strict=True)
        ]

    def forward(
        self,
        x_BTD: torch.Tensor,
        positions_BT: torch.Tensor,
        bias: torch.Tensor,
        cross_positions_BT: torch.Tensor,
        cross_bias: torch.Tensor,
        keys_values: Sequence[KeysValues],
        is_projected: bool,
    ) -> torch.Tensor:
        """(B, T, D) after the final norm.

        Args:
            x_BTD: Embedded actions.
            positions_BT, bias: int64, and (B, 1, T, S + T): in layers with self attention.
            cross_positions_BT, cross_bias: int64, and (B, 1, T, S): in the others.
            keys_values, is_projected: Of the language tower, or what project() made of them.
        """
        cos_sin, cross_cos_sin = (rotation(positions, self.head_dim) for positions in (positions_BT, cross_positions_BT))

        def run(layer: nn.Module, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            if isinstance(layer, CrossLayer):
                after: torch.Tensor = layer(x, cross_cos_sin, cross_bias, (keys, values), is_projected)
            else:
                after, _ = layer(x, cos_sin, bias, (keys, values))
            return after

        for layer, (keys, values) in zip(self.layers, keys_values, strict=True):
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint.checkpoint(run, layer, x_BTD, keys, values, use_reentrant=False)
            else:
                x_BTD = run(layer, x_BTD, keys, values)
        normed: torch.Tensor = self.norm(x_BTD)
        return normed
