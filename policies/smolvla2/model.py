"""The network of SmolVLA2 and SmolVLA, in the steps a server takes one at a time: vision, prefix, expert step, text step.

    pictures --vision, connector--> picture tokens --embed_prefix--> Prefix --run_prefix--> PrefixState
    PrefixState --seen--> Seen --expert_step--> velocity
    PrefixState --text_step--> next logits

Source: SmolVLA (arXiv 2506.01844).

Shapes: B rows, I cameras, P tokens of a camera (with special ones), L language tokens, S prefix tokens (I*P + L + 1 for the
state, padded), D width of the language tower, E width of the expert, T horizon, A action size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from .. import attention
from ..attention import KeysValues
from ..configuration import Precision
from ..flow_matching import embed_time
from ..precise import PreciseLinear
from ..siglip import Siglip
from . import masks
from .config import NetworkConfig
from .connector import Connector
from .llama import ExpertTower, LlamaTower

# SmolVLM2's <fake_token_around_image> and <global-img>.
IMAGE_BEGIN, IMAGE_END = (49189, 49152), (49189,)


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What the language tower reads, embedded.

    Attributes:
        embeddings: (B, S, D), float32 or bfloat16.
        valid: (B, S) bool, False for padding and missing cameras.
        marks: (B, S) bool, where a block of attention begins.
        language: Where in S the L language tokens are.
    """

    embeddings: torch.Tensor
    valid: torch.Tensor
    marks: torch.Tensor
    language: slice


@dataclass(frozen=True, kw_only=True)
class PrefixState:
    """The prefix after the language tower.

    Attributes:
        keys_values: Per layer.
        valid: (B, S) bool.
        hidden: (B, S, D) after the final norm, or None where it was not asked for.
    """

    keys_values: Sequence[KeysValues]
    valid: torch.Tensor
    hidden: torch.Tensor | None


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What actions see of the prefix. It does not change from step to step.

    Attributes:
        keys_values: Per layer.
        valid: (B, S) bool.
        is_projected: Layers that project what they see need not do it again.
    """

    keys_values: Sequence[KeysValues]
    valid: torch.Tensor
    is_projected: bool


class SmolVLA2Network(nn.Module):
    """Weights are fresh; policies/smolvla2/checkpoint_keys.py says how files call them."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        language, expert = config.language, config.expert
        checkpointing = config.gradient_checkpointing
        rows, columns = config.patches
        self.config = config
        self.vision = Siglip(config.vision, rows * columns, gradient_checkpointing=checkpointing)
        self.connector = Connector(config.vision.width, language.width, config.patches, config.shuffle)
        self.token_table = nn.Embedding(config.vocabulary, language.width)
        nn.init.normal_(self.token_table.weight, std=language.width**-0.5)
        self.state_in = PreciseLinear(config.state_size, language.width)
        self.language = LlamaTower(language, config.rms_eps, gradient_checkpointing=checkpointing)
        self.text_head = nn.Linear(language.width, config.vocabulary, bias=False)
        self.action_in = PreciseLinear(config.action_size, expert.width)
        self.action_time_in = PreciseLinear(2 * expert.width, expert.width)
        self.action_time_out = PreciseLinear(expert.width, expert.width)
        is_self = [config.is_self_layer(index) for index in range(expert.depth)]
        self.expert = ExpertTower(expert, config.rms_eps, is_self, gradient_checkpointing=checkpointing)
        self.action_out = PreciseLinear(expert.width, config.action_size)
        if config.precision is Precision.BFLOAT16:
            self._to_bfloat16()

    # -- the prefix ----------------------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, I, 3, height, width) in [-1, 1] to (B, I, P, D): a picture does not depend on its neighbours."""
        tokens: torch.Tensor = self.connector(self.vision(pictures.flatten(0, 1)))
        tokens = tokens.view(*pictures.shape[:2], *tokens.shape[1:]) * math.sqrt(self.config.language.width)
        if not self.config.image_special_tokens:
            return tokens
        begin, end = (self._special(ids).expand(*tokens.shape[:2], -1, -1) for ids in (IMAGE_BEGIN, IMAGE_END))
        return torch.cat([begin, tokens.to(begin.dtype), end], dim=2)

    def embed_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L) ids to (B, L, D)."""
        embedded: torch.Tensor = self.token_table(tokens)
        return embedded * math.sqrt(self.config.language.width)

    def embed_prefix(
        self,
        picture_tokens: torch.Tensor,
        picture_valid: torch.Tensor,
        tokens: torch.Tensor,
        token_valid: torch.Tensor,
        state: torch.Tensor | None,
        *,
        token_marks: torch.Tensor | None = None,
    ) -> Prefix:
        """
        Args:
            picture_tokens: (B, I, P, D).
            picture_valid: (B, I) bool.
            tokens, token_valid: (B, L).
            state: (B, at most state_size) float32, normalised; None: the prefix ends with the language, as for text.
            token_marks: (B, L) bool, target text; None where all text is prompt.
        """
        embedded = self.embed_tokens(tokens)
        pictures = picture_tokens.flatten(1, 2).to(embedded.dtype)
        embeddings, valid = [pictures, embedded], [self._picture_token_valid(picture_valid, picture_tokens), token_valid]
        marks = [torch.zeros_like(valid[0]), torch.zeros_like(token_valid) if token_marks is None else token_marks]
        if state is not None:
            padded = functional.pad(state, (0, self.config.state_size - state.shape[1]))
            embeddings.append(self.state_in(padded)[:, None].to(embedded.dtype))
            valid.append(torch.ones_like(valid[0][:, :1]))
            marks.append(torch.ones_like(valid[0][:, :1]))
        missing = max(0, self.config.prefix_length - sum(part.shape[1] for part in valid))
        begin = pictures.shape[1]
        return Prefix(
            embeddings=functional.pad(torch.cat(embeddings, dim=1), (0, 0, 0, missing)),
            valid=functional.pad(torch.cat(valid, dim=1), (0, missing)),
            marks=functional.pad(torch.cat(marks, dim=1), (0, missing)),
            language=slice(begin, begin + tokens.shape[1]),
        )

    def run_prefix(self, prefix: Prefix, *, hidden: bool) -> PrefixState:
        """hidden: Text logits will be asked for; actions alone need none, which saves most of the last layer."""
        allowed = attention.prefix_attention(prefix.valid, prefix.marks)
        states, keys_values = self.language(
            prefix.embeddings,
            attention.prefix_positions(prefix.valid),
            attention.bias(allowed, prefix.embeddings.dtype),
            keys_values_only=not hidden,
        )
        return PrefixState(keys_values=keys_values, valid=prefix.valid, hidden=states if hidden else None)

    def _special(self, ids: tuple[int, ...]) -> torch.Tensor:
        """(ids, D), not scaled."""
        embedded: torch.Tensor = self.token_table(torch.tensor(ids, device=self.token_table.weight.device))
        return embedded

    def _picture_token_valid(self, picture_valid: torch.Tensor, picture_tokens: torch.Tensor) -> torch.Tensor:
        """(B, I*P): special tokens are there for a masked camera too, as in lerobot."""
        valid = picture_valid[:, :, None].expand(picture_tokens.shape[:3])
        if self.config.image_special_tokens:
            inner = valid[:, :, len(IMAGE_BEGIN) : -len(IMAGE_END)]
            valid = functional.pad(inner, (len(IMAGE_BEGIN), len(IMAGE_END)), value=True)
        return valid.flatten(1)

    # -- actions -------------------------------------------------------------------------------------------------------

    def seen(self, state: PrefixState, *, project: bool = True) -> Seen:
        """project: For several steps. A single one, as in training, does it layer by layer, where hooks of FSDP see it."""
        keys_values = self.expert.project(state.keys_values) if project else state.keys_values
        return Seen(keys_values=keys_values, valid=state.valid, is_projected=project)

    def embed_actions(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """(B, T, A) float32 noisy actions at times (B,) to (B, T, E)."""
        config = self.config
        embedded = embed_time(time, config.expert.width, config.min_period, config.max_period)
        joined = torch.cat([self.action_in(x), embedded[:, None].expand(-1, x.shape[1], -1)], dim=2)
        suffix: torch.Tensor = self.action_time_out(functional.silu(self.action_time_in(joined)))
        return suffix

    def expert_step(self, seen: Seen, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Velocity (B, T, A) float32 at x (B, T, A) and time (B,), both float32."""
        horizon = x.shape[1]
        embedded = self.embed_actions(x, time).to(self._working_dtype())
        hidden = self.expert(
            embedded,
            masks.suffix_positions(seen.valid, horizon),
            attention.bias(masks.suffix_attention(seen.valid, horizon), embedded.dtype),
            masks.cross_positions(seen.valid, horizon),
            attention.bias(masks.prefix_to_actions(seen.valid, horizon), embedded.dtype),
            seen.keys_values,
            seen.is_projected,
        )
        velocity: torch.Tensor = self.action_out(hidden.float())
        return velocity

    # -- text ----------------------------------------------------------------------------------------------------------

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., V) float32."""
        logits: torch.Tensor = self.text_head(hidden)
        return logits.float()

    def text_step(self, state: PrefixState, tokens: torch.Tensor) -> tuple[torch.Tensor, PrefixState]:
        """Reads one more token a row.

        Args:
            state: Of everything before, without the robot's state.
            tokens: (B,) int64.

        Returns:
            Logits of the token after it, (B, V) float32, and the state with this one added.
        """
        valid = torch.cat([state.valid, torch.ones_like(state.valid[:, :1])], dim=1)
        embedded = self.embed_tokens(tokens[:, None])
        hidden, made = self.language(
            embedded,
            state.valid.sum(dim=1, keepdim=True),
            attention.bias(valid[:, None], embedded.dtype),
            past=state.keys_values,
        )
        keys_values = attention.appended(state.keys_values, made)
        return self.text_logits(hidden[:, 0]), PrefixState(keys_values=keys_values, valid=valid, hidden=hidden)

    # -- precision -----------------------------------------------------------------------------------------------------

    def _working_dtype(self) -> torch.dtype:
        return self.text_head.weight.dtype

    def _to_bfloat16(self) -> None:
        """Table, head and the towers' projections; what is small or sensitive stays float32."""
        for module in (self.token_table, self.text_head):
            module.to(torch.bfloat16)
        for layer in (*self.language.layers, *self.expert.layers):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                getattr(layer, name).to(torch.bfloat16)
