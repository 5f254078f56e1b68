"""lerobot's processor files: what they change here, and what is refused because it would change numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.errors import Corrupt, InvalidInput, ManyhandsError, NotFound
from manyhands.spec import Feature, FeatureKind, Spec
from policies import lerobot_fields, lerobot_processors
from policies.lerobot_fields import Described
from policies.normalization import Normalization, Normalizer
from policies.pi052 import lerobot_config as pi_fields
from policies.smolvla2 import lerobot_config as smol_fields

NAMES = ["a", "gripper"]
FEATURES: dict[str, Any] = {
    "input_features": {
        "observation.images.front": {"type": "VISUAL", "shape": [3, 16, 12]},
        "observation.state": {"type": "STATE", "shape": [3]},
    },
    "output_features": {"action": {"type": "ACTION", "shape": [2]}},
    "tokenizer_max_length": 48,
}
NORM = {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "MEAN_STD"}
VALUES: dict[str, dict[str, Any]] = {
    "pi05": FEATURES | {"type": "pi05", "normalization_mapping": NORM, "action_feature_names": NAMES},
    "pi052": FEATURES | {"type": "pi052", "normalization_mapping": NORM, "max_action_tokens": 64, "fast_skip_tokens": 10},
    "smolvla": FEATURES | {"type": "smolvla", "normalization_mapping": NORM},
    "smolvla2": FEATURES | {"type": "smolvla2", "normalization_mapping": NORM, "plan_dropout_prob": 0.5},
}
BEFORE, AFTER = lerobot_processors.PREPROCESSOR, lerobot_processors.POSTPROCESSOR
BEFORE_STATE = "policy_preprocessor_step_3_normalizer_processor.safetensors"
AFTER_STATE = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


def described(values: dict[str, Any]) -> Described[Any]:
    return (pi_fields if values["type"].startswith("pi") else smol_fields).read(values)


def write(folder: Path, values: dict[str, Any], *, with_statistics: bool = True) -> None:
    state, action = Normalizer(Normalization.QUANTILES, 3), Normalizer(Normalization.MEAN_STD, 2)
    if with_statistics:
        state.set({"q01": np.array([-1.0, 0, 1]), "q99": np.array([2.0, 3, 4])}, field="state")
        action.set({"mean": np.array([0.5, 0]), "std": np.array([2.0, 3])}, field="action")
    lerobot_processors.write(
        folder, values, tokenizer_name="tok", action_tokenizer_name="fast", state=state, action=action, with_fast=True
    )


def edit(folder: Path, file_name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = folder / file_name
    values = json.loads(path.read_text())
    change(values["steps"])
    path.write_text(json.dumps(values))


def config_of(steps: list[dict[str, Any]], name: str) -> dict[str, Any]:
    config: dict[str, Any] = next(step["config"] for step in steps if step["registry_name"] == name)
    return config


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, VALUES["pi05"])
    return tmp_path


@pytest.mark.parametrize("type_name", VALUES)
def test_what_is_written_is_read(type_name: str, tmp_path: Path) -> None:
    values = VALUES[type_name]
    write(tmp_path, values)
    found = lerobot_processors.read(tmp_path, described(values))
    assert found is not None
    assert found.state is not None
    assert found.action is not None
    assert {name: value.tolist() for name, value in found.state.items()} == {"q01": [-1, 0, 1], "q99": [2, 3, 4]}
    assert {name: value.tolist() for name, value in found.action.items()} == {"mean": [0.5, 0], "std": [2, 3]}
    assert (found.prompt_length, found.tokenizer_name, dict(found.renamed)) == (48, "tok", {})
    assert found.action_tokenizer_name == ("fast" if type_name == "pi052" else None)


def test_the_files_are_named_as_lerobot_names_them(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {BEFORE, AFTER, BEFORE_STATE, AFTER_STATE}
    assert load_file(folder / BEFORE_STATE).keys() == {
        "observation.state.q01", "observation.state.q99", "action.mean", "action.std"
    }  # fmt: skip


def test_no_files_are_old_and_one_is_half(folder: Path) -> None:
    (folder / AFTER).unlink()
    with pytest.raises(NotFound, match=AFTER):
        lerobot_processors.read(folder, described(VALUES["pi05"]))
    (folder / BEFORE).unlink()
    assert lerobot_processors.read(folder, described(VALUES["pi05"])) is None


def test_steps_are_found_wherever_they_stand(folder: Path) -> None:
    def move_to_front(steps: list[dict[str, Any]]) -> None:
        steps.insert(0, steps.pop(3))
        del steps[3]  # Before there were relative actions.

    edit(folder, BEFORE, move_to_front)
    edit(folder, AFTER, lambda steps: steps.pop(1))
    found = lerobot_processors.read(folder, described(VALUES["pi05"]))
    assert found is not None
    assert found.state is not None


def test_more_statistics_than_are_used(folder: Path) -> None:
    for name in (BEFORE_STATE, AFTER_STATE):
        more = {"action.count": torch.tensor([7.0]), "observation.images.front.mean": torch.zeros(3, 1, 1)}
        save_file(load_file(folder / name) | more, folder / name)
    found = lerobot_processors.read(folder, described(VALUES["pi05"]))
    assert found is not None
    assert found.action is not None
    assert found.action.keys() == {"mean", "std"}


def test_without_statistics_nothing_is_changed(tmp_path: Path) -> None:
    write(tmp_path, VALUES["pi05"], with_statistics=False)
    found = lerobot_processors.read(tmp_path, described(VALUES["pi05"]))
    assert found is not None
    assert (found.state, found.action) == (None, None)


def test_a_state_that_the_step_does_not_list_is_left_alone(folder: Path) -> None:
    edit(folder, BEFORE, lambda s: config_of(s, "normalizer_processor")["features"].pop("observation.state"))
    found = lerobot_processors.read(folder, described(VALUES["pi05"]))
    assert found is not None
    assert found.state is None
    assert found.action is not None


def unknown(steps: list[dict[str, Any]]) -> None:
    steps.insert(2, {"registry_name": "image_crop_resize_processor", "config": {}})


def by_class(steps: list[dict[str, Any]]) -> None:
    steps.append({"class": "somebody.else.Step", "config": {}})


def set_config(name: str, **values: Any) -> Callable[[list[dict[str, Any]]], None]:
    return lambda steps: config_of(steps, name).update(values)


@pytest.mark.parametrize(
    ("file_name", "change", "raised", "message"),
    [
        (BEFORE, unknown, InvalidInput, "image_crop_resize_processor.*may change numbers"),
        (BEFORE, by_class, InvalidInput, r"somebody\.else\.Step"),
        (AFTER, unknown, InvalidInput, "image_crop_resize_processor"),
        (BEFORE, lambda s: s.append(s[0]), InvalidInput, "rename_observations_processor' is there twice"),
        (BEFORE, lambda s: s.pop(4), InvalidInput, "lacks the step 'pi05_prepare_state"),
        (AFTER, lambda s: s.pop(0), InvalidInput, "lacks the step 'unnormalizer_processor"),
        (BEFORE, lambda s: s.append(s.pop(3)), InvalidInput, "in this order"),
        (BEFORE, set_config("device_processor", float_dtype="bfloat16"), InvalidInput, "bfloat16"),
        (BEFORE, set_config("normalizer_processor", eps=1e-6), InvalidInput, "eps"),
        (BEFORE, set_config("normalizer_processor", norm_map={"STATE": "MIN_MAX"}), InvalidInput, "STATE by 'MIN_MAX'"),
        (AFTER, set_config("unnormalizer_processor", norm_map={}), InvalidInput, "ACTION by 'IDENTITY'"),
        (BEFORE, set_config("normalizer_processor", norm_map=NORM | {"VISUAL": "MEAN_STD"}), InvalidInput, "pictures"),
        (
            BEFORE,
            set_config("normalizer_processor", normalize_observation_keys=["x"]),
            InvalidInput,
            "observation.state out",
        ),
        (BEFORE, set_config("relative_actions_processor", enabled=True), InvalidInput, "use_relative_actions"),
        (AFTER, set_config("absolute_actions_processor", enabled=True), InvalidInput, "use_relative_actions"),
        (BEFORE, set_config("tokenizer_processor", padding_side="left"), InvalidInput, "pads on the left"),
        (BEFORE, set_config("rename_observations_processor", rename_map={"x": "z", "y": "z"}), InvalidInput, "'x' and 'y'"),
        (BEFORE, lambda s: s[3].update(state_file="../x"), InvalidInput, "state_file"),
        (BEFORE, lambda s: s[3].update(state_file="none.safetensors"), NotFound, r"none\.safetensors"),
        (BEFORE, lambda s: s[3].update(config=[1]), Corrupt, "must be an object"),
        (BEFORE, lambda s: s.append("step"), Corrupt, "no list of processor steps"),
    ],
)
def test_what_is_not_computed_here_is_refused(
    folder: Path,
    file_name: str,
    change: Callable[[list[dict[str, Any]]], None],
    raised: type[ManyhandsError],
    message: str,
) -> None:
    edit(folder, file_name, change)
    with pytest.raises(raised, match=message):
        lerobot_processors.read(folder, described(VALUES["pi05"]))


@pytest.mark.parametrize(
    ("file_name", "change", "message"),
    [
        (AFTER_STATE, {"action.mean": torch.tensor([0.5, 0.1])}, "different statistics 'mean'"),
        (AFTER_STATE, {"action.mean": None}, "no statistic 'mean'"),
        (AFTER_STATE, {"action.mean": None, "action.std": None}, "only one of them has statistics"),
        (BEFORE_STATE, {"observation.state.q99": torch.zeros(4)}, "observation.state.*has 4 numbers.*must be 3"),
        (BEFORE_STATE, {"observation.state.q99": torch.tensor([1.0, torch.nan, 0])}, "observation.state.*2 of them finite"),
    ],
)
def test_statistics_that_do_not_fit(
    folder: Path, file_name: str, change: dict[str, torch.Tensor | None], message: str
) -> None:
    tensors: dict[str, torch.Tensor | None] = {**load_file(folder / file_name), **change}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / file_name)
    with pytest.raises(InvalidInput, match=message):
        lerobot_processors.read(folder, described(VALUES["pi05"]))


def test_truncated_statistics_are_named(folder: Path) -> None:
    path = folder / AFTER_STATE
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(Corrupt, match="cut off"):
        lerobot_processors.read(folder, described(VALUES["pi05"]))


@pytest.mark.parametrize("type_name", VALUES)
def test_a_setting_of_any_kind_is_read_or_refused(type_name: str, tmp_path: Path) -> None:
    write(tmp_path, VALUES[type_name])
    values = described(VALUES[type_name])
    for file_name in (BEFORE, AFTER):
        whole = (tmp_path / file_name).read_text()
        places = [(i, name) for i, step in enumerate(json.loads(whole)["steps"]) for name in step["config"]]
        for index, name in places:
            for odd in (None, -1, "x", [1], {"a": 1}, True):
                edit(tmp_path, file_name, lambda s, i=index, name=name, odd=odd: s[i]["config"].update({name: odd}))
                try:
                    lerobot_processors.read(tmp_path, values)
                except ManyhandsError:
                    pass
                (tmp_path / file_name).write_text(whole)


@pytest.mark.parametrize(("plain", "type_name"), [("pi05", "pi052"), ("smolvla", "smolvla2")])
def test_without_a_recipe_prompts_are_others(plain: str, type_name: str, tmp_path: Path) -> None:
    write(tmp_path, VALUES[plain])
    with pytest.raises(InvalidInput, match="without a recipe"):
        lerobot_processors.read(tmp_path, described(VALUES[type_name]))


def test_steps_of_older_files_say_nothing(tmp_path: Path) -> None:
    """Those of pi052 had no configuration at first."""
    write(tmp_path, VALUES["pi052"])
    for name in ("pi052_text_tokenizer", "action_tokenizer_processor"):
        edit(tmp_path, BEFORE, lambda steps, name=name: config_of(steps, name).clear())
    found = lerobot_processors.read(tmp_path, described(VALUES["pi052"]))
    assert found is not None
    assert (found.prompt_length, found.tokenizer_name, found.action_tokenizer_name) == (None, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("action_tokenizer_processor", {"fast_skip_tokens": 128}), "fast_skip_tokens"),
        (("action_tokenizer_processor", {"max_action_tokens": 512}), "max_action_tokens"),
        (("pi052_text_tokenizer", {"tools": [{"name": "say"}]}), "tools"),
    ],
)
def test_prompts_that_are_others(change: tuple[str, dict[str, Any]], message: str, tmp_path: Path) -> None:
    write(tmp_path, VALUES["pi052"])
    edit(tmp_path, BEFORE, set_config(change[0], **change[1]))
    with pytest.raises(InvalidInput, match=message):
        lerobot_processors.read(tmp_path, described(VALUES["pi052"]))


# -- relative actions --------------------------------------------------------------------------------------------------


def relative(**changes: Any) -> dict[str, Any]:
    return VALUES["pi05"] | {"use_relative_actions": True, "relative_exclude_joints": ["gripper"]} | changes


def test_relative_actions_agree(tmp_path: Path) -> None:
    write(tmp_path, relative())
    found = lerobot_processors.read(tmp_path, described(relative()))
    assert found is not None
    assert found.action_names is None
    for values, field in (
        (relative(relative_exclude_joints=["a"]), "relative_exclude_joints"),
        (relative(action_feature_names=["a", "b"]), "action_feature_names"),
        (relative(use_relative_actions=False), "use_relative_actions"),
    ):
        with pytest.raises(InvalidInput, match=field):
            lerobot_processors.read(tmp_path, described(values))


def test_names_that_only_the_step_has(tmp_path: Path) -> None:
    write(tmp_path, relative())
    found = lerobot_processors.read(tmp_path, described(relative(action_feature_names=None)))
    assert found is not None
    assert (found.action_names, found.relative_exclude) == (("a", "gripper"), ("gripper",))


def test_without_names_all_actions_are_relative(tmp_path: Path) -> None:
    values = relative(action_feature_names=None)
    write(tmp_path, values)
    found = lerobot_processors.read(tmp_path, described(values))
    assert found is not None
    assert (found.action_names, found.relative_exclude) == (None, None)
    assert described(values).config.relative_exclude == ()


# -- renamed features, old files ---------------------------------------------------------------------------------------


def test_the_robots_names_are_those_before_renaming(folder: Path) -> None:
    renamed = {"observation.images.top": "observation.images.front", "observation.joints": "observation.state"}
    edit(folder, BEFORE, set_config("rename_observations_processor", rename_map=renamed))
    values = described(VALUES["pi05"])
    found = lerobot_processors.read(folder, values)
    assert found is not None
    spec = lerobot_fields.derive_spec(values.features, found.renamed, 30.0)
    assert [feature.name for feature in spec.observation] == list(renamed)
    for name in ("observation.images.top", "observation.images.front"):
        robot = Spec(
            observation=(Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(4, 4, 3)),),
            action=spec.action,
            control_rate_hz=10.0,
        )
        assert lerobot_fields.check_spec(robot, values.features, spec, []) == robot


def old_weights(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    begin = "normalize_inputs.buffer_observation_state."
    return {
        f"{begin}q01": torch.tensor([-1.0, 0, 1]),
        f"{begin}q99": torch.tensor([2.0, 3, 4]),
        "unnormalize_outputs.buffer_action.mean": torch.tensor([0.5, 0]),
        "unnormalize_outputs.buffer_action.std": torch.tensor([2.0, 3]),
        "normalize_targets.buffer_action.mean": torch.tensor([0.5, 0]),
        "normalize_targets.buffer_action.std": torch.tensor([2.0, 3]),
    } | changes


def test_old_files_have_statistics_among_the_weights() -> None:
    found = lerobot_processors.read_old(old_weights(), described(VALUES["pi05"]))
    assert found.state is not None
    assert found.action is not None
    assert found.state["q99"].tolist() == [2, 3, 4]
    assert found.action["mean"].tolist() == [0.5, 0]


def test_old_statistics_that_were_never_set_are_none() -> None:
    weights = {name: torch.full_like(value, torch.inf) for name, value in old_weights().items()}
    found = lerobot_processors.read_old(weights, described(VALUES["pi05"]))
    assert (found.state, found.action) == (None, None)
    found = lerobot_processors.read_old({}, described(VALUES["pi05"]))
    assert (found.state, found.action) == (None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalize_targets.buffer_action.std": torch.tensor([2.0, 4])}, "different statistics 'std'"),
        ({"unnormalize_outputs.buffer_action.std": torch.tensor([2.0])}, "must be 2"),
        ({"unnormalize_outputs.buffer_action.std": torch.tensor([2.0, torch.inf])}, "1 of them finite"),
    ],
)
def test_old_statistics_that_do_not_fit(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        lerobot_processors.read_old(old_weights(**change), described(VALUES["pi05"]))
