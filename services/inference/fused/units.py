"""The units of work of one pi052 network: vision, prefix, expert step, text. Each reads and writes slots.

A unit is a function of tensors on the device and nothing else: no value of theirs is looked at on the host, so that a CUDA
graph can hold it (graphs.py). On the CPU the same functions run as they are.

Shapes: B rows, I cameras, P tokens of a camera, L prompt tokens, S = I * P + L, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from policies import text

from .fp8 import Fp8Mlp
from .layout import patch_columns
from .ops import EulerTables, Heads, Ops
from .slots import Residual, Rows, Slots
from .weights import FusedWeights, Layer

# Bits of a row's text flags.
TOO_SHORT, NO_LOCATIONS = 1, 2


@dataclass(frozen=True, kw_only=True)
class Units:
    """Attributes:
    few, many: Operations for towers over few tokens (expert, text) and many (vision, prefix).
    forbidden: (4, V) bool by text flags: tokens that may not come.
    trained: Chunks keep committed actions (trained chunking), so tokens of a row may stand at two times.
    """

    weights: FusedWeights
    slots: Slots
    euler: EulerTables
    few: Ops
    many: Ops
    forbidden: torch.Tensor
    trained: bool

    def begin(self, slots: torch.Tensor, num_clean: torch.Tensor, numbers: torch.Tensor) -> None:
        """Sets what chunks begin with.

        Args:
            slots, num_clean: (B,) int32.
            numbers: (B, 2 * T * A + T) float32, see ChunkStart.
        """
        pool, index = self.slots, slots.long()
        horizon, size = pool.actions.shape[1:]
        noise, committed, pull = torch.split(numbers, [horizon * size, horizon * size, horizon], dim=1)
        pool.actions[index] = noise.view(-1, horizon, size)
        pool.committed[index] = committed.view(-1, horizon, size)
        pool.pull[index] = pull
        pool.clean[index] = num_clean

    def vision_of_bytes(self, pictures: torch.Tensor) -> torch.Tensor:
        """vision() of (N, height, width, 3) uint8: bytes travel, numbers are made where they are needed."""
        return self.vision(self.numbers_of(pictures))

    def numbers_of(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, height, width, 3) uint8 to (N, 3, height, width) float32 in [-1, 1], as images.prepare() makes them."""
        return (pictures.permute(0, 3, 1, 2).float() / 255.0 * 2.0 - 1.0).contiguous()

    def vision(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, height, width) float32 in [-1, 1] to (N, P, D): a picture does not depend on its neighbours."""
        x = self.vision_begin(pictures)
        branch = self.vision_layers(x, None, range(self.weights.config.vision.depth))
        return self.vision_end(x, branch)

    def vision_begin(self, pictures: torch.Tensor) -> torch.Tensor:
        """The stream of vision's layers, (N * P, vision width) float32."""
        views, size = self.weights.views, self.weights.config.vision
        patches = _patches(pictures, size.patch, patch_columns(self.weights.config), self.weights.dtype)
        x = functional.linear(patches, views["vision.patch.weight"]).float() + views["vision.position"]
        return x.flatten(0, 1)

    def vision_layers(self, x: torch.Tensor, branch: torch.Tensor | None, layers: range) -> torch.Tensor | None:
        """Some of the layers.

        Args:
            x: (N * P, vision width) float32, in place.
            branch: Of the last layer run, still to be added to x, without its bias; None before the first.

        Returns:
            The branch that is to be added now, (N * P, vision width) in the matrices' dtype.
        """
        views, size, ops = self.weights.views, self.weights.config.vision, self.many
        num = x.shape[0] // self.weights.config.num_patches
        for index in layers:
            at = f"vision.layers.{index}"
            normed = ops.add_layer_norm(x, branch, self._vision_bias(index - 1), *_norm(views, f"{at}.norm_1"))
            qkv = functional.linear(normed, views[f"{at}.qkv.weight"], views[f"{at}.qkv.bias"])
            q, k, v = qkv.view(num, -1, 3, size.heads, size.width // size.heads).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)
            branch = functional.linear(mixed, views[f"{at}.o.weight"])
            normed = ops.add_layer_norm(x, branch, views[f"{at}.o.bias"], *_norm(views, f"{at}.norm_2"))
            hidden = ops.linear_gelu(normed, views[f"{at}.up.weight"], views[f"{at}.up.bias"])
            branch = functional.linear(hidden, views[f"{at}.down.weight"])
        return branch

    def vision_end(self, x: torch.Tensor, branch: torch.Tensor | None) -> torch.Tensor:
        """(N, P, D), of the stream behind the last layer and the branch still to be added."""
        views, config = self.weights.views, self.weights.config
        bias = self._vision_bias(config.vision.depth - 1)
        normed = self.many.add_layer_norm(x, branch, bias, *_norm(views, "vision.norm"))
        tokens = functional.linear(normed, views["vision.projector.weight"], views["vision.projector.bias"])
        return tokens.view(-1, config.num_patches, tokens.shape[-1])

    def prefix(
        self,
        slots: torch.Tensor,
        picture_tokens: torch.Tensor,
        picture_valid: torch.Tensor,
        tokens: torch.Tensor,
        token_valid: torch.Tensor,
    ) -> None:
        """Fills slots with keys, values and what actions and text need to begin.

        Args:
            slots: (B,) int32.
            picture_tokens: (B, I * P, D).
            picture_valid: (B, I) int32, 0 for a camera the row lacks.
            tokens, token_valid: (B, L) int32, padded on the right.
        """
        valid = self.prefix_valid(picture_valid, token_valid)
        rows = self.prefix_rows(slots, valid)
        residual = Residual(x=self.prefix_begin(picture_tokens, tokens))
        self.prefix_layers(residual, rows, range(len(self.weights.language) - 1))
        self.prefix_end(residual, rows, valid)

    def prefix_valid(self, picture_valid: torch.Tensor, token_valid: torch.Tensor) -> torch.Tensor:
        """(B, S) bool: tokens that may be seen."""
        patches = picture_valid.repeat_interleave(self.weights.config.num_patches, dim=1)
        return torch.cat([patches, token_valid], dim=1).bool()

    def prefix_rows(self, slots: torch.Tensor, valid: torch.Tensor) -> Rows:
        """Rows of a prefix of S tokens, whose slots know from now on which of them are valid."""
        pool, length = self.slots, valid.shape[1]
        pool.valid[slots.long()] = functional.pad(valid.to(torch.uint8), (0, pool.valid.shape[1] - length), value=1)
        return Rows(
            slots=slots,
            positions=(valid.cumsum(dim=1) - 1).clamp(min=0).int(),
            # Every token's keys are there before one is looked at: a prefix looks back at itself.
            seen=torch.full_like(slots, length),
            own=torch.zeros_like(slots),
            sees_own=False,
        )

    def prefix_begin(self, picture_tokens: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The stream of the language layers, (B, S, D)."""
        return torch.cat([picture_tokens, self._embedded(tokens)], dim=1)

    def prefix_layers(self, residual: Residual, rows: Rows, layers: range) -> None:
        """Some of the layers, all but the last."""
        for number in layers:
            layer = self.weights.language[number]
            self._layer(residual, layer, number, rows, self.many, layer.fp8)

    def prefix_end(self, residual: Residual, rows: Rows, valid: torch.Tensor) -> None:
        """Of the last layer keys and values, and for each row where actions and text begin."""
        pool, many, index = self.slots, self.many, rows.slots.long()
        num_rows, length = valid.shape
        last_layer, number = self.weights.language[-1], len(self.weights.language) - 1
        normed = many.normed(residual, last_layer.norm_1, rows)
        many.project_qkv(normed, last_layer.qkv, rows, pool, number, self._heads, keys_only=True)
        # Padding stands behind the prompt: its last valid token is what text follows.
        last = length - 1 - valid.flip(1).long().argmax(dim=1)
        x = many.settled(residual, rows)
        pool.last_hidden[index] = x[torch.arange(num_rows, device=x.device), last]
        num_valid = valid.sum(dim=1).int()
        for count in (pool.action_keys, pool.text_keys):
            count[index] = torch.full_like(rows.slots, length)
        for position in (pool.action_position, pool.text_position):
            position[index] = num_valid

    def expert_step(self, slots: torch.Tensor, steps: torch.Tensor) -> None:
        """One Euler step of each row's chunk, in place in its slot.

        Args:
            slots: (B,) int32, no slot twice but the scratch slot.
            steps: (B,) int32, 0 for the first; rows may be at different ones.
        """
        few, pool = self.few, self.slots
        rows = few.expert_rows(pool, slots, steps, trained=self.trained)
        residual = Residual(x=few.action_in(self.weights, rows, pool))
        for number, layer in enumerate(self.weights.expert):
            self._layer(residual, layer, number, rows, few)
        few.action_out(residual, self.weights, rows, pool, self.euler)

    def first_text(self, slots: torch.Tensor, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What follows the prompt: runs the last layer that prefix() left out, for the last token alone.

        Args:
            slots: (B,) int32, straight after their prefix.
            flags: (B,) int32, TOO_SHORT and NO_LOCATIONS.

        Returns:
            Logits (B, V) float32, -inf for what may not come, and the likeliest tokens (B,) int64; they are the slots' too.
        """
        pool, few, index = self.slots, self.few, slots.long()
        rows = Rows(
            slots=slots,
            positions=(pool.text_position[index] - 1)[:, None],
            seen=pool.text_keys[index],
            # The token's keys are in the prefix already; these go where an expert step will write over them.
            own=torch.full_like(slots, pool.sizes.text_capacity),
            sees_own=False,
        )
        residual = Residual(x=pool.last_hidden[index][:, None].contiguous())
        self._layer(residual, self.weights.language[-1], len(self.weights.language) - 1, rows, few)
        return self._chosen(residual, rows, flags)

    def text_step(self, slots: torch.Tensor, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads the slots' newest token and answers like first_text() what may follow."""
        pool, few, index = self.slots, self.few, slots.long()
        seen, position = pool.text_keys[index], pool.text_position[index]
        rows = Rows(slots=slots, positions=position[:, None], seen=seen, own=seen)
        residual = Residual(x=self._embedded(pool.token[index])[:, None].contiguous())
        for number, layer in enumerate(self.weights.language):
            self._layer(residual, layer, number, rows, few)
        # A slot that is full, as the scratch slot will be, writes over its last key.
        pool.text_keys[index] = (seen + 1).clamp(max=pool.sizes.text_capacity - 1)
        pool.text_position[index] = position + 1
        return self._chosen(residual, rows, flags)

    def check_draft(
        self, slots: torch.Tensor, flags: torch.Tensor, draft: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads each slot's newest token and a draft of what follows it, in one pass; exact for greedy decoding.

        Args:
            slots, flags: (B,) int32; the flags hold for every token of the draft.
            draft: (B, F) int32, padded with -1.

        Returns:
            The tokens that greedy decoding gives, (B, F + 1), and how many of them are (B,) int64, at least 1: those of the
            draft that it agrees with, and the one after them. The slots stand behind the last of them but one, as after so
            many text_step().
        """
        pool, few, index = self.slots, self.few, slots.long()
        tokens = torch.cat([pool.token[index][:, None], draft], dim=1)
        seen, position = pool.text_keys[index], pool.text_position[index]
        offset = torch.arange(tokens.shape[1], dtype=torch.int32, device=slots.device)
        rows = Rows(slots=slots, positions=position[:, None] + offset, seen=seen, own=seen, causal=True)
        residual = Residual(x=self._embedded(tokens.clamp(min=0)))
        for number, layer in enumerate(self.weights.language):
            self._layer(residual, layer, number, rows, few)
        normed = few.normed(residual, self.weights.language_norm, rows)
        logits = few.logits(normed.flatten(0, 1), self.weights.views["text_head"])
        logits = logits.view(*tokens.shape, -1).masked_fill_(self.forbidden[flags.long()][:, None], -math.inf)
        greedy = logits.argmax(dim=-1)
        agreed = (greedy[:, :-1] == draft).long().cumprod(dim=1).sum(dim=1)
        pool.text_keys[index] = (seen + agreed + 1).clamp(max=pool.sizes.text_capacity - 1).int()
        pool.text_position[index] = (position + agreed + 1).int()
        pool.token[index] = greedy.gather(1, agreed[:, None])[:, 0]
        return greedy, agreed + 1

    # -- parts ---------------------------------------------------------------------------------------------------------

    @property
    def _heads(self) -> Heads:
        return Heads(num=self.weights.config.language.heads, size=self.weights.config.language.head_dim)

    def _vision_bias(self, layer: int) -> torch.Tensor | None:
        """Of the branch that a layer leaves to be added; None before the first."""
        return self.weights.views[f"vision.layers.{layer}.down.bias"] if layer >= 0 else None

    def _layer(
        self, residual: Residual, layer: Layer, number: int, rows: Rows, ops: Ops, mlp_fp8: Fp8Mlp | None = None
    ) -> None:
        """mlp_fp8: Takes the place of gate_up and down."""
        normed = ops.normed(residual, layer.norm_1, rows)
        q = ops.project_qkv(normed, layer.qkv, rows, self.slots, number, self._heads)
        ops.project_out(residual, ops.attend(q, rows, self.slots, number), layer.o, layer.norm_1, rows)
        normed = ops.normed(residual, layer.norm_2, rows)
        if mlp_fp8 is not None:
            ops.mlp_fp8(residual, normed, mlp_fp8)
        else:
            ops.project_out(residual, ops.gate_up(normed, layer.gate_up), layer.down, layer.norm_2, rows)

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        return functional.embedding(tokens, self.weights.views["token_table"]) * math.sqrt(
            self.weights.config.language.width
        )

    def _chosen(self, residual: Residual, rows: Rows, flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = self.few.normed(residual, self.weights.language_norm, rows)
        logits = self.few.logits(normed[:, 0], self.weights.views["text_head"])
        logits = logits.masked_fill_(self.forbidden[flags.long()], -math.inf)
        tokens = logits.argmax(dim=-1)
        self.slots.token[rows.slots.long()] = tokens
        return logits, tokens


def forbidden_tokens(vocabulary: int, rules: text.Decoding, device: torch.device) -> torch.Tensor:
    """(4, V) bool by text flags, of the rules' special tokens, end token and fast_skip_tokens."""
    found = []
    for flags in range(4):
        asked = text.Decoding(
            min_new_tokens=1 if flags & TOO_SHORT else 0,
            end_token=rules.end_token,
            special_tokens=rules.special_tokens,
            suppress_locations=bool(flags & NO_LOCATIONS),
            fast_skip_tokens=rules.fast_skip_tokens,
        )
        found.append(text.allowed_logits(torch.zeros(1, vocabulary), asked, 0)[0].isinf())
    return torch.stack(found).to(device)


def _norm(views: Mapping[str, torch.Tensor], at: str) -> tuple[torch.Tensor, torch.Tensor]:
    return views[f"{at}.weight"], views[f"{at}.bias"]


def _patches(pictures: torch.Tensor, patch: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """(N, 3, height, width) to (N, P, columns): a row holds a patch as the patch embedding's kernel reads it."""
    num, channels, height, width = pictures.shape
    cut = pictures.view(num, channels, height // patch, patch, width // patch, patch).permute(0, 2, 4, 1, 3, 5)
    cut = cut.to(dtype).reshape(num, (height // patch) * (width // patch), channels * patch * patch)
    return functional.pad(cut, (0, columns - cut.shape[2]))
