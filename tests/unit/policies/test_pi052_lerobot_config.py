"""config.json of lerobot: what it means here, what is noted, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from manyhands.errors import InvalidInput, ManyhandsError
from manyhands.spec import Feature, FeatureKind, Spec
from policies.normalization import Normalization
from policies.pi052 import lerobot_config
from policies.pi052.config import TOWERS, ChunkMode, NetworkConfig, Pi052Config, Precision, TowerSize, pi05_config
from policies.prompts.settings import Pi052PromptSettings
from policies.rtc import PrefixSchedule

PI05_BASE: dict[str, Any] = {
    "type": "pi05",
    "n_obs_steps": 1,
    "input_features": {
        "observation.images.base_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.images.left_wrist_0_rgb": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.state": {"type": "STATE", "shape": [32]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [32]}},
    "device": "cuda",
    "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MEAN_STD"},
    "rtc_config": {"enabled": True, "execution_horizon": 10, "prefix_attention_schedule": "EXP", "max_guidance_weight": 5.0},
    "paligemma_variant": "gemma_2b",
    "action_expert_variant": "gemma_300m",
    "dtype": "bfloat16",
    "chunk_size": 32,
    "n_action_steps": 32,
    "max_state_dim": 32,
    "max_action_dim": 32,
    "num_inference_steps": 5,
    "time_sampling_beta_alpha": 1.5,
    "min_period": 0.004,
    "image_resolution": [224, 224],
    "empty_cameras": 1,
    "use_relative_actions": True,
    "relative_exclude_joints": ["hand", ""],
    "action_feature_names": [*(f"joint{i}" for i in range(31)), "Hand"],
    "optimizer_lr": 2.5e-05,
}
PI052 = PI05_BASE | {
    "type": "pi052",
    "recipe_path": "recipes/subtask.yaml",
    "memory_dropout_prob": 0.5,
    "plan_dropout_prob": None,
    "joint_subtask_conditioning": True,
    "max_action_tokens": 100,
    "flow_loss_weight": 8.0,
    "enable_fast_action_loss": False,
    "fast_action_loss_weight": 1.0,
    "lm_head_lr_scale": 5.0,
    "use_hf_kernels": True,
}


PI05_PROMPTS = pi05_config().prompts


def test_pi05() -> None:
    found = lerobot_config.read(PI05_BASE)
    config = found.config
    assert (found.type_name, config.horizon, config.num_steps, config.num_empty_cameras) == ("pi05", 32, 5, 1)
    assert (config.flow_repeats, config.flow_weight, config.text_weight) == (1, 1.0, 0.0)
    assert config.network == NetworkConfig(precision=Precision.BFLOAT16)
    assert config.network.language == TOWERS["gemma_2b"]
    assert (config.state_normalization, config.action_normalization) == (Normalization.QUANTILES, Normalization.MEAN_STD)
    assert (config.relative_actions, config.relative_exclude) == (True, ("hand",))
    assert (config.prefix_schedule, config.max_guidance_weight) == (PrefixSchedule.EXP, 5.0)
    assert config.chunk_mode is ChunkMode.GUIDED
    assert config.prompts.recipe == ""
    features = found.features
    assert list(features.cameras) == ["observation.images.base_0_rgb", "observation.images.left_wrist_0_rgb"]
    assert (features.state_size, features.action_size, found.notes) == (32, 32, ())


def test_pi052() -> None:
    found = lerobot_config.read(PI052)
    config = found.config
    assert (config.flow_weight, config.text_weight, config.fast_weight, config.z_weight) == (8.0, 1.0, 0.0, 1e-4)
    assert (config.flow_repeats, config.knowledge_insulation, config.head_lr_scale) == (5, True, 5.0)
    assert config.prompts == Pi052PromptSettings(recipe="subtask", memory_dropout=0.5, joint=True, max_action_tokens=100)
    assert (found.recipe_path, found.action_tokenizer_name) == (None, "physical-intelligence/fast")
    assert len(found.notes) == 1
    assert "use_hf_kernels" in found.notes[0]


def test_actions_without_names_are_all_relative() -> None:
    config = lerobot_config.read(PI05_BASE | {"action_feature_names": None}).config
    assert (config.relative_actions, config.relative_exclude) == (True, ())
    config = lerobot_config.read(PI05_BASE | {"action_feature_names": None, "use_relative_actions": False}).config
    assert (config.relative_actions, config.relative_exclude) == (False, ("hand",))


def test_a_recipe_that_is_not_shipped_has_to_be_found() -> None:
    found = lerobot_config.read(PI052 | {"recipe_path": "/some/where/subtask.yaml"})
    assert (found.recipe_path, found.config.prompts.recipe) == ("/some/where/subtask.yaml", "")
    found = lerobot_config.read(PI052 | {"recipe_path": None})
    assert (found.recipe_path, found.config.prompts.recipe) == (None, "")
    del (values := dict(PI052))["recipe_path"]
    assert lerobot_config.read(values).config.prompts.recipe == "subtask_mem"


def test_an_unknown_field_is_noted_when_off_and_refused_when_on() -> None:
    assert "use_telepathy" in lerobot_config.read(PI05_BASE | {"use_telepathy": False}).notes[0]
    with pytest.raises(InvalidInput, match="use_telepathy"):
        lerobot_config.read(PI05_BASE | {"use_telepathy": True})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("type", "pi0"),
        ("time_sampling_beta_alpha", 1.0),
        ("use_visual_memory", True),
        ("paligemma_variant", "gemma_9b"),
        ("dtype", "float16"),
        ("normalization_mapping", {"STATE": "WHITEN"}),
        ("normalization_mapping", {"VISUAL": "MEAN_STD"}),
        ("rtc_config", {"prefix_attention_schedule": "COSINE"}),
        ("input_features", {"observation.images.a": {"type": "VISUAL", "shape": [3]}}),
        ("input_features", ["observation.images.a"]),
    ],
)
def test_what_is_not_implemented_is_refused(field: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=field):
        lerobot_config.read(PI05_BASE | {field: value})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chunk_size", "fifty", "horizon"),
        ("tokenizer_max_length", 0, "prompt_length"),
        ("fast_skip_tokens", -1, "fast_skip_tokens"),
        ("recipe_path", 3, "recipe_path"),
        ("plan_dropout_prob", "half", r"prompts\.plan_dropout"),
        ("subtask_dropout_prob", 2.0, r"prompts\.subtask_dropout"),
    ],
)
def test_values_that_cannot_be(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        lerobot_config.read(PI052 | {field: value})


@pytest.mark.parametrize("type_name", ["pi05", "pi052"])
def test_what_is_written_reads_the_same(type_name: str) -> None:
    make = pi05_config if type_name == "pi05" else Pi052Config
    config = make(
        network=NetworkConfig(precision=Precision.BFLOAT16),
        horizon=20,
        trained_prefix_max_delay=4,
        chunk_mode=ChunkMode.TRAINED,
        prefix_schedule=PrefixSchedule.ONES,
        relative_actions=True,
        prompts=Pi052PromptSettings(recipe="subtask", plan_dropout=0.25, joint=True)
        if type_name == "pi052"
        else PI05_PROMPTS,
    )
    spec = Spec(
        observation=(
            Feature(name="observation.images.front", kind=FeatureKind.IMAGE, dtype="uint8", shape=(480, 640, 3)),
            Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(6,)),
        ),
        action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,), element_names=("a", "b")),),
        control_rate_hz=30.0,
    )
    found = lerobot_config.read(json.loads(json.dumps(lerobot_config.write(type_name, config, spec))))
    assert found.config == config
    assert found.features.cameras == {"observation.images.front": (480, 640)}
    assert (found.features.state_size, found.features.action_size, found.features.action_names) == (6, 2, ("a", "b"))
    assert (found.recipe_path, found.notes) == (None, ())


def test_a_size_without_a_name_cannot_be_written() -> None:
    tower = TowerSize(width=16, depth=18, mlp=16)
    config = Pi052Config(network=NetworkConfig(expert=tower))
    spec = Spec(
        observation=(),
        action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
        control_rate_hz=30.0,
    )
    with pytest.raises(InvalidInput, match=r"network\.expert"):
        lerobot_config.write("pi052", config, spec)


@pytest.mark.parametrize("values", [PI05_BASE, PI052])
def test_a_field_of_any_kind_is_read_or_refused(values: dict[str, Any]) -> None:
    for name in values:
        for odd in (None, -1, 2.5, "x", [], [1], {}, {"a": 1}, True, float("inf")):
            try:
                lerobot_config.read(values | {name: odd})
            except ManyhandsError:
                continue
