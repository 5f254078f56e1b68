"""What is prepared of a row before its pictures are there is used for exactly that row, once, or not at all."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput
from services.inference.engine_port import Observed, Row
from services.inference.fused_model import MAX_ROWS_AHEAD, ChunkRow, FusedModel
from services.inference.rows_ahead import RowsAhead
from tests.support import prompted_lab
from tests.support.prompted_lab import CAMERA, CPU, HORIZON, STATE

PREFIX = np.full((2, 8), 0.25, dtype=np.float32)


@pytest.fixture
def model() -> FusedModel:
    policy = prompted_lab.policy("pi052", max_new_tokens=4, relative_actions=True, relative_exclude=()).eval()
    return FusedModel("tiny", policy, CPU, max_rows=2, max_texts=1)


def row(**changes: object) -> Row:
    state = np.array([0.5, -0.5], dtype=np.float32)
    sample = Observed(observation={CAMERA: np.full((16, 16, 3), 7, dtype=np.uint8), STATE: state}, task="tidy up")
    made = Row(sample=sample, prefix=PREFIX, delay_steps=1, execution_horizon=HORIZON, seed=3)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def seen(**changes: object) -> Observed:
    return dataclasses.replace(row().sample, **changes)  # type: ignore[arg-type]


def without_pictures(given: Row) -> Row:
    vectors = {name: array for name, array in given.sample.observation.items() if array.ndim == 1}
    return dataclasses.replace(given, sample=dataclasses.replace(given.sample, observation=vectors))


def same(one: ChunkRow, other: ChunkRow) -> bool:
    return (
        one.read.prompt.tokens.tobytes() == other.read.prompt.tokens.tobytes()
        and torch.equal(one.read.state, other.read.state)
        and np.array_equal(one.start.numbers, other.start.numbers)
        and one.start.num_clean == other.start.num_clean
        and all(np.array_equal(a, b) for a, b in zip(one.pictures, other.pictures, strict=True))  # type: ignore[arg-type]
    )


def test_a_row_that_was_told_ahead_is_the_same_and_its_prompt_is_not_made_again(
    model: FusedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = model.chunk_row(row())
    model.expect(without_pictures(row()))
    again = type(model.policy).observation
    monkeypatch.setattr(type(model.policy), "observation", None)
    assert same(model.chunk_row(row()), expected)
    monkeypatch.setattr(type(model.policy), "observation", again)
    assert same(model.chunk_row(row()), expected)  # Used up: made anew.


@pytest.mark.parametrize(
    "changes",
    [
        {"sample": seen(task="tidy up!")},
        {"sample": seen(observation={**row().sample.observation, STATE: np.array([0.5, -0.25], dtype=np.float32)})},
        {"prefix": PREFIX[:1]},
        {"prefix": PREFIX + np.float32(1e-6)},
        {"delay_steps": 2},
        {"execution_horizon": 1},
        {"seed": 4},
    ],
    ids=["task", "state", "shorter prefix", "prefix", "delay", "execution horizon", "seed"],
)
def test_a_row_that_differs_in_anything_is_prepared_by_itself(model: FusedModel, changes: dict[str, object]) -> None:
    expected = model.chunk_row(row(**changes))
    model.expect(without_pictures(row()))
    made = model.chunk_row(row(**changes))
    assert same(made, expected)
    assert not same(made, model.chunk_row(row()))


def test_what_was_made_with_the_statistics_of_before_is_forgotten_with_them(model: FusedModel) -> None:
    model.expect(without_pictures(row()))
    newer = prompted_lab.policy("pi052", max_new_tokens=4, relative_actions=True, relative_exclude=()).eval()
    wide = {"q01": -3 * np.ones(2), "q99": 3 * np.ones(2)}
    newer.set_statistics({STATE: wide, prompted_lab.ACTION: wide})
    model.stage(newer)
    before = model.chunk_row(row())
    model.expect(without_pictures(row()))
    model.replace(newer, model.version, model.digests)
    after = model.chunk_row(row())
    assert not np.array_equal(after.read.prompt.tokens, before.read.prompt.tokens)
    assert not np.array_equal(after.start.numbers, before.start.numbers)


def test_what_is_wrong_with_a_row_is_said_when_it_comes(model: FusedModel) -> None:
    bad = row(sample=seen(observation={**row().sample.observation, STATE: np.array([np.nan, 0.0], dtype=np.float32)}))
    model.expect(without_pictures(bad))
    with pytest.raises(InvalidInput, match="must be finite"):
        model.chunk_row(bad)
    model.expect(without_pictures(row()))
    unknown = {**row().sample.observation, "observation.images.other": row().sample.observation[CAMERA]}
    with pytest.raises(InvalidInput, match="is no camera of this policy"):
        model.chunk_row(row(sample=seen(observation=unknown)))


def test_rows_that_never_come_take_no_more_than_their_places() -> None:
    ahead: RowsAhead[int] = RowsAhead(3)
    for number in range(MAX_ROWS_AHEAD):
        ahead.put(number, number)
    assert len(ahead) == 3
    assert [ahead.take(number) for number in (0, MAX_ROWS_AHEAD - 1, MAX_ROWS_AHEAD - 1)] == [None, MAX_ROWS_AHEAD - 1, None]
