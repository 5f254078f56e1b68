from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset_store.sampler import Sampler, permuted
from manyhands.errors import InvalidInput

frames = st.integers(1, 300)
worlds = st.integers(1, 7)
seeds = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=30, deadline=None)
@given(num_frames=frames, world_size=worlds, seed=seeds, epoch=st.integers(0, 5))
def test_ranks_together_see_every_frame_once_an_epoch(num_frames: int, world_size: int, seed: int, epoch: int) -> None:
    ranks = [Sampler(num_frames=num_frames, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
    drawn = [sampler.in_epoch(epoch, 0, num_frames) for sampler in ranks]
    assert [len(indices) for indices in drawn] == [sampler.epoch_length() for sampler in ranks]
    assert sorted(np.concatenate(drawn)) == list(range(num_frames))


@settings(max_examples=30, deadline=None)
@given(
    num_frames=st.integers(20, 100),
    seed=seeds,
    pieces=st.lists(st.tuples(worlds, st.integers(1, 20)), min_size=1, max_size=4),
)
def test_sequence_goes_on_at_any_world_size(num_frames: int, seed: int, pieces: list[tuple[int, int]]) -> None:
    """Training that changes its world size between any two steps draws what one process would have drawn."""
    position, drawn = 0, []
    for world_size, batch_size in pieces:
        ranks = [Sampler(num_frames=num_frames, seed=seed, rank=rank, world_size=world_size) for rank in range(world_size)]
        batches = [sampler.batch(position, batch_size) for sampler in ranks]
        drawn.append(np.stack(batches, axis=1).ravel())  # Step by step, rank by rank.
        position += batch_size * world_size
    alone = Sampler(num_frames=num_frames, seed=seed).at_global(np.arange(position))
    np.testing.assert_array_equal(np.concatenate(drawn), alone)
    for epoch in range(position // num_frames):
        assert sorted(alone[epoch * num_frames : (epoch + 1) * num_frames]) == list(range(num_frames))


@settings(max_examples=30, deadline=None)
@given(num_frames=frames, world_size=worlds, seed=seeds, position=st.integers(0, 400), count=st.integers(0, 400))
def test_position_in_epoch_is_where_it_goes_on(
    num_frames: int, world_size: int, seed: int, position: int, count: int
) -> None:
    sampler = Sampler(num_frames=num_frames, seed=seed, rank=world_size - 1, world_size=world_size)
    whole = sampler.in_epoch(3, 0, num_frames)
    np.testing.assert_array_equal(sampler.in_epoch(3, position, count), whole[position : position + count])


def test_order_differs_by_seed_and_epoch_and_looks_random() -> None:
    n = 10_000
    orders = [Sampler(num_frames=n, seed=seed).in_epoch(epoch, 0, n) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        assert abs(np.corrcoef(np.arange(n), first)[0, 1]) < 0.05
        # Neighbours in the order are no neighbours in the data: about a third of n apart on average.
        assert 0.3 < np.abs(np.diff(first)).mean() / n < 0.37
        for other in orders[i + 1 :]:
            assert (first == other).mean() < 0.01


def test_order_never_changes() -> None:
    """Runs are resumed across releases: these numbers are part of the format."""
    assert Sampler(num_frames=10, seed=0).at_global(np.arange(20)).tolist() == [
        *(1, 9, 3, 7, 0, 4, 8, 2, 5, 6),
        *(1, 2, 0, 7, 5, 6, 8, 4, 3, 9),
    ]
    assert permuted(np.arange(5), 10**12, seed=7, epoch=3).tolist() == [
        988567467471,
        30611854387,
        881706318936,
        359184074084,
        233684106101,
    ]


@pytest.mark.parametrize(
    ("num_frames", "rank", "world_size", "field"),
    [(0, 0, 1, "num_frames"), (5, 0, 0, "world_size"), (5, 2, 2, "rank"), (5, -1, 2, "rank")],
)
def test_impossible_settings_are_named(num_frames: int, rank: int, world_size: int, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        Sampler(num_frames=num_frames, seed=0, rank=rank, world_size=world_size)
