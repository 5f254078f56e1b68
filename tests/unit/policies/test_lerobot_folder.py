"""lerobot's folder: written, read and refused. tests/parity/lerobot holds it against lerobot itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.errors import Corrupt, InvalidInput, ManyhandsError, NotFound, NotOffered
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, fast, files, lerobot_folder, registry
from policies.configuration import Precision, TowerSize, VisionSize
from policies.normalization import Normalization
from policies.pi052.config import NetworkConfig as PiNetwork
from policies.pi052.config import Pi052Config, pi05_config
from policies.policy import Sample
from policies.prompted import PromptedPolicy
from policies.prompts.locations import LOCATION_TOKENS
from policies.recipes import recipe as recipes
from policies.smolvla2.config import NetworkConfig as SmolNetwork
from policies.smolvla2.config import SmolVLA2Config, expert_size, smolvla_config
from tests.support import lerobot_lab, text_lab

TYPES = ("pi05", "pi052", "smolvla", "smolvla2")
PI_TOKENIZER = text_lab.bytes_tokenizer(text_lab.PI_SPECIAL, (*LOCATION_TOKENS, *(f"unused {i}" for i in range(3000))))
SMOL_TOKENIZER = text_lab.bytes_tokenizer(text_lab.SMOL_SPECIAL)
PI = PiNetwork(
    vision=VisionSize(width=16, depth=1, mlp=16, heads=2, patch=8),
    language=TowerSize(width=16, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
    expert=TowerSize(width=8, depth=2, mlp=16, heads=2, kv_heads=1, head_dim=8),
    vocabulary=PI_TOKENIZER.get_vocab_size(),
    image_height=16,
    image_width=16,
    action_size=4,
)
_LANGUAGE = TowerSize(width=32, depth=3, mlp=32, heads=4, kv_heads=2, head_dim=8)
SMOL = SmolNetwork(
    vision=VisionSize(width=16, depth=1, mlp=32, heads=2, patch=8),
    language=_LANGUAGE,
    expert=expert_size(_LANGUAGE),
    vocabulary=SMOL_TOKENIZER.get_vocab_size(),
    image_height=16,
    image_width=16,
    shuffle=2,
    state_size=8,
    action_size=8,
)
FRONT, WRIST = "observation.images.front", "observation.images.wrist"
HORIZON = 6
CPU = torch.device("cpu")


def spec_of(names: tuple[str, ...] = ("a", "gripper"), cameras: tuple[str, ...] = (FRONT, WRIST)) -> Spec:
    images = [Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(16, 12, 3)) for name in cameras]
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(3,))
    action = Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,), element_names=names)
    return Spec(observation=(*images, state), action=(action,), control_rate_hz=30.0)


SPEC = spec_of()
STATISTICS = {
    "observation.state": {"q01": [-1.0, 0, 0], "q99": [2.0, 1, 3], "mean": [0.5, 0, 0], "std": [1.0, 2, 3]},
    "action": {"q01": [-1.0, -2], "q99": [3.0, 0], "mean": [1.0, 2], "std": [0.5, 0.25]},
}


@pytest.fixture(autouse=True)
def _small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    lerobot_lab.name_pi_sizes(monkeypatch, PI)
    lerobot_lab.name_smol_sizes(monkeypatch, SMOL)


def make(type_name: str, **changes: Any) -> PromptedPolicy[Any, Any]:
    configs: dict[str, Callable[..., Any]] = {
        "pi05": pi05_config,
        "pi052": Pi052Config,
        "smolvla": smolvla_config,
        "smolvla2": SmolVLA2Config,
    }
    is_pi = type_name.startswith("pi")
    settings = {"network": PI if is_pi else SMOL, "horizon": HORIZON, "prompt_length": 96, "num_steps": 2}
    torch.manual_seed(0)
    policy = registry.policy_class(type_name)(configs[type_name](**(settings | changes)), SPEC)
    assert isinstance(policy, PromptedPolicy)
    policy.set_statistics({f: {n: np.array(v) for n, v in s.items()} for f, s in STATISTICS.items()})
    given = {files.TOKENIZER: (PI_TOKENIZER if is_pi else SMOL_TOKENIZER).to_str().encode()}
    if type_name == "pi052":
        chunks = np.random.default_rng(0).normal(size=(30, HORIZON, 2)).clip(-1.5, 1.5)
        given[files.ACTION_TOKENIZER], given[files.ACTION_TOKENIZER_CONFIG] = fast.fit(chunks).contents()
    policy.take_files(given)
    return policy.eval()


def sample() -> Sample:
    rng = np.random.default_rng(1)
    return Sample(
        observation={
            FRONT: rng.integers(0, 256, (16, 12, 3), dtype=np.uint8),
            WRIST: rng.integers(0, 256, (16, 12, 3), dtype=np.uint8),
            "observation.state": np.array([0.1, -0.3, 2.0], dtype=np.float32),
        },
        task="grasp the cup",
    )


def chunk_of(policy: Any, given: Sample | None = None) -> np.ndarray[Any, Any]:
    inputs = policy.preprocess([given or sample()], CPU)
    chunk: np.ndarray[Any, Any] = policy.postprocess(policy.act(inputs, policy.draw_noise([5])), inputs)
    return chunk


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lerobot_folder.write(make("pi05"), tmp_path / "saved")
    return tmp_path / "saved"


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def edit_tensors(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type_name", TYPES)
def test_what_is_written_acts_the_same_when_read(type_name: str, tmp_path: Path) -> None:
    policy = make(type_name)
    lerobot_folder.write(policy, tmp_path / "saved")
    assert lerobot_folder.is_one(tmp_path / "saved")
    progress: dict[str, int] = {}
    found = lerobot_folder.read(tmp_path / "saved", spec=SPEC, progress=progress.__setitem__)
    assert found.notes == ()
    assert found.policy.type_name == type_name
    assert found.policy.config == policy.config
    assert found.policy.files == policy.files
    assert not found.policy.training
    assert sum(progress.values()) == sum(p.numel() * p.element_size() for p in policy.parameters())
    state, expected = found.policy.state_dict(), policy.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    assert np.array_equal(chunk_of(found.policy), chunk_of(policy))


def test_our_own_form_of_it_is_ours(folder: Path, tmp_path: Path) -> None:
    policy = lerobot_folder.read(folder).policy
    checkpoint.save(policy, tmp_path / "ours")
    assert not lerobot_folder.is_one(tmp_path / "ours")
    assert not lerobot_folder.is_one(tmp_path)
    assert np.array_equal(chunk_of(checkpoint.load(tmp_path / "ours")), chunk_of(policy))


def test_the_robot_is_what_the_configuration_says(folder: Path) -> None:
    assert lerobot_folder.read(folder).policy.spec == SPEC
    assert lerobot_folder.read(folder, control_rate_hz=15.0).policy.spec.control_rate_hz == 15.0


TABLE = "model.paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    """As pi05_base is published: the head stands for the table too."""
    del tensors[TABLE]
    for key in list(tensors):
        tensors[key.removeprefix("model.")] = tensors.pop(key)


def newer_transformers(tensors: dict[str, torch.Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace(".vision_tower.vision_model.", ".vision_tower.")] = tensors.pop(key)


@pytest.mark.parametrize("form", [without_prefix, newer_transformers])
def test_other_names_are_the_same_weights(form: Callable[[dict[str, torch.Tensor]], None], tmp_path: Path) -> None:
    policy = make("pi05")
    policy.network.token_table.load_state_dict(policy.network.text_head.state_dict())
    lerobot_folder.write(policy, tmp_path / "saved")
    edit_tensors(tmp_path / "saved" / "model.safetensors", form)
    found = lerobot_folder.read(tmp_path / "saved")
    assert found.notes == ()
    assert np.array_equal(chunk_of(found.policy), chunk_of(policy))


def test_a_file_from_before_processors(folder: Path) -> None:
    expected = chunk_of(lerobot_folder.read(folder).policy)
    for path in folder.glob("policy_*"):
        path.unlink()
    modules = {"normalize_inputs": "observation.state", "normalize_targets": "action", "unnormalize_outputs": "action"}
    old = {
        f"{module}.buffer_{feature.replace('.', '_')}.{name}": torch.tensor(STATISTICS[feature][name])
        for module, feature in modules.items()
        for name in ("q01", "q99")
    }
    edit_tensors(folder / "model.safetensors", lambda tensors: tensors.update(old))
    found = lerobot_folder.read(folder)
    assert np.array_equal(chunk_of(found.policy), expected)
    assert len(found.notes) == 2
    assert "old buffers" in found.notes[0]
    assert "6 tensors" in found.notes[1]


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_have_the_precision_that_the_configuration_says(stored: torch.dtype, tmp_path: Path) -> None:
    policy = make("pi05", network=replace(PI, precision=Precision.BFLOAT16))
    lerobot_folder.write(policy, tmp_path / "saved")
    edit_tensors(
        tmp_path / "saved" / "model.safetensors", lambda t: t.update({name: value.to(stored) for name, value in t.items()})
    )
    found = lerobot_folder.read(tmp_path / "saved").policy
    assert {n: p.dtype for n, p in found.named_parameters()} == {n: p.dtype for n, p in policy.named_parameters()}


def test_several_files_are_one(folder: Path) -> None:
    expected = chunk_of(lerobot_folder.read(folder).policy)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = (sorted(tensors)[::2], sorted(tensors)[1::2])
    places = {}
    for index, keys in enumerate(halves):
        save_file({key: tensors[key] for key in keys}, folder / f"model-{index}.safetensors")
        places |= dict.fromkeys(keys, f"model-{index}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert np.array_equal(chunk_of(lerobot_folder.read(folder).policy), expected)

    edit_json(
        folder / "model.safetensors.index.json", lambda v: v["weight_map"].update({halves[0][0]: "../else.safetensors"})
    )
    with pytest.raises(InvalidInput, match=r"\.\./else\.safetensors"):
        lerobot_folder.read(folder)
    edit_json(
        folder / "model.safetensors.index.json", lambda v: v["weight_map"].update({halves[0][0]: "model-1.safetensors"})
    )
    with pytest.raises(Corrupt, match=r"model-1\.safetensors holds it"):
        lerobot_folder.read(folder)


def test_a_failed_write_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(lerobot_folder.lerobot_processors, "write", fail)
    with pytest.raises(OSError, match="no space"):
        lerobot_folder.write(make("pi05"), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_lerobot_cannot_hold_is_not_written(tmp_path: Path) -> None:
    flow = checkpoint.build("flow", {"width": 16, "num_blocks": 1, "horizon": 4}, SPEC)
    with pytest.raises(NotOffered, match="flow"):
        lerobot_folder.write(flow, tmp_path / "saved")
    with pytest.raises(InvalidInput, match="byte_prompts"):
        lerobot_folder.write(make("pi05", byte_prompts=True), tmp_path / "saved")
    with pytest.raises(InvalidInput, match=r"network\.vision"):
        lerobot_folder.write(make("pi05", network=replace(PI, vision=replace(PI.vision, mlp=8))), tmp_path / "saved")
    policy = make("pi05")
    policy.spec = spec_of(cameras=("front",))
    with pytest.raises(InvalidInput, match=r"front.*observation\."):
        lerobot_folder.write(policy, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- weights -----------------------------------------------------------------------------------------------------------

BIAS = "model.action_in_proj.bias"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.update({BIAS: torch.zeros(7)}), r"action_in_proj\.bias' is \(7,\)"),
        (lambda t: t.pop(BIAS), r"the first is 'model\.action_in_proj\.bias'"),
        (lambda t: t.update({"model.surprise": torch.zeros(1)}), r"'model\.surprise' is none of"),
        (lambda t: t[BIAS].fill_(torch.nan), r"action_in_proj\.bias' holds numbers that are not finite"),
    ],
    ids=["shape", "missing", "unknown", "nan"],
)
def test_a_tensor_that_does_not_fit_is_named(folder: Path, edit: Callable[[Any], None], message: str) -> None:
    edit_tensors(folder / "model.safetensors", edit)
    with pytest.raises(Corrupt, match=message):
        lerobot_folder.read(folder)


def test_a_truncated_file_is_named_by_its_first_lost_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(Corrupt, match="cut off") as error:
        lerobot_folder.read(folder)
    assert error.value.field.startswith("model.")


@pytest.mark.parametrize(
    ("name", "content", "raised"),
    [
        ("config.json", "{", Corrupt),
        ("config.json", "[]", Corrupt),
        ("config.json", '{"type": "act"}', NotOffered),
        ("config.json", '{"type": "pi05", "use_telepathy": true}', InvalidInput),
        ("config.json", None, NotFound),
        ("model.safetensors", None, NotFound),
        ("model.safetensors", "short", Corrupt),
        ("policy_preprocessor.json", "{}", Corrupt),
    ],
)
def test_a_file_that_is_none(folder: Path, name: str, content: str | None, raised: type[ManyhandsError]) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(raised):
        lerobot_folder.read(folder)


# -- the robot ---------------------------------------------------------------------------------------------------------


def test_a_robot_may_lack_a_camera(folder: Path) -> None:
    found = lerobot_folder.read(folder, spec=spec_of(cameras=(WRIST,)))
    assert found.notes == (f"the robot has no camera {FRONT}; the policy acts without it",)
    whole = sample()
    without = replace(whole, observation={name: v for name, v in whole.observation.items() if name != FRONT})
    expected = chunk_of(lerobot_folder.read(folder).policy, without)
    assert np.allclose(chunk_of(found.policy, without), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (spec_of(cameras=(FRONT, "observation.images.top")), r"observation\.images\.top.*which has observation"),
        (spec_of(cameras=(WRIST, FRONT)), "order"),
    ],
)
def test_a_robot_with_other_cameras_is_refused(folder: Path, spec: Spec, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        lerobot_folder.read(folder, spec=spec)


def with_sizes(state: int, action: int) -> Spec:
    return Spec(
        observation=(
            *SPEC.images,
            Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(state,)),
        ),
        action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(action,)),),
        control_rate_hz=30.0,
    )


def test_a_robot_of_another_size(folder: Path) -> None:
    with pytest.raises(InvalidInput, match=r"spec\.action.*3 numbers.*for 2"):
        lerobot_folder.read(folder, spec=with_sizes(3, 3))
    with pytest.raises(InvalidInput, match=r"spec\.observation.*4 numbers.*for 3"):
        lerobot_folder.read(folder, spec=with_sizes(4, 2))
    found = lerobot_folder.read(folder, spec=with_sizes(3, 1))
    assert len(found.notes) == 1
    assert "action: statistics are of 2 numbers, the robot has 1" in found.notes[0]


def test_relative_actions_go_by_the_checkpoints_names(tmp_path: Path) -> None:
    lerobot_folder.write(make("pi05", relative_actions=True), tmp_path / "saved")
    found = lerobot_folder.read(tmp_path / "saved").policy
    assert found.relative_action_mask().tolist() == [True, False]
    with pytest.raises(InvalidInput, match="'finger' is relative"):
        lerobot_folder.read(tmp_path / "saved", spec=spec_of(("a", "finger")))


def test_names_of_actions_that_only_the_processor_has(tmp_path: Path) -> None:
    policy = make("pi05", relative_actions=True)
    lerobot_folder.write(policy, tmp_path / "saved")
    edit_json(tmp_path / "saved" / "config.json", lambda values: values.update(action_feature_names=None))
    found = lerobot_folder.read(tmp_path / "saved").policy
    assert (found.spec, found.config) == (policy.spec, policy.config)
    assert found.relative_action_mask().tolist() == [True, False]


def test_names_before_renaming_and_the_length_that_was_tokenized_are_taken(folder: Path) -> None:
    expected = chunk_of(lerobot_folder.read(folder).policy)
    top = "observation.images.top"

    def edit(values: Any) -> None:
        values["steps"][0]["config"]["rename_map"] = {top: FRONT}
        values["steps"][5]["config"]["max_length"] = 80

    edit_json(folder / "policy_preprocessor.json", edit)
    found = lerobot_folder.read(folder).policy
    assert [feature.name for feature in found.spec.images] == [top, WRIST]
    assert found.config.prompt_length == 80
    given = sample()
    renamed = {top if name == FRONT else name: value for name, value in given.observation.items()}
    assert np.allclose(chunk_of(found, replace(given, observation=renamed)), expected, rtol=1e-4, atol=1e-5)


# -- tokenizers and recipes --------------------------------------------------------------------------------------------


def test_without_a_tokenizer_it_acts_on_prepared_inputs(folder: Path) -> None:
    (folder / files.TOKENIZER).unlink()
    found = lerobot_folder.read(folder)
    assert len(found.notes) == 1
    assert "google/paligemma-3b-pt-224" in found.notes[0]
    with pytest.raises(NotOffered):
        found.policy.preprocess([sample()], CPU)


def test_a_tokenizer_is_given_or_beside_the_weights_or_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / files.TOKENIZER).read_bytes()
    (folder / files.TOKENIZER).unlink()
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_bytes(content)
    for place in (tmp_path / "given", tmp_path / "given" / "tokenizer.json"):
        assert lerobot_folder.read(folder, tokenizer=place).policy.files == {files.TOKENIZER: content}
    with pytest.raises(NotFound, match="tokenizer"):
        lerobot_folder.read(folder, tokenizer=tmp_path)

    asked = []

    def cached(name: str, file_name: str) -> str:
        asked.append(name)
        return str(tmp_path / "given" / file_name)

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    assert lerobot_folder.read(folder).policy.files == {files.TOKENIZER: content}
    assert asked == ["google/paligemma-3b-pt-224"]
    # A checkpoint does not choose files of this machine.
    edit_json(
        folder / "policy_preprocessor.json", lambda v: v["steps"][5]["config"].update(tokenizer_name=str(tmp_path / "given"))
    )
    assert "given is neither" in lerobot_folder.read(folder).notes[0]

    (folder / "tokenizer.json").write_bytes(content)
    assert lerobot_folder.read(folder).notes == ()


def test_a_fast_tokenizer_is_missed_only_in_training(tmp_path: Path) -> None:
    lerobot_folder.write(make("pi052"), tmp_path / "saved")
    (tmp_path / "saved" / "action_tokenizer").rename(tmp_path / "given")
    found = lerobot_folder.read(tmp_path / "saved")
    assert "lerobot/fast-action-tokenizer" in found.notes[0]
    chunk_of(found.policy)
    found = lerobot_folder.read(tmp_path / "saved", action_tokenizer=tmp_path / "given")
    assert found.notes == ()
    assert files.ACTION_TOKENIZER in found.policy.files


def test_recipes(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    text = (Path(recipes.__file__).parent / "shipped" / "subtask.yaml").read_bytes()
    (tmp_path / "mine.yaml").write_bytes(text)

    def read_with(path: str | None, **given: Path) -> tuple[str, tuple[str, ...]]:
        lerobot_folder.write(make("pi052"), folder)
        edit_json(folder / "config.json", lambda v: v.update(recipe_path=path))
        found = lerobot_folder.read(folder, **given)
        assert (files.RECIPE in found.policy.files) == (found.policy.config.prompts.recipe == files.RECIPE)
        return found.policy.config.prompts.recipe, found.notes

    assert read_with("recipes/subtask_mem.yaml") == ("subtask_mem", ())
    assert read_with(None) == ("", ())
    assert read_with("recipes/subtask.yaml", recipe=tmp_path / "mine.yaml") == (files.RECIPE, ())
    name, notes = read_with("/home/me/subtask.yaml")
    assert (name, len(notes)) == ("subtask", 1)
    name, notes = read_with(str(tmp_path / "mine.yaml"))
    assert (name, len(notes)) == ("", 1)
    assert "mine.yaml" in notes[0]
    with pytest.raises(NotFound, match="recipe"):
        read_with(None, recipe=tmp_path / "none.yaml")


def test_a_recipe_of_ones_own_travels(tmp_path: Path) -> None:
    lerobot_folder.write(make("pi052"), tmp_path / "first")
    own = tmp_path / "mine.yaml"
    own.write_bytes((Path(recipes.__file__).parent / "shipped" / "subtask.yaml").read_bytes())
    policy = lerobot_folder.read(tmp_path / "first", recipe=own).policy
    lerobot_folder.write(policy, tmp_path / "second")
    found = lerobot_folder.read(tmp_path / "second")
    assert found.notes == ()
    assert found.policy.config == policy.config
    assert found.policy.files[files.RECIPE] == own.read_bytes()


def test_no_statistics_are_noted_and_change_nothing(tmp_path: Path) -> None:
    policy = make("smolvla", state_normalization=Normalization.IDENTITY)
    policy.action_normalizer = type(policy.action_normalizer)(Normalization.MEAN_STD, 2)
    lerobot_folder.write(policy, tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("policy_*.safetensors"))
    found = lerobot_folder.read(tmp_path / "saved", spec=SPEC)
    assert len(found.notes) == 1
    assert "action: the checkpoint has no statistics" in found.notes[0]
    chunk = torch.randn(1, HORIZON, 8)
    inputs = found.policy.preprocess([sample()], CPU)
    assert np.array_equal(found.policy.postprocess(chunk, inputs), chunk[..., :2].numpy())
