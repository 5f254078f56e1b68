"""The loss terms of the large policies, each as one number and per sample.

Shapes: B rows, K repeats, T horizon, A action size, L tokens, D width, V vocabulary, N chosen positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Term:
    """mean: what is minimised, a scalar. per_sample: (B,), 0 where a sample has no part in it."""

    mean: torch.Tensor
    per_sample: torch.Tensor


def flow_term(
    errors: torch.Tensor, predicts: torch.Tensor, *, action_size: int, counted: torch.Tensor | None = None
) -> Term:
    """Mean squared error of the velocity over the samples that predict actions.

    Steps beyond an episode's end count like all others, as in lerobot's pi05.

    Args:
        errors: (B, K, T, A), squared.
        predicts: (B,) bool.
        action_size: The robot's own; padded numbers do not count.
        counted: (B, K, T) bool, False for actions that were kept clean; None: all count.
    """
    real = errors[..., :action_size]
    weight = predicts.to(real.dtype)
    if counted is None:
        per_sample = real.mean(dim=(1, 2, 3)) * weight
        return Term(mean=per_sample.sum() / weight.sum().clamp(min=1.0), per_sample=per_sample)
    kept = counted.to(real.dtype)
    sums = (real.mean(dim=3) * kept).sum(dim=(1, 2)) * weight
    counts = kept.sum(dim=(1, 2)) * weight
    return Term(mean=sums.sum() / counts.sum().clamp(min=1.0), per_sample=sums / counts.clamp(min=1.0))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Next-token targets at chosen positions only: logits of the whole vocabulary are made for no others.

    Attributes:
        row: (N,) int64, the sample of each.
        position: (N,) int64, whose hidden state predicts it.
        token: (N,) int64.
        num_rows: B.
    """

    row: torch.Tensor
    position: torch.Tensor
    token: torch.Tensor
    num_rows: int


def text_targets(labels: torch.Tensor) -> Targets:
    """(B, L) int64 labels, IGNORED_LABEL where there is none: position t predicts label t + 1."""
    following = labels[:, 1:]
    row, position = (following != IGNORED_LABEL).nonzero(as_tuple=True)
    return Targets(row=row, position=position, token=following[row, position], num_rows=labels.shape[0])


def fast_targets(tokens: torch.Tensor, is_code: torch.Tensor, predicts: torch.Tensor) -> Targets:
    """(B, F) FAST tokens: position t predicts token t + 1 where that is a code and the sample predicts actions."""
    row, position = (is_code[:, 1:] & predicts[:, None]).nonzero(as_tuple=True)
    return Targets(row=row, position=position, token=tokens[:, 1:][row, position], num_rows=tokens.shape[0])


def text_term(logits: torch.Tensor, targets: Targets, *, z_weight: float) -> Term:
    """Cross-entropy plus z_weight * logsumexp^2, over all targets of the batch alike. logits: (N, V) float32."""
    log_z = logits.logsumexp(dim=-1)
    values = functional.cross_entropy(logits, targets.token, reduction="none") + z_weight * log_z.square()
    per_sample, _ = _per_sample_mean(values, targets)
    return Term(mean=values.sum() / max(values.shape[0], 1), per_sample=per_sample)


def fast_term(logits: torch.Tensor, targets: Targets) -> Term:
    """Cross-entropy, mean within each sample and then over the samples that have codes. logits: (N, V) float32."""
    values = functional.cross_entropy(logits, targets.token, reduction="none")
    per_sample, has_any = _per_sample_mean(values, targets)
    return Term(mean=per_sample.sum() / has_any.sum().clamp(min=1), per_sample=per_sample)


def token_terms(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    *,
    text: tuple[Targets, int] | None,
    fast: tuple[Targets, int] | None,
    z_weight: float,
) -> tuple[Term | None, Term | None]:
    """The text and the FAST term of hidden states (B, S, D), with one pass through the head.

    text, fast: The targets, and where in S their tokens begin.
    """
    parts = [part for part in (text, fast) if part is not None]
    if not parts:
        return None, None
    row = torch.cat([targets.row for targets, _ in parts])
    position = torch.cat([targets.position + begin for targets, begin in parts])
    logits = head(hidden[row, position])
    num_text = 0 if text is None else text[0].row.shape[0]
    return (
        None if text is None else text_term(logits[:num_text], text[0], z_weight=z_weight),
        None if fast is None else fast_term(logits[num_text:], fast[0]),
    )


def _per_sample_mean(values: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """(B,) means, 0 for a sample without targets, and (B,) whether it has any."""
    zeros = torch.zeros(targets.num_rows, dtype=values.dtype, device=values.device)
    sums = zeros.index_add(0, targets.row, values)
    counts = zeros.index_add(0, targets.row, torch.ones_like(values))
    return sums / counts.clamp(min=1.0), counts > 0
