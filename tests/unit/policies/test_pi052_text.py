"""Choosing tokens: greedy, temperature, nucleus, and what may not come."""

from __future__ import annotations

import math

import pytest
import torch

from policies import text
from policies.text import Decoding

VOCABULARY = 257152


def _generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_greedy_takes_the_likeliest() -> None:
    assert text.choose(torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]]), temperature=0.0, top_p=0.0).tolist() == [1, 0]


def test_draws_follow_the_probabilities_at_the_temperature() -> None:
    logits = torch.tensor([[0.0, 2.0, 4.0]]).repeat(4000, 1)
    drawn = text.choose(logits, temperature=2.0, top_p=0.0, generators=_generators(*range(4000)))
    shares = torch.bincount(drawn, minlength=3) / 4000
    assert shares.tolist() == pytest.approx(torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0).tolist(), abs=0.03)


def test_a_seed_is_a_text() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(1))
    first, again, other = (text.choose(logits, temperature=1.0, top_p=0.9, generators=_generators(s)) for s in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_draw_from_their_own_generators() -> None:
    logits = torch.zeros(2, 1000)
    together = text.choose(logits, temperature=1.0, top_p=0.0, generators=_generators(3, 4))
    alone = text.choose(logits[1:], temperature=1.0, top_p=0.0, generators=_generators(4))
    assert together[1] == alone[0]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {0}), (0.55, {0}), (0.85, {0, 1}), (0.96, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_nucleus(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(600, 1)
    drawn = text.choose(logits, temperature=1.0, top_p=top_p, generators=_generators(*range(600)))
    assert set(drawn.tolist()) == kept


def _allowed(rules: Decoding, num_generated: int = 5) -> torch.Tensor:
    return text.allowed_logits(torch.zeros(1, VOCABULARY), rules, num_generated)[0] > -math.inf


def test_codes_are_never_text() -> None:
    allowed = _allowed(Decoding(suppress_locations=False))
    assert (~allowed).nonzero().flatten().tolist() == list(range(254_976, 256_000))
    assert _allowed(Decoding(suppress_locations=False, fast_skip_tokens=128)).all()


def test_locations_only_where_asked_for() -> None:
    allowed = _allowed(Decoding(suppress_locations=True))
    assert not allowed[256_000:257_024].any()
    assert allowed[257_024:].all()


def test_no_end_before_the_minimum() -> None:
    rules = Decoding(min_new_tokens=3, end_token=9, special_tokens=(0, 2))
    assert not _allowed(rules, 2)[[0, 2, 9]].any()
    assert _allowed(rules, 3)[[0, 2, 9]].all()
