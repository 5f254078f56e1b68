"""From a published dataset with language columns to a small pi052 that says its subtask and acts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dataset_store.reader import DatasetReader
from learner import worker
from learner.data import Demonstrations
from learner.progress import ProgressReader, curve
from learner.ranks import Ranks
from learner.recipe import Recipe
from learner.run_folder import RunFolder
from learner.starting import Places
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint as policy_checkpoint
from policies import fast_fitting
from policies import files as policy_files
from policies.fast_fitting import FitSettings
from policies.policy import TextKind, TextRequest
from policies.schedule import Schedule
from tests.support.language_lab import annotate, publish, row, save_pi052

pytestmark = pytest.mark.timeout(120)

SUBTASKS = ("lift", "push", "turn")
RECIPE = Recipe(
    policy_type="pi052",
    policy_config={"prompts": {"recipe": "subtask", "max_action_tokens": 48}, "relative_actions": True},
    start_from="base",
    fit_fast=FitSettings(num_samples=64, num_validation=16),
    batch_size=16,
    learning_rate=4e-3,
    schedule=Schedule(warmup_steps=20, decay_steps=200, final_share=0.1),
    ema_decay=0.0,
    max_steps=200,
    save_interval_s=1e9,
    report_every_steps=20,
)
OTHER_ROBOT = Spec(
    observation=(
        Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float32", shape=(7,)),
        Feature(name="observation.images.front", kind=FeatureKind.IMAGE, dtype="uint8", shape=(32, 32, 3)),
        Feature(name="observation.images.side", kind=FeatureKind.IMAGE, dtype="uint8", shape=(32, 32, 3)),
    ),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(6,)),),
    control_rate_hz=30.0,
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six episodes of three tasks, each with its subtask."""
    published = publish(tmp_path_factory.mktemp("store"), num_episodes=6, num_frames=24)
    annotate(published, lambda e: [row("assistant", SUBTASKS[e % 3], "subtask", timestamp=0.0)], lambda e, f: [])
    return published


@pytest.fixture(autouse=True)
def one_thread():
    """As the learner tells its workers: several are slower than one at such sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """With an untrained checkpoint of another robot, whose cameras have other names."""
    save_pi052(tmp_path / "checkpoints" / "base", OTHER_ROBOT)
    return Places(checkpoints=tmp_path / "checkpoints", cache=tmp_path / "cache")


def train(path: Path, root: Path, places: Places, *, recipe: Recipe = RECIPE, max_steps: int = 0) -> RunFolder:
    folder = RunFolder(path)
    definition = {"run_id": "run", "recipe": recipe.to_json(), "snapshot": str(root), "model": "m", "seed": 1}
    folder.write_definition(definition | {"max_steps": max_steps or recipe.max_steps, "max_duration_s": 0.0})
    worker.run(folder, Ranks(), places, weights_address="")
    return folder


def test_it_learns_actions_text_and_codes_and_then_speaks_and_acts(tmp_path, root, places):
    folder = train(tmp_path / "run", root, places)

    points = ProgressReader(folder.progress_path).read_new()
    notes = " ".join(point.note for point in points)
    assert "observation.images.front -> observation.images.top" in notes
    assert "recipe subtask: of" in notes
    metrics = [point.metrics for point in curve(points)]
    for term, share in (("flow", 0.5), ("text", 0.05), ("fast", 0.4)):
        assert metrics[-1][f"train/loss_{term}"] < share * metrics[0][f"train/loss_{term}"], term

    policy = policy_checkpoint.load(folder.newest_checkpoint())
    assert policy.spec == DatasetReader(root).spec
    demonstrations = Demonstrations(DatasetReader(root), horizon=policy.horizon)
    cpu = torch.device("cpu")
    for episode, subtask in enumerate(SUBTASKS):
        sample = demonstrations.samples([episode * 24 + 5], policy.used_observations())[0]
        asked = dataclasses.replace(sample, actions=None, is_pad=None, annotations=None)
        request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=12)
        assert "".join(policy.generate([asked], request, cpu)) == subtask
        inputs = policy.preprocess([dataclasses.replace(asked, task=subtask)], cpu)
        chunk = policy.postprocess(policy.act(inputs, policy.draw_noise([0])), inputs)
        # Actions count the frames: 5, 6, 7, ... of an episode that has numbers from 0 to 23.
        assert np.abs(chunk[0, :, 0] - np.arange(5, 13)).mean() < 4.0


def test_a_run_goes_on_with_nothing_but_its_own_folder_to_the_same_bits(tmp_path, root, places, monkeypatch):
    recipe = dataclasses.replace(RECIPE, max_steps=12)
    whole = train(tmp_path / "whole", root, places, recipe=recipe)
    fits = []
    monkeypatch.setattr(fast_fitting, "fit", lambda *_: fits.append(1))
    parts = train(tmp_path / "parts", root, places, recipe=recipe, max_steps=5)
    shutil.rmtree(places.checkpoints)
    shutil.rmtree(places.cache)
    train(tmp_path / "parts", root, places, recipe=recipe)
    assert not fits, "the second run found the tokenizer of the first, and the resumed one its own"
    for name in ("training.safetensors", "model.safetensors"):
        ours, theirs = (load_file(folder.newest_checkpoint() / name) for folder in (whole, parts))
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert policy_files.read(whole.newest_checkpoint()) == policy_files.read(parts.newest_checkpoint())
    assert policy_files.ACTION_TOKENIZER in policy_files.read(parts.newest_checkpoint())
