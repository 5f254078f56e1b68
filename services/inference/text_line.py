"""Which text goes on when text may run. Pure.

Of the units that could run, the one whose text has waited longest since its last one: so new questions and tokens of running
ones take turns, and neither starves. Texts in decoding step together, all that may. A question waits while max_texts are
in progress, max_prefixes amid their prefix, or the chunk that it was asked beside is in line; among those that wait, robots
with fewer texts in progress come first, then earlier deadlines.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Generic, TypeVar

from .hold_ups import may_run_alone, may_step_together
from .units import ChunkT, TextT, TextWork, Unit, UnitKind
from .units import Text as TextInProgress

AnyT = TypeVar("AnyT")


class TextLine(Generic[ChunkT, TextT]):
    """Texts of all robots.

    Args:
        max_texts: In progress at once, which is what their caches have room for.
        max_prefixes: Questions amid their prefix at once, which is what there are buffers for.
    """

    def __init__(self, *, max_texts: int, max_prefixes: int = 1) -> None:
        for name, value in (("max_texts", max_texts), ("max_prefixes", max_prefixes)):
            if value < 1:
                raise ValueError(f"{name} ({value}) must be at least 1")
        self._max_texts = max_texts
        self._max_prefixes = max_prefixes
        self._waiting: dict[Hashable, TextWork[TextT]] = {}
        self._texts: dict[Hashable, TextInProgress[TextT]] = {}
        self._earliest_deadline_s = math.inf

    def __len__(self) -> int:
        return len(self._waiting) + len(self._texts)

    @property
    def num_in_progress(self) -> int:
        return len(self._texts)

    def add(self, work: TextWork[TextT]) -> None:
        self._waiting[work.text_id] = work
        self._earliest_deadline_s = min(self._earliest_deadline_s, work.deadline_s)

    def withdraw(self, text_id: Hashable) -> tuple[TextWork[TextT], ...]:
        """Forgets a text; answers it if it was there."""
        works = [*self._waiting.values(), *(text.work for text in self._texts.values())]
        gone = [work for work in works if work.text_id == text_id]
        self._forget(gone)
        return tuple(gone)

    def restart_prefixes(self) -> tuple[TextWork[TextT], ...]:
        """Texts amid their prefix are at its beginning again; answers them."""
        begun = [text for text in self._texts.values() if text.kind is UnitKind.TEXT_PREFIX]
        for text in begun:
            text.num_slices = 0
        return tuple(text.work for text in begun)

    def drop_late(self, now_s: float) -> tuple[TextWork[TextT], ...]:
        """Texts whose deadline has passed, also those in progress: nobody listens to them any more."""
        if now_s <= self._earliest_deadline_s:
            return ()
        works = [*self._waiting.values(), *(text.work for text in self._texts.values())]
        late = [work for work in works if now_s > work.deadline_s]
        self._earliest_deadline_s = min((work.deadline_s for work in works if now_s <= work.deadline_s), default=math.inf)
        self._forget(late)
        return tuple(late)

    def begin(self, unit: Unit[ChunkT, TextT], now_s: float) -> None:
        """The unit runs, or is the next that does."""
        for text in unit.texts:
            text.num_running += 1
            text.touched_s = now_s
            if self._waiting.pop(text.work.text_id, None) is not None:
                self._texts[text.work.text_id] = text

    def finished(
        self,
        unit: Unit[ChunkT, TextT],
        *,
        num_new_tokens: Mapping[Hashable, int],
        num_slices: Mapping[Hashable, int],
        ended: frozenset[Hashable],
    ) -> tuple[TextWork[TextT], ...]:
        """Takes a unit's tokens in; answers the texts that are complete."""
        complete: list[TextWork[TextT]] = []
        for text in unit.texts:
            text_id = text.work.text_id
            text.num_running -= 1
            num_new = 0
            if unit.kind is UnitKind.TEXT_PREFIX:
                text.num_slices = num_slices.get(text_id, text.num_slices + 1)
                # The end of a prefix is the first token's logits; with a draft, the check gives it.
                num_new = int(text.kind is UnitKind.TEXT)
            elif unit.kind is UnitKind.DRAFT_CHECK:
                text.is_checked = True
            else:
                num_new = 1
            text.num_tokens += num_new_tokens.get(text_id, num_new)
            if text_id in self._texts and (text_id in ended or text.num_tokens >= text.work.max_tokens):
                complete.append(text.work)
        self._forget(complete)
        return tuple(complete)

    def next_unit(
        self, used: Mapping[Hashable, float], *, may_begin: Callable[[TextWork[TextT]], bool] = lambda work: True
    ) -> tuple[Unit[ChunkT, TextT], float] | None:
        """What would run, and since when it has waited. Not begun until begin().

        Args:
            used: By text_id, as HoldUps has it.
            may_begin: Of questions that wait, which may.
        """
        candidates: list[tuple[float, int, tuple[TextInProgress[TextT], ...]]] = []
        for together in self._decoding(used):
            candidates.append((min(text.touched_s for text in together), 1, together))
        able = [text for text in self._texts.values() if text.may_go_on and may_run_alone(text.work.text_id, used)]
        drafted = [text for text in able if text.kind is UnitKind.DRAFT_CHECK]
        if drafted:
            first = min(drafted, key=_touched)
            candidates.append((first.touched_s, 0, (first,)))
        beginning = self._beginning(able, may_begin)
        if beginning is not None:
            candidates.append((beginning.touched_s, 2, (beginning,)))
        if not candidates:
            return None
        waited_since_s, _, texts = min(candidates, key=lambda candidate: candidate[:2])
        unit: Unit[ChunkT, TextT] = Unit(
            kind=texts[0].kind,
            model=texts[0].work.model,
            bucket=max(text.work.bucket for text in texts),
            texts=texts,
        )
        return unit, waited_since_s

    def _decoding(self, used: Mapping[Hashable, float]) -> list[tuple[TextInProgress[TextT], ...]]:
        """By model, the texts that could take a step together now.

        One that is on its way goes on with the others, or nobody does: each on its own, one behind the other, they would
        take a step each where one serves all, and never meet again.
        """
        by_model: dict[str, list[TextInProgress[TextT]]] = {}
        for text in self._texts.values():
            if text.kind is UnitKind.TEXT and text.may_go_on:
                by_model.setdefault(text.work.model, []).append(text)
        found = []
        for texts in by_model.values():
            able = may_step_together([text.work.text_id for text in texts], used)
            if able and all(text.work.text_id in able for text in texts if text.num_running):
                found.append(tuple(text for text in texts if text.work.text_id in able))
        return found

    def _beginning(
        self, able: Sequence[TextInProgress[TextT]], may_begin: Callable[[TextWork[TextT]], bool]
    ) -> TextInProgress[TextT] | None:
        """Whose prefix goes on: one begun whose last slice is not on its way, the first question first; else that of the
        next in line, while there is room."""
        begun = next((text for text in able if text.kind is UnitKind.TEXT_PREFIX), None)
        if begun is not None:
            return begun
        num_begun = sum(text.kind is UnitKind.TEXT_PREFIX for text in self._texts.values())
        if not self._waiting or len(self._texts) >= self._max_texts or num_begun >= self._max_prefixes:
            return None
        waiting = [work for work in self._waiting.values() if may_begin(work)]
        if not waiting:
            return None
        num_texts = Counter(text.work.robot for text in self._texts.values())
        work = min(waiting, key=lambda work: (num_texts[work.robot], work.deadline_s, work.arrived_s))
        return TextInProgress(work=work, is_checked=work.num_draft_tokens == 0, touched_s=work.arrived_s)

    def _forget(self, works: list[TextWork[TextT]]) -> None:
        for work in works:
            self._waiting.pop(work.text_id, None)
            self._texts.pop(work.text_id, None)


def _touched(text: TextInProgress[AnyT]) -> float:
    return text.touched_s
