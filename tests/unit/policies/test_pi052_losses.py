"""Who counts in which mean."""

from __future__ import annotations

import pytest
import torch

from policies import losses


def test_flow_is_the_mean_over_samples_that_predict() -> None:
    errors = torch.tensor([1.0, 2.0, 6.0])[:, None, None, None].expand(3, 2, 4, 5)
    term = losses.flow_term(errors, torch.tensor([True, False, True]), action_size=3)
    assert term.mean == pytest.approx(3.5)
    assert term.per_sample.tolist() == [1.0, 0.0, 6.0]
    assert losses.flow_term(errors, torch.zeros(3, dtype=torch.bool), action_size=3).mean == 0


def test_kept_actions_do_not_count_and_longer_rests_weigh_more() -> None:
    errors = torch.tensor([1.0, 2.0, 6.0])[:, None, None, None].expand(3, 1, 4, 5)
    counted = torch.tensor([[True] * 4, [True] * 4, [False, False, False, True]])[:, None]
    term = losses.flow_term(errors, torch.tensor([True, False, True]), action_size=3, counted=counted)
    assert term.mean == pytest.approx((4 * 1.0 + 1 * 6.0) / 5)
    assert term.per_sample.tolist() == [1.0, 0.0, 6.0]


def _logits(losses_wanted: list[float]) -> torch.Tensor:
    """Two classes; cross-entropy of class 0 is what is wanted, and logsumexp 0."""
    first = -torch.tensor(losses_wanted)
    return torch.stack([first, torch.log1p(-first.exp())], dim=1)


def _targets(row: list[int], num_rows: int) -> losses.Targets:
    count = len(row)
    return losses.Targets(
        row=torch.tensor(row),
        position=torch.arange(count),
        token=torch.zeros(count, dtype=torch.int64),
        num_rows=num_rows,
    )


def test_text_is_the_mean_over_tokens_and_fast_over_samples() -> None:
    logits, targets = _logits([1.0, 2.0, 6.0]), _targets([0, 0, 2], 3)
    text = losses.text_term(logits, targets, z_weight=0.0)
    assert text.mean == pytest.approx(3.0)
    assert text.per_sample.tolist() == pytest.approx([1.5, 0.0, 6.0])
    fast = losses.fast_term(logits, targets)
    assert fast.mean == pytest.approx((1.5 + 6.0) / 2)
    assert fast.per_sample.tolist() == pytest.approx([1.5, 0.0, 6.0])


def test_z_loss_is_the_square_of_logsumexp() -> None:
    term = losses.text_term(_logits([1.0, 3.0]) + 2.0, _targets([0, 1], 2), z_weight=0.1)
    assert term.mean == pytest.approx(2.0 + 0.1 * 4.0)


def test_no_targets_are_no_loss_and_no_nan() -> None:
    targets = losses.text_targets(torch.full((2, 5), losses.IGNORED_LABEL))
    head = torch.nn.Linear(4, 9, bias=False)
    text, fast = losses.token_terms(torch.randn(2, 5, 4), head, text=(targets, 0), fast=None, z_weight=1e-4)
    assert fast is None
    assert text is not None
    torch.autograd.backward(text.mean)
    assert text.mean == 0
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_the_last_label_of_a_row_is_not_the_first_of_the_next() -> None:
    labels = torch.tensor([[-100, 7, -100], [9, -100, 8]])
    targets = losses.text_targets(labels)
    assert targets.row.tolist() == [0, 1]
    assert targets.position.tolist() == [0, 1]
    assert targets.token.tolist() == [7, 8]
