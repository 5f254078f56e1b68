"""The pieces that an engine's work is cut into, so that a scheduler can decide between them. Data only.

A chunk is one prefix unit (vision and language, 1, 2 or 4 requests of one bucket at once) and num_steps expert units (an
Euler step of all chunks in progress, each at its own step). A text is up to num_prefix_slices slices of its own prefix, one
check of its draft where it has one, and a step a token, of all texts in progress at once.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

ChunkT = TypeVar("ChunkT")
TextT = TypeVar("TextT")

PREFIX_SIZES = (4, 2, 1)
# Rows that an Euler step is prepared for. On an H200 five rows take 0.04 ms longer than four, and six 0.11 less than eight.
EXPERT_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)


class UnitKind(enum.Enum):
    PREFIX = "prefix"
    EXPERT = "expert"
    TEXT_PREFIX = "text_prefix"
    DRAFT_CHECK = "draft_check"
    TEXT = "text"


ACTION_KINDS = frozenset({UnitKind.PREFIX, UnitKind.EXPERT})


@dataclass(frozen=True, kw_only=True)
class ChunkWork(Generic[ChunkT]):
    """An observation that waits for its chunk.

    Attributes:
        owner: The session; at most one observation of an owner waits, and one is in progress.
        bucket: Tokens that its prefix is padded to. Prefixes share a unit only within a bucket; expert rows of one model
            share a unit whatever their buckets, which then runs at the largest.
        num_steps: Euler steps.
        arrived_s, deadline_s: On the scheduler's clock.
    """

    owner: str
    request_id: int
    model: str
    bucket: int
    num_steps: int
    arrived_s: float
    deadline_s: float
    payload: ChunkT


@dataclass(frozen=True, kw_only=True)
class TextWork(Generic[TextT]):
    """A question that waits for its text.

    Attributes:
        text_id: Unique in the server.
        bucket: Tokens that its prefix is padded to.
        num_prefix_slices: Units that its prefix comes in at most, each about as long as a text step; 0 where a chunk's
            prefix is shared. No chunk waits for more than one of them.
        num_draft_tokens: Of a text that is likely to come again, to be checked in one pass; 0 for none.
        max_tokens: Where decoding ends at the latest.
        is_drawn: Its tokens are drawn on the host: none can be asked for before the last one is there.
        asked_by: Owner of chunks. The question is likely to be about the pictures of the one that it has in line, which its
            prefix then need not see: that one goes first.
    """

    owner: str
    text_id: Hashable
    model: str
    bucket: int
    num_prefix_slices: int
    num_draft_tokens: int
    max_tokens: int
    arrived_s: float
    deadline_s: float
    payload: TextT
    is_drawn: bool = False
    asked_by: str = ""

    @property
    def robot(self) -> str:
        """Among whose questions it counts: an owner may be one question's alone."""
        return self.asked_by or self.owner


@dataclass(kw_only=True, eq=False)
class Row(Generic[ChunkT]):
    """A chunk in progress; only the scheduler changes it.

    Attributes:
        step: Of its next expert unit, 0 to num_steps - 1.
        has_prefix: Its prefix unit has run.
    """

    work: ChunkWork[ChunkT]
    step: int = 0
    has_prefix: bool = False

    @property
    def num_steps_left(self) -> int:
        return self.work.num_steps - self.step


@dataclass(kw_only=True, eq=False)
class Text(Generic[TextT]):
    """A text in progress; only the scheduler changes it.

    Attributes:
        num_slices: Of its prefix, done.
        is_checked: Its draft was checked, or it has none.
        num_tokens: Known so far.
        num_running: Units of it that have begun and are not finished.
        touched_s: When a unit of it last began, or it arrived.
    """

    work: TextWork[TextT]
    num_slices: int = 0
    is_checked: bool = False
    num_tokens: int = 0
    num_running: int = 0
    touched_s: float

    @property
    def may_go_on(self) -> bool:
        """Whether its next unit depends on nothing that is still on its way to the host, tokens that are drawn apart.

        The likeliest token is on the device when a step gives it, so the next step may follow at once. It may turn out that
        the text had ended: that step was for nothing.
        """
        if not self.num_running:
            return True
        return self.kind is UnitKind.TEXT and self.num_tokens + self.num_running < self.work.max_tokens

    @property
    def kind(self) -> UnitKind:
        """What it needs next."""
        if self.num_slices < self.work.num_prefix_slices:
            return UnitKind.TEXT_PREFIX
        return UnitKind.TEXT if self.is_checked else UnitKind.DRAFT_CHECK


@dataclass(frozen=True, kw_only=True)
class Unit(Generic[ChunkT, TextT]):
    """What runs next: rows for PREFIX and EXPERT, texts for the others.

    Attributes:
        bucket: The largest of its rows' or texts'.
    """

    kind: UnitKind
    model: str
    bucket: int
    rows: tuple[Row[ChunkT], ...] = ()
    texts: tuple[Text[TextT], ...] = ()

    @property
    def size(self) -> int:
        return len(self.rows) or len(self.texts)

    @property
    def group(self) -> Hashable:
        """What its duration is learned by, beside its size."""
        return group(self.kind, self.model, self.bucket)


@dataclass(frozen=True, kw_only=True)
class Decision(Generic[ChunkT, TextT]):
    """What to run now (perhaps nothing), and what can no longer be answered in time."""

    unit: Unit[ChunkT, TextT] | None
    late_chunks: tuple[ChunkWork[ChunkT], ...] = ()
    late_texts: tuple[TextWork[TextT], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Finished(Generic[ChunkT, TextT]):
    """What a unit completed."""

    chunks: tuple[ChunkWork[ChunkT], ...] = ()
    texts: tuple[TextWork[TextT], ...] = ()


def expert_sizes(most: int) -> tuple[int, ...]:
    """EXPERT_SIZES and those that double, up to most, which is one too."""
    return tuple(sorted({*(size for size in EXPERT_SIZES if size < most), *doubling_sizes(most)}))


def doubling_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to most, which is one too."""
    sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    return (*sizes, most)


def group(kind: UnitKind, model: str, bucket: int) -> Hashable:
    return (kind, model, bucket)
