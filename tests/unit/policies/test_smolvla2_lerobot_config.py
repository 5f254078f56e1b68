"""config.json of lerobot's smolvla and smolvla2: what it means here, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manyhands.errors import InvalidInput, ManyhandsError
from manyhands.spec import Feature, FeatureKind, Spec
from policies.configuration import TowerSize
from policies.normalization import Normalization
from policies.prompts.settings import PromptSettings
from policies.rtc import PrefixSchedule
from policies.smolvla2 import lerobot_config
from policies.smolvla2.config import NetworkConfig, SmolVLA2Config, smolvla_config

BASE: dict[str, Any] = {
    "type": "smolvla",
    "n_obs_steps": 1,
    "input_features": {
        "observation.state": {"type": "STATE", "shape": [6]},
        **{f"observation.images.camera{i}": {"type": "VISUAL", "shape": [3, 256, 256]} for i in (1, 2, 3)},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [6]}},
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MIN_MAX"},
    "chunk_size": 40,
    "n_action_steps": 40,
    "num_steps": 5,
    "max_state_dim": 24,
    "max_action_dim": 28,
    "resize_imgs_with_padding": [512, 256],
    "empty_cameras": 1,
    "adapt_to_pi_aloha": False,
    "tokenizer_max_length": 48,
    "use_cache": True,
    "load_vlm_weights": True,
    "train_expert_only": True,
    "train_state_proj": False,
    "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    "prefix_length": 0,
    "pad_language_to": "max_length",
    "num_expert_layers": 0,
    "num_vlm_layers": 16,
    "self_attn_every_n_layers": 2,
    "expert_width_multiplier": 0.75,
    "rtc_config": {"enabled": True, "prefix_attention_schedule": "EXP", "max_guidance_weight": 5.0},
    "optimizer_lr": 1e-4,
}
SMOLVLA2 = BASE | {"type": "smolvla2", "recipe_path": "recipes/subtasks_vqa.yaml", "flow_loss_weight": 4.0}
SMOLVLA2["subtask_dropout_prob"] = 0.5


def test_smolvla() -> None:
    found = lerobot_config.read(BASE)
    config = found.config
    assert (found.type_name, config.horizon, config.num_steps, config.num_empty_cameras) == ("smolvla", 40, 5, 1)
    assert (config.flow_weight, config.text_weight, config.padded_steps_dilute) == (1.0, 0.0, False)
    assert (config.train_expert_only, config.freeze_vision, config.train_state) == (True, True, False)
    assert (config.state_normalization, config.action_normalization) == (Normalization.MEAN_STD, Normalization.MIN_MAX)
    assert (config.prefix_schedule, config.max_guidance_weight) == (PrefixSchedule.EXP, 5.0)
    network = config.network
    assert (network.image_width, network.image_height) == (512, 256)
    assert (network.state_size, network.action_size, network.prefix_length) == (24, 28, 0)
    assert (network.expert.width, network.expert.mlp, network.expert.depth) == (720, 2048, 16)
    assert list(found.features.cameras) == [f"observation.images.camera{i}" for i in (1, 2, 3)]
    assert (found.features.state_size, found.features.action_size) == (6, 6)
    assert found.notes == ()


def test_defaults_are_those_of_the_specification() -> None:
    bare = {"type": "smolvla"}
    assert lerobot_config.read(bare).config == smolvla_config()
    assert lerobot_config.read({"type": "smolvla2"}).config == SmolVLA2Config()


def test_text_trains_what_it_reads() -> None:
    found = lerobot_config.read(SMOLVLA2)
    assert (found.config.flow_weight, found.config.text_weight) == (4.0, 1.0)
    assert not found.config.train_expert_only
    assert found.config.padded_steps_dilute
    assert found.config.prompts == PromptSettings(recipe="subtasks_vqa", subtask_dropout=0.5)
    assert lerobot_config.read(SMOLVLA2 | {"text_loss_weight": 0.0}).config.train_expert_only


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"type": "pi05"}, "type"),
        ({"adapt_to_pi_aloha": True}, "adapt_to_pi_aloha"),
        ({"vlm_model_name": "HuggingFaceTB/SmolVLM2-2.2B-Instruct"}, "vlm_model_name"),
        ({"attention_mode": "sideways"}, "attention_mode"),
        ({"resize_imgs_with_padding": None}, "resize_imgs_with_padding"),
        ({"num_expert_layers": 8}, "num_expert_layers"),
        ({"rtc_config": {"mode": "trained"}}, "rtc_config"),
        ({"a_new_switch": True}, "a_new_switch"),
        ({"chunk_size": "many"}, "horizon"),
    ],
)
def test_what_cannot_be_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        lerobot_config.read(BASE | change)


def test_an_unknown_field_that_is_off_is_noted() -> None:
    assert lerobot_config.read(BASE | {"a_new_switch": False}).notes == (
        "a_new_switch is not known; it is off, and ignored",
    )


def test_layers_of_attention() -> None:
    assert lerobot_config.read(BASE | {"attention_mode": "self_attn"}).config.network.self_attention_every == 1
    assert lerobot_config.read(BASE | {"self_attn_every_n_layers": -1}).config.network.self_attention_every == 0
    assert lerobot_config.read(BASE | {"num_vlm_layers": -1}).config.network.language.depth == 32


def _spec() -> Spec:
    features = [Feature(name="observation.images.a", kind=FeatureKind.IMAGE, dtype="uint8", shape=(48, 64, 3))]
    features.append(Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(6,)))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(7,))
    return Spec(observation=tuple(features), action=(action,), control_rate_hz=20.0)


@pytest.mark.parametrize("values", [BASE, SMOLVLA2], ids=["smolvla", "smolvla2"])
def test_what_is_written_is_read_again(values: dict[str, Any]) -> None:
    before = lerobot_config.read(values)
    written = lerobot_config.write(before.type_name, before.config, _spec())
    after = lerobot_config.read(json.loads(json.dumps(written)))
    assert after.config == before.config
    assert after.recipe_path is None
    assert after.features.cameras == {"observation.images.a": (48, 64)}
    assert (after.features.state_size, after.features.action_size) == (6, 7)


def test_sizes_of_our_own_have_no_name() -> None:
    small = TowerSize(width=960, depth=16, mlp=256, heads=15, kv_heads=5, head_dim=64)
    with pytest.raises(InvalidInput, match=r"network\.language"):
        lerobot_config.write("smolvla", smolvla_config(network=NetworkConfig(language=small)), _spec())


@pytest.mark.parametrize("values", [BASE, SMOLVLA2])
def test_a_field_of_any_kind_is_read_or_refused(values: dict[str, Any]) -> None:
    for name in values:
        for odd in (None, -1, 2.5, "x", [], [1], {}, {"a": 1}, True, float("inf")):
            try:
                lerobot_config.read(values | {name: odd})
            except ManyhandsError:
                continue
