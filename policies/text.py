"""Text from the language tower, a token at a time, many rows at once.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

# <loc0000> to <loc1023>: coordinates, which only an answer about a picture may hold.
FIRST_LOCATION, END_LOCATION = 256_000, 257_024
NUM_FAST_CODES = 1024


class TextState(Protocol):
    """What a network knows of the tokens so far: which are valid, (B, S) bool, and their hidden states (B, S, D)."""

    @property
    def valid(self) -> torch.Tensor: ...

    @property
    def hidden(self) -> torch.Tensor | None: ...


StateT = TypeVar("StateT", bound=TextState)


class TextNetwork(Protocol[StateT]):
    def text_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., D) to (..., V) float32."""

    def text_step(self, state: StateT, tokens: torch.Tensor) -> tuple[torch.Tensor, StateT]:
        """Reads one more token a row, (B,): logits of the token after it (B, V), and the state with this one added."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Attributes:
    max_new_tokens: After so many a row ends without its end token.
    min_new_tokens: Before so many, neither the end token nor special tokens may come.
    end_token: Ends a row; it is part of what is returned.
    special_tokens: Never wanted inside a text.
    suppress_locations: No <locNNNN>.
    fast_skip_tokens: Where FAST codes lie; text never holds one.
    temperature: 0 takes the likeliest token.
    top_p: Draws from the likeliest tokens that together have at most this probability; 0 or 1 is all.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    end_token: int = 1
    special_tokens: Sequence[int] = (0, 1, 2, 3)
    suppress_locations: bool = True
    fast_skip_tokens: int = 1152
    temperature: float = 0.0
    top_p: float = 0.0


def allowed_logits(logits: torch.Tensor, rules: Decoding, num_generated: int) -> torch.Tensor:
    """(B, V) with -inf for what may not come after num_generated tokens."""
    logits = logits.clone()
    if num_generated < rules.min_new_tokens:
        logits[:, [*rules.special_tokens, rules.end_token]] = -math.inf
    if logits.shape[1] > FIRST_LOCATION:  # PaliGemma's vocabulary, with locations and room for codes below them.
        first_code = logits.shape[1] - rules.fast_skip_tokens - NUM_FAST_CODES
        logits[:, first_code:FIRST_LOCATION] = -math.inf
        if rules.suppress_locations:
            logits[:, FIRST_LOCATION:END_LOCATION] = -math.inf
    return logits


def choose(
    logits: torch.Tensor, *, temperature: float, top_p: float, generators: Sequence[torch.Generator] | None = None
) -> torch.Tensor:
    """(B,) int64 tokens of (B, V) logits. generators: a CPU generator a row, needed when temperature > 0."""
    if temperature <= 0:
        return logits.argmax(dim=-1)
    assert generators is not None
    shares = probabilities(logits, temperature=temperature, top_p=top_p)
    drawn = [draw(row, generator) for row, generator in zip(shares, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


def probabilities(logits: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """(..., V) float32 of logits (..., V), for temperature > 0."""
    found = torch.softmax(logits / temperature, dim=-1)
    if 0 < top_p < 1:
        ordered, order = found.sort(dim=-1, descending=True)
        # The token that crosses top_p is out, as in lerobot; the likeliest always stays.
        beyond = ordered.cumsum(dim=-1) > top_p
        beyond[..., 0] = False
        found = torch.zeros_like(found).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return found


def draw(shares: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(1,) int64, of probabilities (V,) on any device, by a generator on the CPU."""
    return torch.multinomial(shares.cpu(), 1, generator=generator)


def generate(
    network: TextNetwork[StateT],
    state: StateT,
    rules: Decoding,
    generators: Sequence[torch.Generator] | None = None,
) -> Iterator[torch.Tensor]:
    """Tokens step by step, each (B,) int64; -1 for a row that has ended. Stops when all have.

    Args:
        state: Of the prompts, with hidden states; prompts may be padded on the right.
        generators: See choose().
    """
    assert state.hidden is not None
    rows = torch.arange(state.valid.shape[0], device=state.valid.device)
    # Padding stands behind the prompt: its last valid token is what the text follows.
    last = state.valid.shape[1] - 1 - state.valid.flip(1).long().argmax(dim=1)
    logits = network.text_logits(state.hidden[rows, last])
    ended = torch.zeros_like(rows, dtype=torch.bool)
    for num_generated in range(rules.max_new_tokens):
        allowed = allowed_logits(logits, rules, num_generated)
        tokens = choose(allowed, temperature=rules.temperature, top_p=rules.top_p, generators=generators)
        yield tokens.masked_fill(ended, -1)
        ended = ended | (tokens == rules.end_token)
        if ended.all() or num_generated + 1 == rules.max_new_tokens:
            return
        logits, state = network.text_step(state, tokens)


def generate_ids(
    network: TextNetwork[StateT],
    state: StateT,
    rules: Decoding,
    generators: Sequence[torch.Generator] | None = None,
) -> list[list[int]]:
    """generate() to its end: the ids of each row, the end token included."""
    steps = list(generate(network, state, rules, generators))
    return [[token for token in row if token >= 0] for row in torch.stack(steps, dim=1).tolist()]
