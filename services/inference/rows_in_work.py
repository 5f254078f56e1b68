"""A chunk's row and a text's, as the fused path has them in work.

Shapes: T horizon, A action size of the model, R of the robot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from manyhands.common.v1 import common_pb2
from policies import text
from policies.prompt import Pieces
from policies.prompted import Read

from .engine_port import Row
from .fused.starts import ChunkStart
from .fused.units import NO_LOCATIONS, TOO_SHORT

# (T, R) in the robot's units and (T, A) as it is carried.
Chunk = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]
# Takes a text unit's tokens in, when the device has done it; on any thread.
Take = Callable[[], None]


@dataclass(kw_only=True)
class ChunkRow:
    """A chunk's inputs, on the CPU until its prefix runs.

    Attributes:
        pictures: By camera of the policy, None where the robot has none.
        start: Noise, and what is committed in this observation's model space.
        asked, version: What it was made of, and the version whose statistics it was read with.
        owner: Whose pictures they are; "": nobody's.
        slot: While in work.
        gate: Number of the one that its pictures came through, too; 0: of none.
    """

    read: Read
    pictures: Sequence[npt.NDArray[np.uint8] | None]
    start: ChunkStart
    asked: Row
    version: common_pb2.PolicyVersion
    owner: str = ""
    slot: int | None = None
    gate: int = 0


@dataclass(kw_only=True)
class TextRowInWork:
    """A question's inputs and its answer so far.

    Attributes:
        draft: What greedy decoding is likely to give, the end token included; empty for none.
        owner: As of a ChunkRow.
        num_slices: Of its prefix that have run, or need not.
        num_foretold: Tokens that it has when what is launched has been taken in; None behind the check of a draft. The
            engine's thread alone knows.
        drawn: Its newest token where that is not the likeliest and the device does not know it yet.
        is_broken: Its logits were not numbers.
    """

    read: Read
    pictures: Sequence[npt.NDArray[np.uint8] | None]
    rules: text.Decoding
    pieces: Pieces
    generator: torch.Generator
    owner: str = ""
    draft: Sequence[int] = ()
    tokens: list[int] = field(default_factory=list)
    num_slices: int = 0
    num_foretold: int | None = 0
    drawn: int | None = None
    is_broken: bool = False
    slot: int | None = None

    @property
    def is_drawn(self) -> bool:
        """Whether its tokens are drawn, and not the likeliest."""
        return self.rules.temperature > 0

    @property
    def flags(self) -> int:
        """Of its next token."""
        assert self.num_foretold is not None
        short = TOO_SHORT if self.num_foretold < self.rules.min_new_tokens else 0
        return short | (NO_LOCATIONS if self.rules.suppress_locations else 0)

    @property
    def has_ended(self) -> bool:
        return self.is_broken or (bool(self.tokens) and self.tokens[-1] == self.rules.end_token)


def valid_of(row: ChunkRow | TextRowInWork) -> list[bool]:
    return [picture is not None for picture in row.pictures]


def slot_of(row: ChunkRow | TextRowInWork) -> int:
    assert row.slot is not None
    return row.slot
