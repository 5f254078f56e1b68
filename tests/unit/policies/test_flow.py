"""What is particular to the small policy: cameras, instructions, statistics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from manyhands.errors import InvalidInput
from manyhands.spec import Feature, FeatureKind, Spec
from policies import text_features
from policies.flow import FlowPolicy
from policies.normalization import compute_statistics
from policies.policy import Sample

CPU = torch.device("cpu")
FRONT, WRIST = "observation.images.front", "observation.images.wrist"


def camera(name):
    return Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(32, 32, 3))


SPEC = Spec(
    observation=(
        Feature(
            name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(4,), element_units=("m", "m", "1", "m")
        ),
        camera(FRONT),
        camera(WRIST),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=20.0,
)
SMALL = {"width": 32, "num_blocks": 1, "horizon": 4, "num_steps": 3}


def build(**config):
    torch.manual_seed(0)
    return FlowPolicy.from_config({**SMALL, **config}, SPEC)


def sample(seed=0, task="open the drawer", **changes):
    rng = np.random.default_rng(seed)
    observation = {
        "observation.state": rng.normal(size=4).astype(np.float32),
        FRONT: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
        WRIST: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8),
    }
    return Sample(observation={**observation, **changes}, task=task)


def chunk_of(policy, one):
    return policy.act(policy.preprocess([one], CPU), policy.draw_noise([0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", "wide"), ("width", 0), ("picture_dropout", 1.5), ("horizon", 2.5), ("cameras", ["observation.images.back"])],
)
def test_impossible_values_are_refused_by_name(key, value):
    with pytest.raises(InvalidInput) as refused:
        build(**{key: value})
    assert key in refused.value.field


def test_only_the_cameras_that_are_configured_are_read():
    assert build().used_observations() == {"observation.state"}
    assert build(cameras=[WRIST]).used_observations() == {"observation.state", WRIST}
    policy = build(cameras=[WRIST])
    black = np.zeros((32, 32, 3), np.uint8)
    assert torch.equal(chunk_of(policy, sample()), chunk_of(policy, sample(**{FRONT: black})))
    assert not torch.equal(chunk_of(policy, sample()), chunk_of(policy, sample(**{WRIST: black})))


def test_an_absent_camera_is_not_a_black_one():
    policy = build(cameras=[FRONT, WRIST])
    one = sample()
    absent = dataclasses.replace(one, observation={k: v for k, v in one.observation.items() if k != WRIST})
    black = sample(**{WRIST: np.zeros((32, 32, 3), np.uint8)})
    assert not torch.equal(chunk_of(policy, absent), chunk_of(policy, black))


def test_a_picture_keeps_its_ratio():
    policy = build(cameras=[FRONT])
    wide = np.full((60, 120, 3), 255, np.uint8)
    pictures = policy.preprocess([sample(**{FRONT: wide})], CPU).pictures[0, 0]
    assert pictures[:, 8:24].min() == 255
    assert pictures[:, :8].max() == 0
    assert pictures[:, 24:].max() == 0


def test_training_mixes_rows_that_see_and_rows_that_do_not():
    """With dropout 1 pictures never matter to the loss, with 0 they always do."""

    def loss(dropout, picture):
        policy = build(cameras=[FRONT], picture_dropout=dropout)
        one = dataclasses.replace(
            sample(**{FRONT: picture}), actions=np.ones((4, 2), np.float32), is_pad=np.zeros(4, np.bool_)
        )
        return float(policy.loss(policy.preprocess([one], CPU), torch.Generator().manual_seed(0)).total.detach())

    black, white = np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 3), 255, np.uint8)
    assert loss(1.0, black) == loss(1.0, white)
    assert loss(0.0, black) != loss(0.0, white)


def test_steps_beyond_the_episode_do_not_count():
    policy = build()

    def loss(last, is_pad):
        actions = np.zeros((4, 2), np.float32)
        actions[3] = last
        one = dataclasses.replace(sample(), actions=actions, is_pad=np.array(is_pad))
        # The padded step still enters x_t, so only its target is free: compare the targets' part alone.
        inputs = policy.preprocess([one], CPU)
        return policy.loss(inputs, torch.Generator().manual_seed(0)).terms["flow"]

    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()  # The network says 0 whatever it sees, so the loss is that of the targets.
        counted = [False, False, False, False]
        padded = [False, False, False, True]
        assert torch.equal(loss(0.0, padded), loss(9.0, padded))
        assert not torch.equal(loss(0.0, counted), loss(9.0, counted))


def test_numbers_of_one_unit_share_a_scale_and_nothing_is_magnified():
    policy = build(min_std_fraction=0.1)
    values = np.random.default_rng(0).normal(size=(1000, 4)) * [3.0, 4.0, 0.001, 0.0]
    policy.set_statistics(
        {
            "observation.state": compute_statistics(values),
            "action": compute_statistics(np.random.default_rng(1).normal(size=(9, 2))),
        }
    )
    std = policy.state_normalizer.second.numpy()
    expected = np.sqrt((values[:, [0, 1, 3]].std(0) ** 2).mean())
    np.testing.assert_allclose(std[[0, 1, 3]], expected, rtol=1e-5)
    np.testing.assert_allclose(std[2], 0.1 * expected, rtol=1e-5)


def test_missing_statistics_are_named():
    with pytest.raises(InvalidInput, match="action"):
        build().set_statistics({"observation.state": compute_statistics(np.ones((3, 4)))})


class TestInstructions:
    def test_case_and_punctuation_do_not_count(self):
        np.testing.assert_array_equal(
            text_features.hashed_bag("Open the drawer!", 256), text_features.hashed_bag("open  the drawer", 256)
        )

    def test_unknown_words_are_close_to_similar_ones(self):
        known = text_features.hashed_bag("open the drawer", 512)
        similar = text_features.hashed_bag("open the drawers please", 512)
        other = text_features.hashed_bag("press a button", 512)
        assert known @ similar > 0.5 > 0.3 > known @ other

    def test_no_words_is_all_zero(self):
        assert not text_features.hashed_bag("?!", 64).any()

    def test_other_alphabets_work(self):
        assert text_features.hashed_bag("打开 抽屉", 64).any()
