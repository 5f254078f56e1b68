"""Units of texts on the fused path: a question's prefix, its draft, tokens of answers, and what the host takes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from policies import text

from . import launches
from .fused.network import FusedPi052
from .fused.settings import TextRow
from .rows_in_work import Take, TextRowInWork, slot_of


class FusedTexts:
    """Of one model; on the engine's thread. What a unit answers may be called on any, when the device is done with it.

    Args:
        fused: Prepared work, which the model's chunks share.
    """

    def __init__(self, fused: FusedPi052) -> None:
        self._fused = fused

    def run_prefix(self, row: TextRowInWork) -> Take:
        """The next slice of the prefix of a question that was begun; the last gives the first token of its answer."""
        self._fused.prefix_slice(slot_of(row), row.num_slices)
        row.num_slices += 1
        if row.num_slices < self._fused.num_prefix_slices:
            return nothing
        return self._chosen(self._fused.first_text, [row])

    def run_draft(self, row: TextRowInWork) -> Take:
        """As many tokens of the draft as greedy decoding agrees with, and the one after; none if the first one differs."""
        if not row.draft or row.has_ended or row.tokens[0] != row.draft[0] or len(row.draft) < 2:
            return nothing
        found = self._fused.check_draft([TextRow(slot=slot_of(row), flags=row.flags)], [row.draft[1:]])
        row.num_foretold = None
        tokens, counts = (launches.to_host(tensor) for tensor in found)

        def take() -> None:
            for token in tokens[0, : int(counts[0])].tolist():
                row.tokens.append(token)
                if row.has_ended or len(row.tokens) == row.rules.max_new_tokens:
                    return

        return take

    def run_step(self, rows: Sequence[TextRowInWork]) -> Take:
        """The next token of each; the one before may still be on its way to the host, unless it is drawn."""
        self._send_drawn(rows)
        for row in rows:
            if row.num_foretold is None:
                row.num_foretold = len(row.tokens)
        return self._chosen(self._fused.text_step, rows)

    def _chosen(
        self, unit: Callable[[Sequence[TextRow]], tuple[torch.Tensor, torch.Tensor]], rows: Sequence[TextRowInWork]
    ) -> Take:
        answer = unit([TextRow(slot=slot_of(row), flags=row.flags) for row in rows])
        for row in rows:
            assert row.num_foretold is not None
            row.num_foretold += 1
        return self._taking(rows, *answer)

    def _taking(self, rows: Sequence[TextRowInWork], logits: torch.Tensor, likeliest: torch.Tensor) -> Take:
        """Logits hold until the next unit only, so what is needed of them goes to the host now.

        Of those that are drawn from that is the probabilities, which the device makes.
        """
        broken, likeliest = launches.to_host(logits.isnan().any(dim=-1)), launches.to_host(likeliest)
        drawing = {
            index: launches.to_host(_probabilities(row, logits[index])) for index, row in enumerate(rows) if row.is_drawn
        }

        def take() -> None:
            found = zip(rows, likeliest.tolist(), broken.tolist(), strict=True)
            for index, (row, token, is_broken) in enumerate(found):
                if row.has_ended:
                    continue  # It took a step before this was known.
                row.is_broken = is_broken
                if is_broken:
                    continue
                if index in drawing:
                    row.drawn = token = int(text.draw(drawing[index], row.generator))
                row.tokens.append(token)

        return take

    def _send_drawn(self, rows: Sequence[TextRowInWork]) -> None:
        """Tokens that were drawn, and are not the likeliest, into the slots."""
        for row in rows:
            if row.drawn is not None:
                self._fused.set_token(slot_of(row), row.drawn)
                row.drawn = None


def nothing() -> None:
    """There is nothing to take."""


def _probabilities(row: TextRowInWork, logits: torch.Tensor) -> torch.Tensor:
    return text.probabilities(logits, temperature=row.rules.temperature, top_p=row.rules.top_p)
