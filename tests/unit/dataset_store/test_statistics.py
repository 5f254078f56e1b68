from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_store.statistics import QUANTILES, DatasetStatistics, Moments, PictureHistogram, QuantileRows, summarise


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_merged_statistics_are_those_of_all_values(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    episodes = [rng.normal(1e3, 5, (length, 3)).astype(np.float32) for length in lengths]
    statistics = DatasetStatistics()
    start = 0
    for values in episodes:
        index = np.arange(start, start + len(values))
        start += len(values)
        statistics.add_episode_summary({"state": summarise(values), "index": summarise(index)})
        statistics.add_rows({"state": values, "index": index})
    entry = statistics.to_json(["state", "index"])["state"]
    everything = np.concatenate(episodes).astype(np.float64)
    assert entry["count"] == [len(everything)]
    np.testing.assert_allclose(entry["mean"], everything.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(entry["std"], everything.std(axis=0), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(entry["min"], everything.min(axis=0))
    np.testing.assert_array_equal(entry["max"], everything.max(axis=0))
    for name, level in QUANTILES.items():
        np.testing.assert_allclose(entry[name], np.quantile(everything, level, axis=0), rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(1, 400), min_size=1, max_size=20))
def test_rows_for_quantiles_depend_on_the_data_alone(cuts: list[int]) -> None:
    total = sum(cuts)
    pieces, whole = QuantileRows(max_rows=64), QuantileRows(max_rows=64)
    start = 0
    for cut in cuts:
        index = np.arange(start, start + cut)
        pieces.add({"index": index, "x": index * 2.0})
        start += cut
    whole.add({"index": np.arange(total), "x": np.arange(total) * 2.0})
    assert pieces.stride == whole.stride
    got, expected = pieces.quantiles(), whole.quantiles()
    for name in QUANTILES:
        assert got["x"][name] == expected["x"][name]
        # Few rows stand for all: within two strides of the exact value.
        assert abs(got["x"][name][0] / 2 - np.quantile(np.arange(total), QUANTILES[name])) <= 2 * pieces.stride


def test_picture_statistics_are_of_pixels_and_count_frames() -> None:
    rng = np.random.default_rng(0)
    episodes = [rng.integers(0, 256, (9, 32, 48, 3)).astype(np.uint8), rng.integers(0, 80, (5, 32, 48, 3)).astype(np.uint8)]
    total = PictureHistogram()
    sampled = []
    for episode in episodes:
        histogram = PictureHistogram()
        for frame, pixels in enumerate(episode):
            histogram.add(frame, pixels)
        total.merge(PictureHistogram.from_json(histogram.to_json()))
        sampled.append(episode[::4])
    pixels = np.concatenate(sampled).reshape(-1, 3) / 255.0
    summary = total.summary()
    assert summary["count"].tolist() == [3 + 2]
    for name, expected in (
        ("mean", pixels.mean(axis=0)),
        ("std", pixels.std(axis=0)),
        ("min", pixels.min(axis=0)),
        ("max", pixels.max(axis=0)),
        ("q10", np.quantile(pixels, 0.10, axis=0, method="inverted_cdf")),
        ("q99", np.quantile(pixels, 0.99, axis=0, method="inverted_cdf")),
    ):
        assert summary[name].shape == (3, 1, 1)
        np.testing.assert_allclose(summary[name].ravel(), expected, atol=1e-9, err_msg=name)


def test_large_pictures_are_thinned() -> None:
    histogram = PictureHistogram()
    histogram.add(0, np.zeros((480, 640, 3), np.uint8))
    assert 0 < histogram.counts.sum() <= 3 * 170 * 170


def test_deviation_survives_a_large_offset() -> None:
    moments = Moments()
    for offset in (1e8, 1e8 + 1):
        moments.merge(summarise(np.array([[offset], [offset + 2]], np.float64)))
    np.testing.assert_allclose(moments.summary()["std"], [np.std([0, 2, 1, 3])])
