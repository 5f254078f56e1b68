"""What we save acts the same in lerobot 0.6.1, and what it saves acts the same here.

Needs an environment with lerobot, named by LEROBOT_PYTHON; docs/guide/lerobot-checkpoints.md says how to make one.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from manyhands.spec import Feature, FeatureKind, Spec
from policies import files, lerobot_files, lerobot_folder
from policies.pi052 import checkpoint_keys as pi_keys
from policies.pi052.config import pi05_config
from policies.pi052.policy import Pi05Policy
from policies.policy import Sample
from policies.prompted import PromptedPolicy
from policies.smolvla2 import checkpoint_keys as smol_keys
from policies.smolvla2.config import smolvla_config
from policies.smolvla2.policy import SmolVLAPolicy
from tests.support import lerobot_lab

from .. import golden_text, pi, smol
from ..golden import Golden, relative_error

LIMIT = 1e-5
TASKS = ["put the cube_in the bin", "grasp the cup"]
STATE_SIZE, ACTION_SIZE, HORIZON, MODEL_SIZE = 6, 7, 5, 32
ACTION_NAMES = (*(f"joint_{i}.pos" for i in range(6)), "Gripper.pos")
CAMERAS = {"observation.images.front": (40, 30), "observation.images.wrist": (30, 40)}
HOW = "set LEROBOT_PYTHON to the python of an environment with lerobot[pi,smolvla]==0.6.1; see docs/guide"

AnyPolicy = PromptedPolicy[Any, Any]
Make = Callable[[Golden, pytest.MonkeyPatch], AnyPolicy]


@pytest.fixture(scope="session")
def lerobot_python() -> str:
    named = os.environ.get("LEROBOT_PYTHON", "")
    if not named:
        pytest.skip(HOW)
    found = subprocess.run(
        [named, "-c", "import importlib.metadata as m; print(m.version('lerobot'))"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    version = found.stdout.strip()
    assert version, f"{named} has no lerobot; {HOW}: {found.stderr}"
    if version != "0.6.1":  # Other tests take other ones.
        pytest.skip(f"{named} has lerobot {version}; {HOW}")
    return named


def spec() -> Spec:
    cameras = [Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(*size, 3)) for name, size in CAMERAS.items()]
    state = Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(STATE_SIZE + 1,))
    action = Feature(
        name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(ACTION_SIZE,), element_names=ACTION_NAMES
    )
    return Spec(observation=(*cameras, state), action=(action,), control_rate_hz=30.0)


def statistics() -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    rng = np.random.default_rng(3)
    found = {}
    for name, size in (("observation.state", STATE_SIZE + 1), ("action", ACTION_SIZE)):
        low = rng.uniform(-2.0, -0.5, size)
        found[name] = {"q01": low, "q99": low + rng.uniform(1.0, 3.0, size), "mean": low, "std": rng.uniform(0.3, 2.0, size)}
    return found


def given(folder: Path) -> dict[str, torch.Tensor]:
    """Samples for both sides, also written down."""
    rng = np.random.default_rng(7)
    rows = len(TASKS)
    arrays = {
        "observation.state": rng.normal(size=(rows, STATE_SIZE + 1)).astype(np.float32),
        "action": rng.normal(size=(rows, HORIZON, ACTION_SIZE)).astype(np.float32),
        "noise": rng.normal(size=(rows, HORIZON, MODEL_SIZE)).astype(np.float32),
    }
    arrays |= {name: rng.integers(0, 256, (rows, *size, 3), dtype=np.uint8) for name, size in CAMERAS.items()}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    save_file(tensors, folder / "samples.safetensors")
    return tensors


def acted(policy: AnyPolicy, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As reference.py's act()."""
    names = [name for name in tensors if name.startswith("observation.")]
    samples = [
        Sample(
            observation={name: tensors[name][row].numpy() for name in names},
            task=task,
            actions=tensors["action"][row].numpy(),
        )
        for row, task in enumerate(TASKS)
    ]
    training = policy.preprocess(samples, torch.device("cpu"))
    acting = policy.preprocess(
        [Sample(observation=sample.observation, task=sample.task) for sample in samples], torch.device("cpu")
    )
    chunk = policy.act(acting, tensors["noise"])
    return {
        "chunk": torch.from_numpy(policy.postprocess(chunk, acting)),
        "state": policy.state_normalizer.normalize(acting.state),
        "action": training.actions[..., :ACTION_SIZE],
        **{f"tokens.{row}": acting.tokens[row][acting.token_valid[row]] for row in range(len(TASKS))},
    }


def make_pi05(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> AnyPolicy:
    network = pi.network_config(golden)
    lerobot_lab.name_pi_sizes(monkeypatch, network)
    config = pi05_config(network=network, horizon=HORIZON, num_steps=4, relative_actions=True, prompt_length=150)
    policy = Pi05Policy(config, spec())
    pi_keys.load(policy.network, golden.weights)
    policy.take_files({files.TOKENIZER: golden_text.raw_tokenizer_json("gemma_like").encode()})
    return policy


def make_smolvla(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> AnyPolicy:
    network = smol.network_config(golden)
    lerobot_lab.name_smol_sizes(monkeypatch, network)
    policy = SmolVLAPolicy(smolvla_config(network=network, horizon=HORIZON, num_steps=4, num_empty_cameras=1), spec())
    smol_keys.load(policy.network, golden.weights)
    policy.take_files({files.TOKENIZER: golden_text.raw_tokenizer_json("smol_like").encode()})
    return policy


POLICIES: dict[str, Make] = {"pi05": make_pi05, "smolvla": make_smolvla}


def reference(
    python: str, golden: Golden, folder: Path, action: str, tmp_path: Path, **more: Any
) -> dict[str, torch.Tensor]:
    """What lerobot gives, with the samples in tmp_path."""
    job = {
        "type": golden.policy,
        "action": action,
        "folder": str(folder),
        "dims": golden.dims,
        "samples": str(tmp_path / "samples.safetensors"),
        "output": str(tmp_path / "output.safetensors"),
        "tasks": TASKS,
        **more,
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("reference.py")
    ran = subprocess.run(
        [python, str(script), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        timeout=150,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""},
    )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return load_file(tmp_path / "output.safetensors")


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors; 0 or 1 for tokens."""
    assert found.keys() == expected.keys()
    return {
        name: float(not torch.equal(found[name], expected[name]))
        if name.startswith("tokens")
        else relative_error(found[name], expected[name])
        for name in found
    }


@pytest.mark.parametrize("type_name", POLICIES)
def test_what_we_save_acts_the_same_in_lerobot(
    type_name: str, lerobot_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Golden(type_name)
    policy = POLICIES[type_name](golden, monkeypatch)
    policy.set_statistics(statistics())
    lerobot_folder.write(policy, tmp_path / "saved")
    samples = given(tmp_path)
    expected = reference(lerobot_python, golden, tmp_path / "saved", "load", tmp_path)
    errors = differences(acted(policy, samples), expected)
    print(errors)
    assert max(errors.values()) < LIMIT, errors
    # SmolVLA's config.json has no names of actions.
    again = lerobot_folder.read(tmp_path / "saved", spec=None if type_name == "pi05" else policy.spec)
    assert again.notes == ()
    assert again.policy.config == policy.config
    assert again.policy.spec == policy.spec
    assert torch.equal(acted(again.policy, samples)["chunk"], acted(policy, samples)["chunk"])


@pytest.mark.parametrize("type_name", POLICIES)
def test_what_lerobot_saves_acts_the_same_here(
    type_name: str, lerobot_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Golden(type_name)
    ours = POLICIES[type_name](golden, monkeypatch)
    tokenizer = tmp_path / "tokenizer"
    files.write(ours.files, tmp_path)
    lerobot_files.describe_tokenizer(tmp_path, lerobot_files.PALIGEMMA if type_name == "pi05" else lerobot_files.SMOLVLM)
    values = json.loads(json.dumps(lerobot_folder.config_of(ours)))
    is_pi = type_name == "pi05"
    names = ["chunk_size", "n_action_steps", "tokenizer_max_length", "empty_cameras"]
    names += ["num_inference_steps", "image_resolution", "use_relative_actions", "action_feature_names"] if is_pi else []
    names += [] if is_pi else ["num_steps", "num_vlm_layers", "resize_imgs_with_padding"]
    samples = given(tmp_path)
    expected = reference(
        lerobot_python,
        golden,
        tmp_path / "saved",
        "save",
        tmp_path,
        tokenizer=str(tokenizer),
        config={name: values[name] for name in names},
        statistics={feature: {name: v.tolist() for name, v in s.items()} for feature, s in statistics().items()},
        **{name: values[name] for name in ("input_features", "output_features", "normalization_mapping")},
    )
    found = lerobot_folder.read(tmp_path / "saved", tokenizer=tokenizer)
    errors = differences(acted(found.policy, samples), expected)
    print(errors, found.notes)
    assert max(errors.values()) < LIMIT, errors
    if is_pi:  # SmolVLA's file has no place for them.
        assert found.policy.spec == spec()


def test_a_difference_would_be_seen(lerobot_python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One statistic of what lerobot reads is another; a weight under another name is not even loaded."""
    golden = Golden("smolvla")
    policy = make_smolvla(golden, monkeypatch)
    policy.set_statistics(statistics())
    lerobot_folder.write(policy, tmp_path / "saved")
    samples = given(tmp_path)
    path = tmp_path / "saved" / "policy_postprocessor_step_0_unnormalizer_processor.safetensors"
    wrong = load_file(path)
    wrong["action.mean"][2] += 1e-3
    save_file(wrong, path)
    found = differences(acted(policy, samples), reference(lerobot_python, golden, tmp_path / "saved", "load", tmp_path))
    assert found["chunk"] > LIMIT
    assert found["action"] < LIMIT

    path = tmp_path / "saved" / "model.safetensors"
    weights = load_file(path)
    weights["model.action_out.bias"] = weights.pop("model.action_out_proj.bias")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(AssertionError, match="keys differ"):
        reference(lerobot_python, golden, tmp_path / "saved", "load", tmp_path)
