"""A folder that is not exactly a checkpoint is refused with the tensor's name, and nothing half-written is ever seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.errors import Corrupt, InvalidInput, NotFound
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint, lerobot_folder

SPEC = Spec(
    observation=(Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(3,)),),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=10.0,
    robot_type="arm",
)
CONFIG = {"width": 16, "num_blocks": 1, "horizon": 4}
NAME = "blocks.0.up.weight"


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return checkpoint.build("flow", CONFIG, SPEC)


@pytest.fixture
def folder(policy, tmp_path):
    checkpoint.save(policy, tmp_path / "saved")
    return tmp_path / "saved"


def change(folder, edit):
    path = folder / checkpoint.TENSORS_FILE
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_it_loads_what_was_saved(folder, policy):
    loaded = checkpoint.load(folder)
    assert loaded.spec == SPEC
    assert not loaded.training
    for name, tensor in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def spoil_shape(tensors):
    tensors[NAME] = tensors[NAME][:1]


def spoil_dtype(tensors):
    tensors[NAME] = tensors[NAME].double()


def spoil_nan(tensors):
    tensors[NAME][0, 0] = float("nan")


def spoil_infinity(tensors):
    tensors[NAME][1, 0] = float("inf")


def remove(tensors):
    del tensors[NAME]


@pytest.mark.parametrize("edit", [spoil_shape, spoil_dtype, spoil_nan, spoil_infinity, remove])
def test_a_wrong_tensor_is_named(folder, edit):
    change(folder, edit)
    with pytest.raises(InvalidInput) as refused:
        checkpoint.load(folder)
    assert refused.value.field == NAME


def test_an_unknown_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.update(surprise=torch.zeros(1)))
    with pytest.raises(InvalidInput) as refused:
        checkpoint.load(folder)
    assert refused.value.field == "surprise"


def test_a_file_that_is_cut_off_names_the_tensor(folder):
    path = folder / checkpoint.TENSORS_FILE
    whole = path.read_bytes()
    header_size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + header_size])
    begin, end = header[NAME]["data_offsets"]
    path.write_bytes(whole[: 8 + header_size + (begin + end) // 2])
    with pytest.raises(Corrupt) as refused:
        checkpoint.load(folder)
    assert refused.value.field == NAME


@pytest.mark.parametrize("size", [0, 5, 8, 40])
def test_a_file_that_ends_in_its_header_is_corrupt(folder, size):
    path = folder / checkpoint.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(Corrupt):
        checkpoint.load(folder)


def test_a_header_that_claims_the_moon_is_corrupt(folder):
    (folder / checkpoint.TENSORS_FILE).write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(Corrupt):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", [checkpoint.CONFIG_FILE, checkpoint.TENSORS_FILE])
def test_a_missing_file_is_not_found(folder, name):
    (folder / name).unlink()
    with pytest.raises(NotFound, match=name):
        checkpoint.load(folder)


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        ({"type": "os:system"}, NotFound),
        ({"config": {"width": -1}}, InvalidInput),
        ({"config": []}, InvalidInput),
        ({"spec": {"observation": 5}}, InvalidInput),
        ({"extra": 1}, InvalidInput),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(folder, edit, error):
    path = folder / checkpoint.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(error):
        checkpoint.load(folder)


def test_a_refused_set_of_tensors_leaves_the_policy_as_it_was(policy):
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    bad = {name: torch.ones_like(tensor) for name, tensor in before.items()}
    bad[NAME] = bad[NAME] * float("nan")
    with pytest.raises(InvalidInput):
        checkpoint.load_tensors(policy, bad)
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_folder_that_is_being_written_has_no_name_yet(tmp_path):
    def write_half() -> None:
        with checkpoint.whole_folder(tmp_path / "saved") as unfinished:
            (unfinished / "half").write_text("x")
            assert not (tmp_path / "saved").exists()
            raise RuntimeError("power")

    with pytest.raises(RuntimeError, match="power"):
        write_half()
    assert list(tmp_path.iterdir()) == []


def test_saving_again_replaces_the_whole_folder(folder, policy):
    (folder / "old").write_text("x")
    checkpoint.save(policy, folder)
    assert sorted(path.name for path in folder.iterdir()) == [checkpoint.CONFIG_FILE, checkpoint.TENSORS_FILE]
    assert list(folder.parent.iterdir()) == [folder]


def test_a_configuration_nested_beyond_reading(folder):
    (folder / checkpoint.CONFIG_FILE).write_text("[" * 100_000)
    with pytest.raises(Corrupt, match="is not JSON"):
        checkpoint.load(folder)
    assert not lerobot_folder.is_one(folder)


def test_a_folder_of_something_else_is_left_alone(tmp_path, policy):
    """--output with the folder of all checkpoints, or a home, must not cost it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for place in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt"):
        with pytest.raises(InvalidInput, match="name a folder that is new, empty or a checkpoint") as refused:
            checkpoint.save(policy, place)
        assert refused.value.field == "output"
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


def test_an_empty_folder_is_filled_also_the_present_one(tmp_path, policy, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    checkpoint.save(policy, Path())
    assert checkpoint.load(tmp_path / "here").horizon == policy.horizon


def test_bfloat16_travels_as_its_bits():
    tensor = torch.tensor([1.0, -3.5, 1e-30], dtype=torch.bfloat16)
    wire = checkpoint.to_wire({"x": tensor})
    assert wire["x"].array().dtype == np.uint16
    assert torch.equal(checkpoint.from_wire(wire)["x"], tensor)
