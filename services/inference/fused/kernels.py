"""The operations of ops.py by kernels: FewOps for up to some hundred tokens, ManyOps for more.

Few tokens (expert, text) are bound by reading weights and by starting kernels: eight small kernels a layer, each starting
while the one before ends. Many (vision, prefix, large expert batches) are bound by arithmetic: cuBLAS multiplies, and one
pass stands between two products.

Shapes: B rows, T tokens of a row, D width, H heads, E head size, M MLP width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from policies.attention import ROPE_BASE
from policies.pi052.config import NetworkConfig

from . import kernels_attention, kernels_fp8, triton_many, triton_rows, triton_small
from .fp8 import Fp8Mlp
from .kernels_attention import MULTIPROCESSORS
from .ops import EulerTables, Heads
from .slots import Residual, Rows, Slots, SlotSizes
from .weights import FusedWeights, Norm

# Up to so many tokens go through the kernels for few: five rows of a chunk. Beyond, cuBLAS is faster in spite of its passes.
MAX_FEW_TOKENS = 256


@dataclass(frozen=True)
class Tile:
    """How a product is cut: outputs and inner numbers of a tile, parts of the inner sum, warps, stages of the pipeline, and
    the most tokens of a tile."""

    n: int
    k: int
    parts: int
    warps: int
    stages: int
    m: int = 64


# By product and the most tokens it is for (32: text; 64, 128 and 256: one, two and four rows of an expert), found by trying
# on one H200 with weights that come from its memory.
TILES = {
    ("qkv", 32): Tile(16, 128, 1, 4, 5),
    ("gate_up", 32): Tile(32, 128, 1, 4, 5),
    ("o", 32): Tile(64, 128, 4, 4, 4),
    ("down", 32): Tile(64, 128, 8, 4, 4),
    ("logits", 32): Tile(64, 128, 1, 4, 4),
    ("qkv", 64): Tile(16, 128, 1, 4, 4),
    ("gate_up", 64): Tile(32, 128, 1, 4, 4),
    ("o", 64): Tile(32, 64, 4, 4, 6),
    ("down", 64): Tile(64, 128, 8, 4, 4),
    ("logits", 64): Tile(64, 64, 1, 4, 4),
    ("qkv", 128): Tile(32, 128, 1, 4, 4),
    ("gate_up", 128): Tile(64, 64, 1, 4, 6),
    ("o", 128): Tile(64, 128, 4, 4, 4),
    ("down", 128): Tile(64, 64, 8, 4, 6),
    ("logits", 128): Tile(64, 64, 1, 4, 4),
    ("qkv", 256): Tile(64, 64, 1, 4, 6),
    ("gate_up", 256): Tile(64, 64, 1, 8, 6, m=128),
    ("o", 256): Tile(64, 64, 4, 8, 6, m=128),
    ("down", 256): Tile(64, 64, 4, 8, 6, m=128),
    ("logits", 256): Tile(64, 64, 1, 4, 4),
}


# Tokens, outputs and inner numbers of a tile, warps, stages, and tiles of tokens that share weights, of gate and up in one.
GATE_UP_TILE = (128, 128, 64, 8, 4, 8)
# Every multiprocessor has one tile at a time. Where less than this share of what they do then is of use, cuBLAS and a pass
# behind it are faster: 600 tokens of an expert use 57 % and took 27.2 us against 20.4; 500 use 95 %, 15.2 us against 17.8.
GATE_UP_USE = 0.8


class _Rotary:
    """cos, sin: (positions, E / 2) float32."""

    def __init__(self, head_size: int, num_positions: int, device: torch.device) -> None:
        exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=device) / head_size
        angle = torch.arange(num_positions, device=device).float()[:, None] * (1.0 / ROPE_BASE**exponent)
        self.cos, self.sin = angle.cos().contiguous(), angle.sin().contiguous()


class _Shared:
    """What both sets do the same way. pdl: Kernels may start before the one before has ended."""

    def __init__(
        self, config: NetworkConfig, sizes: SlotSizes, device: torch.device, dtype: torch.dtype, *, pdl: bool = True
    ) -> None:
        self.dtype = dtype
        self.rotary = _Rotary(config.language.head_dim, sizes.capacity, device)
        self.pdl = pdl

    def normed(self, residual: Residual, norm: Norm, rows: Rows) -> torch.Tensor:
        x, parts = residual.x, residual.parts
        num_rows, num_tokens, width = x.shape
        out = torch.empty_like(x)
        triton_rows.norm_kernel[(num_rows * num_tokens,)](
            x, _or(parts, x), _or(residual.gate, x), norm.scale, _or(norm.shift, x), _or(rows.steps, x), _or(rows.clean, x),
            out, num_tokens, norm.scale.shape[0] - 1, x.numel(), WIDTH=width, BLOCK=triton.next_power_of_2(width),
            PARTS=0 if parts is None else len(parts), GATED=residual.gate is not None, SHIFTED=norm.shift is not None,
            STEPS=norm.shift is not None, CLEAN=rows.clean is not None, PDL=self.pdl, num_warps=4, **_launch(self.pdl),
        )  # fmt: skip
        residual.parts = residual.gate = None
        return out

    def settled(self, residual: Residual, rows: Rows) -> torch.Tensor:
        assert residual.parts is None, "only the expert and text leave a branch pending, and they end with a norm"
        return residual.x

    def mlp_fp8(self, residual: Residual, normed: torch.Tensor, weights: Fp8Mlp) -> None:
        kernels_fp8.mlp(residual, normed, weights, {"PDL": self.pdl, **_launch(self.pdl)})

    def attend(self, q: torch.Tensor, rows: Rows, slots: Slots, layer: int) -> torch.Tensor:
        return kernels_attention.attend(q, rows, slots, layer, {"PDL": self.pdl, **_launch(self.pdl)})


class FewOps(_Shared):
    """More than max_few_tokens go to ManyOps."""

    def __init__(
        self, config: NetworkConfig, sizes: SlotSizes, device: torch.device, dtype: torch.dtype, *, pdl: bool = True
    ) -> None:
        super().__init__(config, sizes, device, dtype, pdl=pdl)
        self.tiles = dict(TILES)
        self.max_few_tokens = MAX_FEW_TOKENS
        self._many = ManyOps(config, sizes, device, dtype, pdl=pdl)

    def normed(self, residual: Residual, norm: Norm, rows: Rows) -> torch.Tensor:
        return self._many.normed(residual, norm, rows) if self._is_many(residual.x) else super().normed(residual, norm, rows)

    def project_qkv(
        self, normed: torch.Tensor, weight: torch.Tensor, rows: Rows, slots: Slots, layer: int, heads: Heads,
        *, keys_only: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        if self._is_many(normed):
            return self._many.project_qkv(normed, weight, rows, slots, layer, heads, keys_only=keys_only)
        assert not keys_only, "the last layer of a prefix has many tokens"
        num_rows, num_tokens, width = normed.shape
        half, total = heads.size // 2, num_rows * num_tokens
        m, tile = self._tile("qkv", total)
        n = min(tile.n, half)
        q = torch.empty(num_rows, num_tokens, heads.num, heads.size, dtype=normed.dtype, device=normed.device)
        triton_small.qkv_kernel[((heads.num + 2) * half // n, triton.cdiv(total, m))](
            normed, weight, q, slots.keys[layer], slots.values[layer], self.rotary.cos, self.rotary.sin, rows.slots,
            rows.own, rows.positions, total, num_tokens, slots.keys.stride(1), WIDTH=width, HEADS=heads.num, HALF=half,
            PDL=self.pdl, M=m, N=n, K=min(tile.k, width), num_warps=tile.warps, num_stages=tile.stages, **_launch(self.pdl),
        )  # fmt: skip
        return q

    def project_out(self, residual: Residual, branch: torch.Tensor, weight: torch.Tensor, norm: Norm, rows: Rows) -> None:
        if self._is_many(branch):
            return self._many.project_out(residual, branch, weight, norm, rows)
        width, inner = weight.shape
        what = "o" if inner <= 2 * width else "down"
        residual.parts = self._parts(what, branch, weight).view(-1, *branch.shape[:2], width)
        residual.gate = norm.gate
        return None

    def gate_up(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if self._is_many(normed):
            return self._many.gate_up(normed, weight)
        num_rows, num_tokens, width = normed.shape
        mlp, total = weight.shape[0] // 2, num_rows * num_tokens
        m, tile = self._tile("gate_up", total)
        out = torch.empty(num_rows, num_tokens, mlp, dtype=normed.dtype, device=normed.device)
        triton_small.gate_up_kernel[(mlp // min(tile.n, mlp), triton.cdiv(total, m))](
            normed, weight, out, total, WIDTH=width, MLP=mlp, PDL=self.pdl, M=m, N=min(tile.n, mlp), K=min(tile.k, width),
            num_warps=tile.warps, num_stages=tile.stages, **_launch(self.pdl),
        )  # fmt: skip
        return out

    def logits(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._parts("logits", normed[:, None], weight)[0]

    def expert_rows(self, slots: Slots, index: torch.Tensor, steps: torch.Tensor, *, trained: bool) -> Rows:
        num_rows, horizon = len(index), slots.sizes.horizon
        positions = torch.empty(num_rows, horizon, dtype=torch.int32, device=index.device)
        seen, own, clean = (torch.empty_like(index) for _ in range(3))
        # Without PDL: kernels further on read these numbers before they wait for the one in front of them.
        triton_small.expert_rows_kernel[(num_rows,)](
            index, slots.action_position, slots.action_keys, slots.clean, positions, seen, own, clean, horizon,
            slots.sizes.text_capacity, BLOCK=triton.next_power_of_2(horizon), num_warps=1,
        )  # fmt: skip
        clean_or_none = clean if trained else None
        return Rows(slots=index, positions=positions, seen=seen, own=own, steps=steps, clean=clean_or_none)

    def action_in(self, weights: FusedWeights, rows: Rows, slots: Slots) -> torch.Tensor:
        weight = weights.views["action_in.weight"]
        width, size = weight.shape
        num_tokens = rows.num_tokens
        out = torch.empty(rows.num_rows, num_tokens, width, dtype=weights.dtype, device=weight.device)
        block = min(32, triton.next_power_of_2(width))
        triton_small.action_in_kernel[(triton.cdiv(width, block), triton.cdiv(num_tokens, 16), rows.num_rows)](
            slots.actions, slots.committed, weight, weights.views["action_in.bias"], out, rows.slots,
            _or(rows.clean, weight), num_tokens, size, WIDTH=width, SIZE=max(16, triton.next_power_of_2(size)),
            CLEAN=rows.clean is not None, PDL=self.pdl, M=16, N=block, num_warps=4, **_launch(self.pdl),
        )  # fmt: skip
        return out

    def action_out(self, residual: Residual, weights: FusedWeights, rows: Rows, slots: Slots, euler: EulerTables) -> None:
        x, parts = residual.x, residual.parts
        views, norm = weights.views, weights.expert_norm
        num_rows, num_tokens, width = x.shape
        size = slots.actions.shape[2]
        assert norm.shift is not None
        triton_small.action_out_kernel[(num_rows * num_tokens,)](
            x, _or(parts, x), _or(residual.gate, x), norm.scale, norm.shift, views["action_out.weight"],
            views["action_out.bias"], slots.actions, slots.committed, slots.pull, euler.times, euler.guidance, rows.slots,
            rows.steps, _or(rows.clean, x), num_tokens, size, euler.num_steps, x.numel(),
            WIDTH=width, SIZE=triton.next_power_of_2(size), PARTS=0 if parts is None else len(parts),
            CLEAN=rows.clean is not None, PDL=self.pdl, K=min(256, width), num_warps=4, **_launch(self.pdl),
        )  # fmt: skip
        residual.parts = residual.gate = None

    def add_layer_norm(self, *arguments: Any) -> torch.Tensor:
        return self._many.add_layer_norm(*arguments)

    def linear_gelu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return self._many.linear_gelu(x, weight, bias)

    def _is_many(self, x: torch.Tensor) -> bool:
        return x.shape[0] * x.shape[1] > self.max_few_tokens

    def _tile(self, what: str, total: int) -> tuple[int, Tile]:
        """Tokens of a tile, and the rest of it."""
        bucket = next((most for most in (32, 64, 128) if total <= most), 256)
        tile = self.tiles[what, bucket]
        return (min(tile.m, 16 if total <= 16 else 32) if total <= 32 else tile.m), tile

    def _parts(self, what: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x @ weight.T as (parts, tokens, outputs) float32."""
        outputs, inner = weight.shape
        total = x.shape[0] * x.shape[1]
        m, tile = self._tile(what, total)
        parts = max(1, min(tile.parts, inner // tile.k))
        out = torch.empty(parts, total, outputs, dtype=torch.float32, device=x.device)
        triton_small.parts_kernel[(triton.cdiv(outputs, tile.n), parts, triton.cdiv(total, m))](
            x, weight, out, total, outputs, INNER=inner, PARTS=parts, PDL=self.pdl, M=m, N=tile.n,
            K=min(tile.k, inner // parts), num_warps=tile.warps, num_stages=tile.stages, **_launch(self.pdl),
        )  # fmt: skip
        return out


class ManyOps(_Shared):
    """cuBLAS between our kernels."""

    def project_qkv(
        self, normed: torch.Tensor, weight: torch.Tensor, rows: Rows, slots: Slots, layer: int, heads: Heads,
        *, keys_only: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        num_rows, num_tokens = normed.shape[:2]
        queries = 0 if keys_only else heads.num
        qkv = functional.linear(normed, weight[(heads.num - queries) * heads.size :])
        triton_rows.rotate_kernel[(num_rows * num_tokens,)](
            qkv, slots.keys[layer], slots.values[layer], self.rotary.cos, self.rotary.sin, rows.slots, rows.own,
            rows.positions, num_tokens, slots.keys.stride(1), HEADS=queries, PADDED=triton.next_power_of_2(queries + 2),
            HALF=heads.size // 2, PDL=self.pdl, num_warps=4, **_launch(self.pdl),
        )  # fmt: skip
        return qkv.view(num_rows, num_tokens, queries + 2, heads.size)[:, :, :queries]

    def project_out(self, residual: Residual, branch: torch.Tensor, weight: torch.Tensor, norm: Norm, rows: Rows) -> None:
        if norm.gate is None:
            residual.x.view(-1, residual.x.shape[2]).addmm_(branch.flatten(0, 1), weight.T)
        else:
            residual.parts, residual.gate = functional.linear(branch, weight)[None], norm.gate

    def gate_up(self, normed: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        num_rows, num_tokens, width = normed.shape
        mlp, total = weight.shape[0] // 2, num_rows * num_tokens
        out = torch.empty(num_rows, num_tokens, mlp, dtype=normed.dtype, device=normed.device)
        m, n, k, warps, stages, group = GATE_UP_TILE
        rounds = triton.cdiv(triton.cdiv(total, m) * triton.cdiv(mlp, n), MULTIPROCESSORS)
        used = total * mlp / (rounds * MULTIPROCESSORS * m * n)
        if used >= GATE_UP_USE and mlp % n == 0 and width % k == 0 and normed.dtype == torch.bfloat16:
            of_x, of_w, of_out = (
                TensorDescriptor.from_tensor(tensor, block)
                for tensor, block in (
                    (normed.view(total, width), [m, k]), (weight, [n, k]), (out.view(total, mlp), [m, n])
                )
            )  # fmt: skip
            triton_many.gate_up_many_kernel[(MULTIPROCESSORS,)](
                of_x, of_w, of_out, total, WIDTH=width, MLP=mlp, M=m, N=n, K=k, GROUP=group, PROGRAMS=MULTIPROCESSORS,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
            return out
        gate_up = functional.linear(normed, weight)
        block = min(2048, triton.next_power_of_2(mlp))
        triton_rows.gelu_mul_kernel[(triton.cdiv(mlp, block), normed.shape[0] * normed.shape[1])](
            gate_up, out, MLP=mlp, BLOCK=block, PDL=self.pdl, num_warps=4, **_launch(self.pdl)
        )
        return out

    def add_layer_norm(
        self,
        x: torch.Tensor,
        branch: torch.Tensor | None,
        branch_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> torch.Tensor:
        width = x.shape[1]
        out = torch.empty(x.shape, dtype=self.dtype, device=x.device)
        triton_rows.add_layer_norm_kernel[(len(x),)](
            x, _or(branch, x), _or(branch_bias, x), weight, bias, out,
            WIDTH=width, BLOCK=triton.next_power_of_2(width), BRANCH=branch is not None, PDL=self.pdl,
            num_warps=1, **_launch(self.pdl),
        )  # fmt: skip
        return out

    def linear_gelu(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch._addmm_activation(bias, x, weight.T, use_gelu=True)


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Kernels want a pointer, also where they will not look."""
    return other if tensor is None else tensor


def _launch(pdl: bool) -> dict[str, Any]:
    return {"launch_pdl": True} if pdl else {}
