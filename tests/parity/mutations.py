"""Mistakes made on purpose, and what must come of them: the tests of the tests of both families.

test_mutations.py has those of pi05 and pi052, test_smolvla_mutations.py those of SmolVLA; here is what they share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from policies import losses, rtc, text

from .golden import Golden
from .pi import Errors

Patch = pytest.MonkeyPatch
Measured = tuple[Errors, float]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """make changes the implementation; found measures on the family's two fixtures, with the limit the real tests use."""

    name: str
    make: Callable[[Patch], None]
    found: Callable[[Golden, Golden], Measured]

    def must_be_seen(self, plain: Golden, with_text: Golden, patch: Patch) -> None:
        self.make(patch)
        errors, limit = self.found(plain, with_text)
        assert max(errors.values()) > 2 * limit, errors


def first_wrong(ids_differ: Callable[[dict[str, Any]], bool], cases: list[dict[str, Any]]) -> Measured:
    """Generated ids: 1 at the first case that differs, which is enough."""
    return {"ids": float(any(ids_differ(case) for case in cases))}, 0.0


def exact_gelu(patch: Patch) -> None:
    real = functional.gelu
    patch.setattr(functional, "gelu", lambda x, approximate="none": real(x))


def flow_of_all_samples(patch: Patch) -> None:
    real = losses.flow_term
    patch.setattr(losses, "flow_term", lambda errors, predicts, **rest: real(errors, torch.ones_like(predicts), **rest))


def padded_numbers_count(patch: Patch) -> None:
    real = losses.flow_term

    def flow_term(errors: torch.Tensor, predicts: torch.Tensor, **arguments: Any) -> losses.Term:
        return real(errors, predicts, **(arguments | {"action_size": errors.shape[-1]}))

    patch.setattr(losses, "flow_term", flow_term)


def labels_not_shifted(patch: Patch) -> None:
    def text_targets(labels: torch.Tensor) -> losses.Targets:
        row, position = (labels != losses.IGNORED_LABEL).nonzero(as_tuple=True)
        return losses.Targets(row=row, position=position, token=labels[row, position], num_rows=labels.shape[0])

    patch.setattr(losses, "text_targets", text_targets)


def z_weight(patch: Patch, weight: float) -> None:
    """Of the text loss, whatever the configuration says."""
    real = losses.text_term
    patch.setattr(losses, "text_term", lambda logits, targets, z_weight: real(logits, targets, z_weight=weight))


def delay_ignored(patch: Patch) -> None:
    real = rtc.prefix_weights

    def prefix_weights(schedule: rtc.PrefixSchedule, **arguments: Any) -> torch.Tensor:
        none = torch.zeros_like(arguments["delay_steps"])
        return real(schedule, **(arguments | {"delay_steps": none}))

    patch.setattr(rtc, "prefix_weights", prefix_weights)


def end_token_early(patch: Patch) -> None:
    real = text.allowed_logits
    patch.setattr(text, "allowed_logits", lambda logits, rules, count: real(logits, replace(rules, min_new_tokens=0), count))
