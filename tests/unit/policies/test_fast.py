from __future__ import annotations

import json

import numpy as np
import pytest

from manyhands.errors import Corrupt, InvalidInput, NotFound
from policies import fast
from policies.fast import FastConfig, FastTokenizer

HORIZON, SIZE = 20, 3


def smooth_chunks(count, seed=0, horizon=HORIZON):
    """(count, horizon, SIZE) slow waves within about [-1, 1]."""
    rng = np.random.default_rng(seed)
    phase, speed = rng.uniform(0, 6, (count, 1, SIZE)), rng.uniform(0.02, 0.15, (count, 1, SIZE))
    return np.sin(phase + speed * np.arange(horizon)[None, :, None])


@pytest.fixture(scope="module")
def tokenizer():
    return fast.fit(smooth_chunks(200))


def test_a_chunk_comes_back_and_takes_few_codes(tokenizer):
    chunks = smooth_chunks(50, seed=1)
    codes = [tokenizer.encode(chunk) for chunk in chunks]
    decoded = np.stack([tokenizer.decode(row) for row in codes])
    assert decoded.dtype == np.float32
    assert np.sqrt(((decoded - chunks) ** 2).mean()) < 0.04
    assert np.mean([len(row) for row in codes]) < HORIZON * SIZE / 3
    assert max(max(row) for row in codes) < 1024


def test_the_transform_is_the_orthonormal_one():
    matrix = fast.cosine_transform(7)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(7), atol=1e-12)
    np.testing.assert_allclose(matrix @ np.ones(7), [np.sqrt(7), 0, 0, 0, 0, 0, 0], atol=1e-12)


def test_halves_round_to_even():
    chunk = np.full((1, 5), [0.05, 0.15, 0.25, -0.05, -0.15])
    assert fast.rounded_coefficients(chunk, 10.0).tolist() == [[0, 2, 2, 0, -2]]


def test_values_that_fitting_never_saw_are_encoded():
    """Fitted on few values, so that the bytes of most others never came up."""
    narrow = fast.fit(np.repeat(np.array([[[0.0], [0.5]]]), 5, axis=0))
    chunk = np.array([[3.1], [1.7]])
    coefficients = narrow.coefficients(chunk)
    assert coefficients.max() > narrow.coefficients(np.array([[0.0], [0.5]])).max() + 10
    np.testing.assert_array_equal(narrow.coefficients(narrow.decode(narrow.encode(chunk))), coefficients)


def test_what_lies_below_the_alphabet_is_raised_to_it(tokenizer):
    chunk = np.full((HORIZON, SIZE), -50.0)
    found = tokenizer.coefficients(tokenizer.decode(tokenizer.encode(chunk)))
    assert found.min() == tokenizer.config.min_token


@pytest.mark.parametrize("codes", [[], [3], [-1] * 60, [10**9] * 60, [5000]])
def test_codes_of_no_chunk_give_zeros(tokenizer, codes):
    assert (tokenizer.decode(codes) == 0).all()
    assert tokenizer.decode(codes).shape == (HORIZON, SIZE)


@pytest.mark.parametrize("value", [3e3, 1e9, 1e30])
def test_what_no_character_stands_for_is_refused(tokenizer, value):
    """A number with a range of zero is normalised to anything."""
    with pytest.raises(InvalidInput, match=f"reach {value:.4g} once normalised.*statistics".replace("+", r"\+")):
        tokenizer.encode(np.full((tokenizer.config.time_horizon, tokenizer.config.action_dim), value))


def test_half_a_character_gives_zeros_not_a_huge_action():
    """Coefficients from 128 on take two bytes; generated codes may hold one of them alone."""
    wide = np.zeros((40, 1, 1))
    wide[:20, 0, 0] = np.linspace(0, 30, 20)
    tokenizer = fast.fit(wide)
    halves = [code for code in range(tokenizer._num_codes) if tokenizer._bpe.decode([code]) == "\ufffd"]
    assert halves
    assert all((tokenizer.decode([code]) == 0).all() for code in halves)


def test_fitting_is_repeatable():
    first, second = (fast.fit(smooth_chunks(100)) for _ in range(2))
    chunks = smooth_chunks(20, seed=5)
    assert [first.encode(chunk) for chunk in chunks] == [second.encode(chunk) for chunk in chunks]


@pytest.mark.parametrize(
    ("chunks", "says"),
    [
        (np.zeros((0, 4, 2)), "at least one chunk"),
        (np.zeros((4, 2)), "at least one chunk"),
        (np.full((1, 4, 2), np.nan), "NaN or infinity"),
        (np.array([[[0.0]], [[200.0]]]), "coefficients from 0 to 2000"),
    ],
)
def test_chunks_that_cannot_be_fitted(chunks, says):
    with pytest.raises(InvalidInput, match=says):
        fast.fit(chunks)


def test_chunks_of_another_shape_are_refused(tokenizer):
    with pytest.raises(InvalidInput, match=r"have shape \(20, 4\), the FAST tokenizer was fitted on chunks of \(20, 3\)"):
        tokenizer.encode(np.zeros((HORIZON, SIZE + 1)))


def test_a_folder_gives_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = FastTokenizer.load(tmp_path)
    assert loaded.config == tokenizer.config
    chunk = smooth_chunks(1, seed=9)[0]
    assert loaded.encode(chunk) == tokenizer.encode(chunk)


def test_published_folders_are_read(tokenizer, tmp_path):
    """One tokenizer for any robot: no shape, keys of another library, the inner tokenizer in its own folder."""
    inner = tmp_path / "bpe_tokenizer"
    inner.mkdir()
    tokenizer.save(inner)
    config = {"min_token": tokenizer.config.min_token, "scale": 10, "vocab_size": 2048, "processor_class": "Universal"}
    config |= {"time_horizon": None, "action_dim": None, "auto_map": {"AutoProcessor": "code.Class"}}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    universal = FastTokenizer.load(tmp_path)
    chunk = smooth_chunks(1, seed=9)[0]
    assert universal.encode(chunk) == tokenizer.encode(chunk)
    decoded = universal.decode(universal.encode(chunk), time_horizon=HORIZON, action_dim=SIZE)
    assert (decoded == tokenizer.decode(tokenizer.encode(chunk))).all()
    with pytest.raises(InvalidInput, match="time_horizon"):
        universal.decode([1])


def test_folders_that_cannot_be_read(tokenizer, tmp_path):
    with pytest.raises(NotFound, match=r"tokenizer\.json"):
        FastTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(NotFound, match=r"processor_config\.json"):
        FastTokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.json").write_text((tmp_path / "tokenizer.json").read_text()[:100])
    with pytest.raises(Corrupt, match="no FAST tokenizer"):
        FastTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    "values", [{"scale": 0}, {"scale": "10"}, {"vocab_size": 2.5}, {"action_dim": True}, {"min_token": None}]
)
def test_configs_that_cannot_be(values):
    with pytest.raises(InvalidInput, match=next(iter(values))):
        fast.parse_config(values)


def test_defaults():
    assert fast.parse_config({}) == FastConfig()
