"""The network of pi052 and pi05, in the steps a server takes one at a time: vision, prefix, expert step, text step.

    pictures --vision--> picture tokens --embed_prefix--> Prefix --run_prefix--> PrefixState --expert_step--> velocity
                                                                                       \\-----text_step--> next logits

Training runs the same steps: the expert reads the keys and values of the prefix, and knowledge insulation is to cut the
gradient at exactly that place.

Sources: pi0.5 (arXiv 2504.16054), knowledge insulation (arXiv 2505.23705).

Shapes: B rows, I cameras, P tokens of a camera, L language tokens, F FAST tokens, S prefix tokens (I*P + L + F), D width of
the language tower, E width of the expert, K repeats, T horizon, A action size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from ..attention import KeysValues, appended
from ..configuration import Precision
from ..flow_matching import embed_time
from ..precise import PreciseLinear
from ..siglip import Siglip
from . import masks
from .config import NetworkConfig
from .gemma import GemmaTower


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """What the language tower reads, embedded.

    Attributes:
        embeddings: (B, S, D), float32 or bfloat16.
        valid: (B, S) bool, False for padding and missing cameras.
        marks: (B, S) bool, where a block of attention begins.
        num_language, num_fast: L and F; the last tokens of the prefix in this order.
    """

    embeddings: torch.Tensor
    valid: torch.Tensor
    marks: torch.Tensor
    num_language: int
    num_fast: int

    @property
    def is_fast(self) -> torch.Tensor:
        """(S,) bool."""
        length = self.valid.shape[1]
        return torch.arange(length, device=self.valid.device) >= length - self.num_fast


@dataclass(frozen=True, kw_only=True)
class PrefixState:
    """The prefix after the language tower.

    Attributes:
        keys_values: Per layer.
        valid: (B, S) bool, what a text token that follows may see.
        visible: (B, S) bool, what an action may see.
        hidden: (B, S, D) after the final norm, or None where it was not asked for.
    """

    keys_values: Sequence[KeysValues]
    valid: torch.Tensor
    visible: torch.Tensor
    hidden: torch.Tensor | None

    def insulated(self) -> PrefixState:
        """The same numbers, through which no gradient reaches the language tower."""
        return replace(self, keys_values=[(k.detach(), v.detach()) for k, v in self.keys_values])


class Pi052Network(nn.Module):
    """Weights are fresh; policies/pi052/checkpoint_keys.py says how files call them."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        language, expert = config.language, config.expert
        checkpointing = config.gradient_checkpointing
        self.config = config
        self.vision = Siglip(config.vision, config.num_patches, gradient_checkpointing=checkpointing)
        self.projector = nn.Linear(config.vision.width, language.width)
        self.token_table = nn.Embedding(config.vocabulary, language.width)
        nn.init.normal_(self.token_table.weight, std=language.width**-0.5)
        self.language = GemmaTower(language, gradient_checkpointing=checkpointing)
        self.text_head = nn.Linear(language.width, config.vocabulary, bias=False)
        self.action_in = PreciseLinear(config.action_size, expert.width)
        self.time_in = PreciseLinear(expert.width, expert.width)
        self.time_out = PreciseLinear(expert.width, expert.width)
        self.expert = GemmaTower(expert, condition_width=expert.width, gradient_checkpointing=checkpointing)
        self.action_out = PreciseLinear(expert.width, config.action_size)
        # Computes nothing. It is in every checkpoint, and lerobot misses it in one without.
        self.unused_expert_head = nn.Linear(expert.width, config.vocabulary, bias=False).requires_grad_(False)
        if config.precision is Precision.BFLOAT16:
            self._to_bfloat16()

    # -- the prefix ----------------------------------------------------------------------------------------------------

    def encode_pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        """(B, I, 3, height, width) in [-1, 1] to (B, I*P, D): a picture does not depend on its neighbours."""
        features = self.projector(self.vision(pictures.flatten(0, 1)))
        tokens: torch.Tensor = features.view(pictures.shape[0], -1, features.shape[-1])
        return tokens

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
        *,
        token_marks: torch.Tensor | None = None,
        fast_tokens: torch.Tensor | None = None,
        fast_valid: torch.Tensor | None = None,
    ) -> Prefix:
        """
        Args:
            picture_tokens: (B, I*P, D).
            picture_valid: (B, I) bool.
            tokens, token_valid: (B, L).
            token_marks: (B, L) bool, target text; None where all text is prompt.
            fast_tokens, fast_valid: (B, F), or None.
        """
        rows = tokens.shape[0]
        patches = picture_tokens.shape[1] // picture_valid.shape[1]
        valid = [picture_valid.repeat_interleave(patches, dim=1), token_valid]
        marks = [
            torch.zeros(rows, picture_tokens.shape[1], dtype=torch.bool, device=tokens.device),
            torch.zeros_like(token_valid) if token_marks is None else token_marks,
        ]
        embedded = self.embed_tokens(tokens)
        embeddings = [picture_tokens.to(embedded.dtype), embedded]
        if fast_tokens is not None:
            assert fast_valid is not None
            valid.append(fast_valid)
            marks.append(torch.ones_like(fast_valid))
            embeddings.append(self.embed_tokens(fast_tokens))
        return Prefix(
            embeddings=torch.cat(embeddings, dim=1),
            valid=torch.cat(valid, dim=1),
            marks=torch.cat(marks, dim=1),
            num_language=tokens.shape[1],
            num_fast=0 if fast_tokens is None else fast_tokens.shape[1],
        )

    def run_prefix(self, prefix: Prefix, *, hidden: bool) -> PrefixState:
        """hidden: Text logits will be asked for; actions alone need none, which saves most of the last layer."""
        allowed = masks.prefix_attention(prefix.valid, prefix.marks)
        states, keys_values = self.language(
            prefix.embeddings,
            masks.prefix_positions(prefix.valid),
            masks.bias(allowed, prefix.embeddings.dtype),
            keys_values_only=not hidden,
        )
        return PrefixState(
            keys_values=keys_values,
            valid=prefix.valid,
            visible=masks.visible_to_actions(prefix.valid, prefix.is_fast),
            hidden=states if hidden else None,
        )

    # -- actions -------------------------------------------------------------------------------------------------------

    def condition(self, time: torch.Tensor) -> torch.Tensor:
        """Flow times, any shape, to what the expert's norms take, (..., E) float32."""
        embedded = embed_time(time, self.config.expert.width, self.config.min_period, self.config.max_period)
        hidden = functional.silu(self.time_in(embedded))
        return functional.silu(self.time_out(hidden))

    def expert_step(self, state: PrefixState, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """Velocity at x.

        Args:
            state: Of the prefix; it is not changed.
            x: (B, K, T, A) float32 noisy actions. Repeats do not see each other.
            time: (B, K), or (B, K, T) for a time per action, float32.

        Returns:
            (B, K, T, A) float32.
        """
        repeats, horizon = x.shape[1:3]
        embedded = self.action_in(x.flatten(1, 2)).to(self._working_dtype())
        hidden, _ = self.expert(
            embedded,
            masks.suffix_positions(state.visible, repeats, horizon),
            masks.bias(masks.suffix_attention(state.visible, repeats, horizon), embedded.dtype),
            past=state.keys_values,
            condition_BGC=self.condition(time.flatten(1)),
        )
        velocity: torch.Tensor = self.action_out(hidden.float())
        return velocity.view_as(x)

    # -- text ----------------------------------------------------------------------------------------------------------

    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., V) float32."""
        logits: torch.Tensor = self.text_head(hidden)
        return logits.float()

    def text_step(self, state: PrefixState, tokens: torch.Tensor) -> tuple[torch.Tensor, PrefixState]:
        """Reads one more token a row.

        Args:
            state: Of everything before.
            tokens: (B,) int64.

        Returns:
            Logits of the token after it, (B, V) float32, and the state with this one added.
        """
        valid = torch.cat([state.valid, torch.ones_like(state.valid[:, :1])], dim=1)
        embedded = self.embed_tokens(tokens[:, None])
        hidden, made = self.language(
            embedded,
            state.valid.sum(dim=1, keepdim=True),
            masks.bias(valid[:, None], embedded.dtype),
            past=state.keys_values,
        )
        keys_values = appended(state.keys_values, made)
        visible = torch.cat([state.visible, torch.ones_like(state.visible[:, :1])], dim=1)
        following = PrefixState(keys_values=keys_values, valid=valid, visible=visible, hidden=hidden)
        return self.text_logits(hidden[:, 0]), following

    # -- precision -----------------------------------------------------------------------------------------------------

    def _working_dtype(self) -> torch.dtype:
        return self.text_head.weight.dtype

    def _to_bfloat16(self) -> None:
        """Tables, heads and the towers' projections; what is small or sensitive stays float32."""
        for module in (self.token_table, self.text_head, self.unused_expert_head):
            module.to(torch.bfloat16)
        for layer in (*self.language.layers, *self.expert.layers):
            for name in ("q", "k", "v", "o", "gate", "up", "down"):
                getattr(layer, name).to(torch.bfloat16)
