"""What a run begins with: checkpoints, recipes of messages against the data, statistics, the FAST tokenizer."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from dataset_store.reader import DatasetReader
from learner import action_tokenizer, messages, starting, worker
from learner.data import Batches, Demonstrations
from learner.progress import ProgressReader, curve
from learner.ranks import Ranks
from learner.recipe import Recipe
from learner.recipes import build_recipe
from learner.run_folder import RunFolder
from learner.starting import Places
from manyhands.errors import InvalidInput, ManyhandsError, NotFound, TooLate
from manyhands.spec import Spec
from policies import checkpoint as policy_checkpoint
from policies import fast_fitting, lerobot_folder
from policies import files as policy_files
from policies.fast_fitting import FitSettings
from policies.schedule import Schedule
from tests.support import lerobot_lab
from tests.support.language_lab import annotate, publish, row, save_pi052, say

HORIZON = 8
RECIPE = Recipe(
    policy_type="pi052",
    policy_config={"prompts": {"recipe": "subtask", "max_action_tokens": 48}},
    start_from="base",
    batch_size=4,
    learning_rate=1e-3,
    schedule=Schedule(),
    max_steps=10,
)
FIT = FitSettings(num_samples=40, num_validation=10)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("store"), num_episodes=3, num_frames=20)


@pytest.fixture(scope="module")
def spec(published: Path) -> Spec:
    return DatasetReader(published).spec


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory, spec: Spec) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    save_pi052(folder / "base", spec)
    return folder


@pytest.fixture
def root(published: Path, tmp_path: Path) -> Path:
    """Every episode has a subtask, and is spoken to at its third frame."""
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    annotate(
        copy,
        lambda episode: [row("assistant", f"part {episode}", "subtask", timestamp=0.0)],
        lambda episode, frame: [row("user", "wait", "interjection"), say("yes")] if frame == 3 else [],
    )
    return copy


@pytest.fixture
def start(tmp_path, checkpoints, root):
    def begin(snapshot=root, **changes):
        recipe = dataclasses.replace(RECIPE, **changes)
        places = Places(checkpoints=checkpoints, cache=tmp_path / "cache")
        return starting.start(snapshot, recipe, RunFolder(tmp_path / "run"), Ranks(), places)

    return begin


def with_prompts(**prompts):
    return {"prompts": {"max_action_tokens": 48, **prompts}}


class TestFromCheckpoint:
    def test_network_and_tokenizer_are_the_checkpoints_and_statistics_the_datas(self, start, checkpoints, root):
        begun = start(policy_config={**with_prompts(recipe="subtask"), "network": {"gradient_checkpointing": True}})
        state, origin = begun.policy.state_dict(), policy_checkpoint.load(checkpoints / "base").state_dict()
        network = [name for name in state if name.startswith("network.")]
        assert network
        assert all(torch.equal(state[name], origin[name]) for name in network)
        statistics = DatasetReader(root).statistics["action"]
        np.testing.assert_allclose(begun.policy.action_normalizer.second, statistics["q99"], rtol=1e-6)
        assert begun.policy.files.keys() == {policy_files.TOKENIZER}
        config = begun.policy.config
        assert config.network.gradient_checkpointing
        assert config.network.language.width == 32, "other keys of the same object stay"
        assert config.prompts.recipe == "subtask"
        assert begun.notes[0].startswith("starts from")
        assert not any("cameras" in note for note in begun.notes)

    def test_a_robot_of_other_sizes_is_no_obstacle(self, start, checkpoints, spec):
        wide = [dataclasses.replace(f, shape=(7,), element_names=(), element_units=()) for f in spec.states]
        other = Spec(observation=(*wide, *spec.images), action=spec.action, control_rate_hz=20.0)
        save_pi052(checkpoints / "wide", other)
        assert start(start_from="wide").policy.spec == spec

    def test_lerobots_folder_serves_as_well(self, start, checkpoints, monkeypatch):
        ours = policy_checkpoint.load(checkpoints / "base")
        lerobot_lab.name_pi_sizes(monkeypatch, ours.config.network)
        lerobot_folder.write(ours, checkpoints / "theirs")
        begun = start(start_from="theirs")
        origin = policy_checkpoint.load(checkpoints / "base").state_dict()
        state = begun.policy.state_dict()
        assert all(torch.equal(state[name], origin[name]) for name in state if name.startswith("network."))
        assert begun.policy.files.keys() == {policy_files.TOKENIZER}

    def test_it_need_not_name_the_type(self, start):
        assert start(policy_type="").policy.type_name == "pi052"

    def test_another_type_is_refused(self, start):
        with pytest.raises(InvalidInput, match="type 'pi052'") as refused:
            start(policy_type="pi05", policy_config={})
        assert refused.value.field == "recipe.policy_type"

    def test_one_that_is_not_there(self, start):
        with pytest.raises(NotFound, match="--checkpoints") as missing:
            start(start_from="elsewhere")
        assert missing.value.field == "recipe.start_from"

    def test_the_first_tensor_that_does_not_fit_is_named(self, start):
        narrow = {"width": 32, "depth": 2, "mlp": 48, "heads": 2, "kv_heads": 1, "head_dim": 16}
        with pytest.raises(InvalidInput, match=r"\(64, 32\) in the checkpoint .* \(48, 32\)") as refused:
            start(policy_config={**with_prompts(recipe="subtask"), "network": {"expert": narrow}})
        assert refused.value.field.startswith("network.expert.layers.0.")

    def test_tensors_that_only_one_of_them_has_are_named(self, checkpoints):
        origin = policy_checkpoint.load(checkpoints / "base")
        config = starting.overridden(origin.config_dict(), {"network": {"vision": {"depth": 2}}})
        deeper = policy_checkpoint.build("pi052", config, origin.spec)
        with pytest.raises(InvalidInput, match="missing from the checkpoint"):
            starting.take_network(deeper, origin)
        with pytest.raises(InvalidInput, match="not in this recipe's policy"):
            starting.take_network(origin, deeper)

    def test_cameras_of_other_names_are_told(self, start, checkpoints, spec, tmp_path):
        renamed = [dataclasses.replace(feature, name=feature.name.replace("top", "front")) for feature in spec.observation]
        save_pi052(checkpoints / "renamed", Spec(observation=tuple(renamed), action=spec.action, control_rate_hz=20.0))
        note = next(note for note in start(start_from="renamed").notes if "cameras" in note)
        assert "observation.images.front -> observation.images.top" in note


@pytest.mark.parametrize("name", ["pi052_smoke", "smolvla2_smoke"])
def test_smoke_recipes_train_on_any_data_with_a_camera(published, tmp_path, name):
    folder = RunFolder(tmp_path / "run")
    definition = {
        "run_id": "run",
        "recipe": build_recipe(name).to_json(),
        "snapshot": str(published),
        "model": "m",
        "seed": 1,
    }
    folder.write_definition(definition | {"max_steps": 3, "max_duration_s": 0.0})
    worker.run(folder, Ranks(), Places(checkpoints=tmp_path, cache=tmp_path), weights_address="")
    last = curve(ProgressReader(folder.progress_path).read_new())[-1].metrics
    assert {"train/loss_flow", "train/loss_text"} <= last.keys()
    trained = policy_checkpoint.load(folder.newest_checkpoint())
    assert trained.type_name == name.removesuffix("_smoke")


class TestMessages:
    def test_the_note_says_how_often_components_render(self, start):
        assert any("high_level_subtask" in note and "low_level_execution" in note for note in start().notes)

    def test_a_component_that_never_renders_is_an_error_before_training(self, start):
        with pytest.raises(InvalidInput, match=r"component 'memory_update'.*nth_prev"):
            start(policy_config=with_prompts(recipe="subtask_mem"))

    def test_events_are_looked_for_where_they_are(self, start, checkpoints, spec, monkeypatch):
        """One frame in twenty is spoken to; a sample of frames that misses them all must not be an error."""
        monkeypatch.setattr(messages, "_FRAMES_OF_AN_EPISODE", 1)
        text = """
            messages:
              - {role: user, content: "${interjection}", stream: high_level, if_present: interjection}
              - {role: assistant, stream: high_level, target: true, if_present: speech, tool_calls_from: speech}
        """
        shutil.copytree(checkpoints / "base", checkpoints / "spoken")
        (checkpoints / "spoken" / policy_files.RECIPE).write_text(text)
        begun = start(start_from="spoken", policy_config=with_prompts(recipe=policy_files.RECIPE))
        assert any("have messages: recipe.yaml 3" in note for note in begun.notes)

    def test_no_recipe_with_text_to_learn_is_an_error(self, start):
        with pytest.raises(InvalidInput, match="text_weight") as refused:
            start(policy_config=with_prompts(recipe=""))
        assert refused.value.field == "prompts.recipe"

    def test_data_without_annotations_has_none(self, start, published):
        with pytest.raises(InvalidInput, match="high_level_subtask"):
            start(snapshot=published)

    def test_frames_with_nothing_to_say_are_counted_and_refused(self, start, published, root, tmp_path):
        """The first task becomes empty: 20 frames."""

        def without_task(path):
            table = pq.read_table(path / "meta/tasks.parquet")
            tasks = pa.array(["", *table["task"].to_pylist()[1:]])
            at = table.column_names.index("task")
            pq.write_table(table.set_column(at, table.field(at), tasks), path / "meta/tasks.parquet")
            return path

        without_task(root)
        assert start().demonstrations.frames_without_task().tolist() == list(range(20)), "subtasks say enough"
        bare = without_task(Path(shutil.copytree(published, tmp_path / "bare")))
        with pytest.raises(InvalidInput, match=r"20 of 60 frames .* the first is 0"):
            start(snapshot=bare)

    def test_policies_without_text_need_no_recipe(self, published, tmp_path):
        recipe = build_recipe("smolvla2_smoke")
        places = Places(checkpoints=tmp_path, cache=tmp_path)
        assert starting.start(published, recipe, RunFolder(tmp_path / "run"), Ranks(), places).notes == ()


class TestActions:
    def test_relative_statistics_are_of_whole_chunks(self, published):
        demonstrations = Demonstrations(DatasetReader(published), horizon=HORIZON)
        found = demonstrations.statistics(np.array([True, False]))["action"]
        # Actions are (frame, -episode), the state (episode, frame, wave).
        differences = [f + k - e for e in range(3) for f in range(20 - HORIZON + 1) for k in range(HORIZON)]
        np.testing.assert_allclose(found["mean"], [np.mean(differences), -1.0])
        np.testing.assert_allclose(found["q99"], [np.quantile(differences, 0.99), 0.0])
        assert found["count"] == len(differences)

    def test_a_state_shorter_than_the_action_counts_as_zero(self, published):
        reader = DatasetReader(published)
        demonstrations = Demonstrations(reader, horizon=HORIZON)
        demonstrations.states = demonstrations.states[:, :1]
        found = demonstrations.statistics(np.array([True, True]))["action"]
        assert found["mean"][1] == -1.0

    def test_episodes_shorter_than_a_chunk_repeat_their_last_action(self, published):
        found = Demonstrations(DatasetReader(published), horizon=30).statistics(np.array([False, False]))["action"]
        assert found["max"][0] == 19.0
        assert found["count"] == 60 * 30

    @pytest.mark.parametrize("relative", [False, True])
    def test_fast_is_fitted_on_what_the_loss_sees(self, start, relative):
        config = {**with_prompts(recipe="subtask"), "relative_actions": relative}
        begun = start(policy_config=config, fit_fast=FIT)
        chunks = action_tokenizer.Chunks(begun.demonstrations)
        assert chunks.episode_lengths == [20, 20, 20]
        convert = action_tokenizer.to_model_space(begun.policy)
        samples = begun.demonstrations.samples([25], begun.policy.used_observations())
        inputs = begun.policy.preprocess(samples, torch.device("cpu"))
        np.testing.assert_array_equal(convert(*chunks.chunk(1, 5, HORIZON)), inputs.actions[0, :, :2])
        assert set(begun.policy.files) == set(policy_files.NAMES) - {policy_files.RECIPE}
        assert inputs.fast_is_code.any()

    def test_it_is_fitted_once_for_the_same_data_and_settings(self, start, monkeypatch, tmp_path):
        first = start(fit_fast=FIT).policy
        fits = []
        original = fast_fitting.fit
        monkeypatch.setattr(fast_fitting, "fit", lambda *arguments: fits.append(1) or original(*arguments))
        assert start(fit_fast=FIT).policy.files == first.files
        assert fits == []
        start(fit_fast=dataclasses.replace(FIT, scale=12.0))
        start(fit_fast=FIT, policy_config={**with_prompts(recipe="subtask"), "relative_actions": True})
        assert fits == [1, 1]

    def test_other_ranks_wait_for_the_first(self, start, tmp_path, monkeypatch):
        begun = start()
        quick = {"is_leader": True, "timeout_s": 0.1, "poll_s": 0.01}
        monkeypatch.setattr(fast_fitting.cached, "__kwdefaults__", quick)
        with pytest.raises(TooLate):
            action_tokenizer.fit(begun.policy, begun.demonstrations, FIT, cache=tmp_path / "none", is_leader=False)

    def test_a_policy_that_learns_no_codes_refuses(self, start):
        with pytest.raises(InvalidInput, match="learns no FAST") as refused:
            start(policy_config={**with_prompts(recipe="subtask"), "fast_weight": 0.0}, fit_fast=FIT)
        assert refused.value.field == "recipe.fit_fast"


def test_episodes_whose_chunks_take_more_codes_than_others_are_kept_in_memory_together(start):
    """Episode 2 stands still after its first third: fewer codes. The loss of a batch is the same, kept or made anew."""
    begun = start(fit_fast=FIT)
    begun.demonstrations.actions[47:60] = begun.demonstrations.actions[47]
    kept = Batches(begun.demonstrations, begun.policy, max_cached_bytes=2**30)
    anew = Batches(begun.demonstrations, begun.policy, max_cached_bytes=0)
    indices = np.array([55, 58])
    lengths, losses = [], []
    for batches in (kept, anew):
        inputs = batches.get(indices, indices)
        lengths.append(inputs.fast_tokens.shape[1])
        losses.append(begun.policy.loss(inputs, torch.Generator().manual_seed(0)))
        batches.close()
    assert kept.is_cached
    assert not anew.is_cached
    assert lengths[0] > lengths[1]
    for name, term in losses[0].terms.items():
        torch.testing.assert_close(term, losses[1].terms[name], rtol=1e-5, atol=1e-6)


def test_what_a_run_goes_on_with_is_its_own_checkpoint(start, tmp_path, checkpoints):
    begun = start(fit_fast=FIT)
    policy_checkpoint.save(begun.policy, RunFolder(tmp_path / "run").checkpoint_path(3))
    again = start(start_from="gone")
    assert again.policy.files == begun.policy.files
    assert again.policy.config == begun.policy.config
    assert again.notes == ()


def test_a_checkpoint_with_a_tensor_that_is_not_finite_is_refused(start, checkpoints):
    shutil.copytree(checkpoints / "base", checkpoints / "spoilt")
    path = checkpoints / "spoilt" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith("network."))
    tensors[name].view(-1)[0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(ManyhandsError, match=r"NaN|finite") as refused:
        start(start_from="spoilt")
    assert refused.value.field == name
