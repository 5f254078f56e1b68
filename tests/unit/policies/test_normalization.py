from __future__ import annotations

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput
from policies.normalization import Normalization, Normalizer, compute_statistics, to_absolute, to_relative

VALUES = np.random.default_rng(0).normal([1.0, -2.0, 5.0], [0.5, 3.0, 0.0], (400, 3))
STATISTICS = compute_statistics(VALUES)
X = torch.tensor([[1.5, 4.0, 5.0], [0.0, -9.0, 5.0]])


def make(normalization):
    normalizer = Normalizer(normalization, 3)
    normalizer.set(STATISTICS, field="action")
    return normalizer


@pytest.mark.parametrize(
    ("normalization", "low", "high"),
    [
        (Normalization.MIN_MAX, "min", "max"),
        (Normalization.QUANTILES, "q01", "q99"),
        (Normalization.QUANTILE10, "q10", "q90"),
    ],
)
def test_ranges(normalization, low, high):
    first, second = STATISTICS[low].astype(np.float32), STATISTICS[high].astype(np.float32)
    width = np.where(second == first, np.float32(1e-8), second - first)
    np.testing.assert_allclose(make(normalization).normalize(X).numpy(), 2 * (X.numpy() - first) / width - 1, rtol=1e-5)


def test_mean_and_deviation():
    expected = (X.numpy() - STATISTICS["mean"]) / (STATISTICS["std"] + 1e-8)
    np.testing.assert_allclose(make(Normalization.MEAN_STD).normalize(X).numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalization", list(Normalization))
def test_and_back(normalization):
    normalizer = make(normalization)
    torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(X)), X, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", list(Normalization))
def test_nothing_changes_before_statistics_come(normalization):
    torch.testing.assert_close(Normalizer(normalization, 3).normalize(X), X)


def test_nothing_is_clipped():
    assert float(make(Normalization.QUANTILES).normalize(torch.full((1, 3), 100.0))[0, 0]) > 10


def test_identity_has_no_statistics_in_the_weights():
    assert not Normalizer(Normalization.IDENTITY, 3).state_dict()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"q99": None}, "q99"), ({"q01": np.ones(2)}, r"\(2,\)"), ({"q01": np.array([0, np.nan, 0])}, "finite")],
)
def test_bad_statistics_are_refused_by_name(change, says):
    statistics = {name: value for name, value in {**STATISTICS, **change}.items() if value is not None}
    with pytest.raises(InvalidInput, match=says) as refused:
        Normalizer(Normalization.QUANTILES, 3).set(statistics, field="action")
    assert refused.value.field == "action"


def test_relative_actions_touch_only_the_masked_numbers_and_come_back():
    actions = torch.arange(12.0).reshape(1, 4, 3)
    state = torch.tensor([[10.0, 20.0, 30.0]])
    mask = torch.tensor([True, False, True])
    relative = to_relative(actions, state, mask)
    torch.testing.assert_close(relative[0, 1], torch.tensor([3.0 - 10.0, 4.0, 5.0 - 30.0]))
    torch.testing.assert_close(to_absolute(relative, state, mask), actions)


@pytest.mark.parametrize("normalization", list(Normalization))
def test_arrays_and_tensors_become_the_same_bits(normalization: Normalization) -> None:
    random = np.random.default_rng(1)
    normalizer = Normalizer(normalization, 64)
    rows = random.normal(size=(50, 64)) * 10.0 ** random.integers(-6, 6, 64)
    rows[:, 7] = 3.0  # A range of zero.
    normalizer.set(compute_statistics(rows), field="action")
    values = (random.normal(size=(200, 64)) * 10.0 ** random.integers(-8, 38, (200, 64))).astype(np.float32)
    tensor = torch.from_numpy(values)
    for of_arrays, of_tensors in (
        (normalizer.normalize(values), normalizer.normalize(tensor)),
        (normalizer.unnormalize(values), normalizer.unnormalize(tensor)),
    ):
        assert of_arrays.dtype == np.float32
        assert of_arrays.tobytes() == of_tensors.numpy().tobytes()


def test_statistics_that_change_count_at_once() -> None:
    normalizer = make(Normalization.QUANTILES)
    before = normalizer.normalize(X.numpy())
    with torch.no_grad():
        normalizer.second.add_(1.0)
    after = normalizer.normalize(X.numpy())
    assert (before != after).any()
    assert after.tobytes() == normalizer.normalize(X).numpy().tobytes()
