"""The operations that the units are made of, and what they mean in plain torch.

A layer is seven of them: normed, project_qkv, attend, project_out, normed, gate_up, project_out; mlp_fp8 can
stand for the last two. ReferenceOps runs on every device and says what the kernels must compute; kernels.py has two more
sets of the same signatures, for few and many tokens.

Shapes: B rows, T tokens of a row, D width, H heads, E head size, M MLP width, A action size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from policies import rtc
from policies.attention import rotate, rotation
from policies.pi052.gemma import normalized
from policies.siglip import LAYER_NORM_EPS

from . import fp8
from .fp8 import Fp8Mlp
from .slots import Residual, Rows, Slots
from .weights import FusedWeights, Norm, step_times


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attributes:
    num: Query heads; there is one key head.
    size: Numbers of a head.
    """

    num: int
    size: int


@dataclass(frozen=True, kw_only=True)
class EulerTables:
    """Attributes:
    times: (N + 1,) float32, of each step; the last is 0.
    guidance: (N + 1,) float32, weight of guided chunking at each step; the last is 0.
    """

    times: torch.Tensor
    guidance: torch.Tensor

    @classmethod
    def of(cls, num_steps: int, max_guidance_weight: float, device: torch.device) -> EulerTables:
        times = step_times(num_steps, device)
        guidance = rtc.guidance_weight(times, max_guidance_weight)
        guidance[-1] = 0.0  # No Euler step begins at 0; there the formula divides by zero.
        return cls(times=times, guidance=guidance)

    @property
    def num_steps(self) -> int:
        return self.times.shape[0] - 1


class Ops(Protocol):
    def normed(self, residual: Residual, norm: Norm, rows: Rows) -> torch.Tensor:
        """Adds what is pending; the norm of the stream, (B, T, D)."""

    def settled(self, residual: Residual, rows: Rows) -> torch.Tensor:
        """Adds what is pending; the stream."""

    def project_qkv(
        self,
        normed: torch.Tensor,
        weight: torch.Tensor,
        rows: Rows,
        slots: Slots,
        layer: int,
        heads: Heads,
        *,
        keys_only: bool = False,
    ) -> torch.Tensor:
        """Projects and rotates; keys and values go into the slots. The queries, (B, T, H, E), tokens possibly apart."""

    def attend(self, q: torch.Tensor, rows: Rows, slots: Slots, layer: int) -> torch.Tensor:
        """(B, T, H * E)."""

    def project_out(self, residual: Residual, branch: torch.Tensor, weight: torch.Tensor, norm: Norm, rows: Rows) -> None:
        """The stream gets branch @ weight.T, times the gate of norm if it has one: now, or pending."""

    def gate_up(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """gelu(gate) * up, (B, T, M)."""

    def mlp_fp8(self, residual: Residual, normed: torch.Tensor, weights: Fp8Mlp) -> None:
        """gate_up and project_out without a gate, with both products in FP8, their tokens quantised on the way."""

    def expert_rows(self, slots: Slots, index: torch.Tensor, steps: torch.Tensor, *, trained: bool) -> Rows:
        """The rows of an Euler step, by their slots index (B,) int32 and steps (B,) int32.

        trained: Rows keep committed actions (trained chunking).
        """

    def action_in(self, weights: FusedWeights, rows: Rows, slots: Slots) -> torch.Tensor:
        """The slots' noisy actions as the expert's tokens, (B, T, D)."""

    def action_out(self, residual: Residual, weights: FusedWeights, rows: Rows, slots: Slots, euler: EulerTables) -> None:
        """Final norm, velocity, guidance and one Euler step of the slots' actions."""

    def logits(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Text head: (rows, D) to (rows, V) float32."""

    def add_layer_norm(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        branch_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """x (rows, D) float32 += branch + branch_bias; its LayerNorm, in the matrices' dtype."""

    def linear_gelu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor: ...


class ReferenceOps:
    """dtype: What the matrices are in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def normed(self, residual: Residual, norm: Norm, rows: Rows) -> torch.Tensor:
        return _modulated(self.settled(residual, rows), norm, rows)

    def settled(self, residual: Residual, rows: Rows) -> torch.Tensor:
        return residual.x

    def project_qkv(
        self,
        normed: torch.Tensor,
        weight: torch.Tensor,
        rows: Rows,
        slots: Slots,
        layer: int,
        heads: Heads,
        *,
        keys_only: bool = False,
    ) -> torch.Tensor:
        projected = functional.linear(normed, weight).view(*normed.shape[:2], heads.num + 2, heads.size)
        cos, sin = rotation(rows.positions, heads.size)
        q, k, v = projected[:, :, : heads.num], projected[:, :, heads.num : heads.num + 1], projected[:, :, -1]
        at = (rows.own[:, None] + torch.arange(rows.num_tokens, device=normed.device)).long()
        row = rows.slots[:, None].long().expand_as(at)
        slots.keys[layer][row, at] = rotate(k.transpose(1, 2), cos, sin)[:, 0]
        slots.values[layer][row, at] = v
        if keys_only:
            return q[..., :0]
        rotated: torch.Tensor = rotate(q.transpose(1, 2), cos, sin).transpose(1, 2)
        return rotated

    def attend(self, q: torch.Tensor, rows: Rows, slots: Slots, layer: int) -> torch.Tensor:
        num_tokens, size = q.shape[1], q.shape[3]
        capacity = slots.valid.shape[1]
        key = torch.arange(capacity, device=q.device)[None, :]
        token = torch.arange(num_tokens, device=q.device)[None, :, None]
        allowed = ((key < rows.seen[:, None]) & slots.valid[rows.slots.long()].bool())[:, None, :]
        if rows.sees_own:
            offset = (key - rows.own[:, None])[:, None, :]
            own = (offset >= 0) & (offset <= token if rows.causal else offset < num_tokens)
            allowed = allowed | own
        # Heads fold into the rows of the query: (B, T * H, E) against the one key head.
        folded = q.flatten(1, 2)
        # What nobody sees may be left from another row, and 0 * nan would be nan.
        seen = allowed.any(dim=1)[:, :, None]
        k, v = (pool[layer][rows.slots.long()].masked_fill(~seen, 0.0) for pool in (slots.keys, slots.values))
        mask = allowed.expand(-1, num_tokens, -1).repeat_interleave(q.shape[2], dim=1)
        mixed = functional.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=size**-0.5)
        return mixed.view(len(mixed), num_tokens, -1)

    def project_out(self, residual: Residual, branch: torch.Tensor, weight: torch.Tensor, norm: Norm, rows: Rows) -> None:
        out = functional.linear(branch, weight)
        residual.x.add_(out if norm.gate is None else (out * _entries(norm.gate, rows)).to(out.dtype))

    def gate_up(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up = functional.linear(normed, weight).chunk(2, dim=-1)
        return functional.gelu(gate, approximate="tanh") * up

    def mlp_fp8(self, residual: Residual, normed: torch.Tensor, weights: Fp8Mlp) -> None:
        gate, up = fp8.product(fp8.quantized(normed), weights.gate_up).to(self.dtype).float().chunk(2, dim=-1)
        out = fp8.product(fp8.quantized(functional.gelu(gate, approximate="tanh") * up), weights.down)
        residual.x.add_(out.to(self.dtype).view(residual.x.shape))

    def expert_rows(self, slots: Slots, index: torch.Tensor, steps: torch.Tensor, *, trained: bool) -> Rows:
        at = index.long()
        token = torch.arange(slots.sizes.horizon, dtype=torch.int32, device=index.device)
        return Rows(
            slots=index,
            positions=slots.action_position[at][:, None] + token,
            seen=slots.action_keys[at],
            own=torch.full_like(index, slots.sizes.text_capacity),
            steps=steps,
            clean=slots.clean[at] if trained else None,
        )

    def action_in(self, weights: FusedWeights, rows: Rows, slots: Slots) -> torch.Tensor:
        views, index = weights.views, rows.slots.long()
        actions = torch.where(_is_clean(rows)[:, :, None], slots.committed[index], slots.actions[index])
        return functional.linear(actions, views["action_in.weight"], views["action_in.bias"]).to(self.dtype)

    def action_out(self, residual: Residual, weights: FusedWeights, rows: Rows, slots: Slots, euler: EulerTables) -> None:
        views, index, norm = weights.views, rows.slots.long(), weights.expert_norm
        assert rows.steps is not None
        hidden = self.normed(residual, norm, rows).float()
        v = functional.linear(hidden, views["action_out.weight"], views["action_out.bias"])
        clean, committed = _is_clean(rows)[:, :, None], slots.committed[index]
        actions = slots.actions[index]
        time, guidance = (table[rows.steps.long()][:, None, None] for table in (euler.times, euler.guidance))
        error = (committed - (actions - time * v)) * slots.pull[index][:, :, None]
        v = v - guidance * error
        slots.actions[index] = torch.where(clean, committed, actions - v / euler.num_steps)

    def logits(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(normed, weight).float()

    def add_layer_norm(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        branch_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        if branch is not None:
            x.add_(branch)
        if branch_bias is not None:
            x.add_(branch_bias)
        return functional.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS).to(self.dtype)

    def linear_gelu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return functional.gelu(functional.linear(x, weight, bias), approximate="tanh")


def _is_clean(rows: Rows) -> torch.Tensor:
    """(B, T) bool."""
    token = torch.arange(rows.num_tokens, device=rows.positions.device)[None, :]
    if rows.clean is None:
        return torch.zeros_like(rows.positions, dtype=torch.bool)
    return token < rows.clean[:, None]


def _entries(table: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The table's row for every token, (B, T or 1, D)."""
    if rows.steps is None:
        return table[:1, None]
    if rows.clean is None:
        return table[rows.steps.long()][:, None]
    step = rows.steps.long()[:, None].expand_as(rows.positions)
    return table[torch.where(_is_clean(rows), table.shape[0] - 1, step)]


def _modulated(x: torch.Tensor, norm: Norm, rows: Rows) -> torch.Tensor:
    normed = normalized(x) * _entries(norm.scale, rows)
    if norm.shift is not None:
        normed = normed + _entries(norm.shift, rows)
    return normed.to(x.dtype)
