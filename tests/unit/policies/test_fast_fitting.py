from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from manyhands.errors import InvalidInput, TooLate
from policies import fast, fast_fitting
from policies.fast_fitting import FitSettings, cached, content_key, draw_chunks

HORIZON = 10


class Episodes:
    """Slow waves with noise; the last dimension never moves."""

    def __init__(self, lengths, noise=0.0, scale=1.0):
        rng = np.random.default_rng(3)
        self.episode_lengths = lengths
        self._actions = []
        for length in lengths:
            waves = np.sin(rng.uniform(0, 6, (1, 3)) + rng.uniform(0.05, 0.2, (1, 3)) * np.arange(length)[:, None])
            waves[:, 2] = 0.25
            waves[:, :2] += noise * rng.normal(size=(length, 2))
            self._actions.append(waves * scale)

    def chunk(self, episode, start, horizon):
        actions = self._actions[episode]
        return actions[start : start + horizon], actions[start]


def unchanged(actions, state):
    return actions


SMALL = FitSettings(num_samples=60, num_validation=20)


def test_a_fit_that_reconstructs_is_accepted():
    source = Episodes([40] * 8)
    tokenizer = fast_fitting.fit(source, HORIZON, unchanged, SMALL)
    found = fast_fitting.reconstruction(tokenizer, draw_chunks(source, HORIZON, unchanged, 30))
    assert found.rmse < 0.05
    assert found.dim_rmse[2] == 0.0
    assert tokenizer.config.time_horizon == HORIZON


def test_a_fit_that_does_not_is_refused_by_name():
    source = Episodes([40] * 8, noise=0.3)
    with pytest.raises(InvalidInput, match=r"max_rmse.*rmse 0\.\d+ on chunks it has not seen, the limit is 0.01"):
        fast_fitting.fit(source, HORIZON, unchanged, FitSettings(num_samples=60, num_validation=20, max_rmse=0.01))
    tokenizer = fast_fitting.fit(source, HORIZON, unchanged, SMALL)
    found = fast_fitting.reconstruction(tokenizer, draw_chunks(source, HORIZON, unchanged, 80)[-20:])
    between = (found.rmse + found.dim_rmse.max()) / 2
    assert found.rmse < between < found.dim_rmse.max()  # The still dimension brings the mean down.
    with pytest.raises(InvalidInput, match=rf"of dimension {found.dim_rmse.argmax()} on chunks it has not seen"):
        fast_fitting.fit(source, HORIZON, unchanged, FitSettings(num_samples=60, num_validation=20, max_dim_rmse=between))


def test_chunks_come_from_every_long_episode_and_are_the_same_every_time():
    source = Episodes([40, 5, 40, 40])
    starts = []

    def noted(actions, state):
        starts.append(float(state[0]))
        return actions

    first = draw_chunks(source, HORIZON, noted, 8)
    assert first.shape == (6, HORIZON, 3)  # Two from each, and none from the short one.
    np.testing.assert_array_equal(first, draw_chunks(source, HORIZON, unchanged, 8))
    in_episodes = [{float(row[0]) for row in actions} for actions in source._actions]
    assert [sum(start in rows for start in starts) for rows in in_episodes] == [2, 0, 2, 2]


def test_the_policys_own_space_is_what_is_fitted():
    def relative(actions, state):
        return actions - state

    chunks = draw_chunks(Episodes([40] * 4), HORIZON, relative, 8)
    assert (chunks[:, 0] == 0).all()


def test_no_episode_is_long_enough():
    with pytest.raises(InvalidInput, match="0 chunks of 10 steps"):
        fast_fitting.fit(Episodes([5, 6]), HORIZON, unchanged, SMALL)


def test_settings_are_checked():
    with pytest.raises(InvalidInput, match="num_samples"):
        FitSettings(num_samples=0)


def test_the_key_is_of_the_content():
    facts = {"dataset": "a", "horizon": 5, "statistics": {"q01": np.array([1.0, 2.0])}, "mask": np.array([True])}
    assert content_key(facts) == content_key(dict(reversed(facts.items())))
    assert len(content_key(facts)) == 16
    int(content_key(facts), 16)
    for change in (
        {"dataset": "b"},
        {"horizon": 6},
        {"statistics": {"q01": np.array([1.0, 2.1])}},
        {"mask": np.array([False])},
    ):
        assert content_key(facts | change) != content_key(facts)
    with pytest.raises(TypeError, match="cache key"):
        content_key({"dataset": object()})


# -- the cache ---------------------------------------------------------------------------------------------------------


def make_tokenizer():
    return fast.fit(draw_chunks(Episodes([40] * 4), HORIZON, unchanged, 20))


def one_rank(folder, rank, count_path, answers):
    def make():
        with Path(count_path).open("a") as file:
            file.write(f"{rank}\n")
        time.sleep(0.3)  # Long enough for the others to be waiting.
        return make_tokenizer()

    tokenizer, place = cached(Path(folder), "0123456789abcdef", make, is_leader=rank == 0, timeout_s=60, poll_s=0.02)
    answers.put((rank, str(place), tokenizer.encode(np.zeros((HORIZON, 3)))))


def test_one_of_many_ranks_fits_and_all_read_the_same(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [
        context.Process(target=one_rank, args=(str(tmp_path / "cache"), rank, str(tmp_path / "made"), answers))
        for rank in (2, 1, 0)
    ]
    for rank in ranks:
        rank.start()
    found = sorted(answers.get(timeout=90) for _ in ranks)
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    assert (tmp_path / "made").read_text() == "0\n"
    assert len({str(answer[1:]) for answer in found}) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["0123456789abcdef"]


def test_a_second_run_does_not_fit_again(tmp_path):
    cached(tmp_path, "k", make_tokenizer)

    def never():
        raise AssertionError("fitted again")

    tokenizer, _ = cached(tmp_path, "k", never)
    assert tokenizer.config.time_horizon == HORIZON


def test_of_two_leaders_the_first_whole_one_stays(tmp_path):
    def overtaken():
        cached(tmp_path, "k", make_tokenizer)
        (tmp_path / "k" / "first").touch()
        return make_tokenizer()

    _, place = cached(tmp_path, "k", overtaken)
    assert (place / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_what_is_seen_is_whole(tmp_path, monkeypatch):
    """A rank that looks at any moment of the writing finds all files or no folder."""
    seen = []
    save = fast.FastTokenizer.save

    def watched(self, folder):
        save(self, folder)
        seen.append((tmp_path / "k").exists())
        (folder / "last").touch()

    monkeypatch.setattr(fast.FastTokenizer, "save", watched)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: seen.append("renamed") or rename(self, to))
    _, place = cached(tmp_path, "k", make_tokenizer)
    assert seen == [False, "renamed"]
    assert (place / "last").exists()


def test_a_fit_that_fails_leaves_nothing(tmp_path):
    def failing():
        raise InvalidInput("no", field="x")

    with pytest.raises(InvalidInput):
        cached(tmp_path, "k", failing)
    assert list(tmp_path.iterdir()) == []


def test_others_do_not_wait_for_ever(tmp_path):
    with pytest.raises(TooLate, match="rank 0"):
        cached(tmp_path, "k", make_tokenizer, is_leader=False, timeout_s=0.05, poll_s=0.01)
