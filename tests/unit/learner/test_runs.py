"""The life of runs, with workers that only write points."""

from __future__ import annotations

import json
import threading

import pytest

from learner.progress import Point, ProgressReader, ProgressWriter, curve
from learner.recipe import Recipe
from learner.recipes import RECIPES, build_recipe
from learner.run_folder import RunFolder
from learner.runs import RunRequest, Runs, State
from manyhands.errors import AlreadyExists, InvalidInput, Refused
from policies.registry import policy_class
from policies.schedule import Schedule

REQUEST = RunRequest(run_id="run-1", recipe="flow_metaworld", dataset="demo", model="demo")


class Workers:
    """Stands for the cluster: writes what workers write, ends when told."""

    def __init__(self):
        self.release = threading.Event()
        self.release.set()
        self.configs = []
        self.error = None

    def fit(self, config, *, folder, max_failures):
        self.configs.append((dict(config), max_failures))
        run = RunFolder(folder)
        definition = run.read_definition()
        writer = ProgressWriter(run.progress_path)
        writer.write(Point(kind="started", step=0))
        writer.write(Point(kind="metrics", step=50, metrics={"train/loss": 0.5}))
        writer.write(Point(kind="published", step=50, number=1, digest="ab"))
        for _ in range(1000):
            if self.release.wait(0.01) or run.stop_path.exists():
                break
        if self.error:
            raise self.error
        run.checkpoint_path(int(definition["max_steps"])).mkdir(parents=True, exist_ok=True)
        writer.write(Point(kind="metrics", step=int(definition["max_steps"]), metrics={"train/loss": 0.1}))
        writer.close()


@pytest.fixture
def workers():
    return Workers()


@pytest.fixture
def fetched():
    return []


@pytest.fixture
def runs(tmp_path, workers, fetched):
    def fetch(dataset):
        fetched.append(dataset)
        return tmp_path / "data" / dataset

    made = Runs(tmp_path, fit=workers.fit, fetch=fetch, worker_config={"weights": "w:1"}, max_failures=2)
    yield made
    workers.release.set()
    made.close()


def wait_for(runs, *states):
    for _ in range(500):
        status = runs.wait_for_change(0.02)
        if status.state in states:
            return status
    raise AssertionError(f"{runs.status} never was {states}")


def test_a_run_goes_through_its_states_and_leaves_its_files(runs, workers, fetched, tmp_path):
    assert runs.status.state is State.IDLE
    runs.start(REQUEST)
    assert runs.status.state in (State.STARTING, State.TRAINING, State.FINISHED)
    status = wait_for(runs, State.FINISHED)
    recipe = build_recipe("flow_metaworld")
    assert status.max_steps == recipe.max_steps
    assert status.step == recipe.max_steps
    assert [point.number for point in status.published] == [1]
    assert status.checkpoint == tmp_path / "runs" / "run-1" / "checkpoints" / f"step-{recipe.max_steps:09d}"
    assert fetched == ["demo"]
    assert workers.configs == [({"weights": "w:1", "folder": str(tmp_path / "runs" / "run-1")}, 2)]
    folder = tmp_path / "runs" / "run-1"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "summary.json").read_text())["published"] == [{"number": 1, "digest": "ab", "step": 50}]


def test_one_run_at_a_time(runs, workers):
    workers.release.clear()
    runs.start(REQUEST)
    wait_for(runs, State.TRAINING)
    runs.start(REQUEST)  # The same one again changes nothing.
    with pytest.raises(Refused, match="run-1"):
        runs.start(RunRequest(run_id="run-2", recipe="flow_metaworld", dataset="demo", model="demo"))
    assert len(workers.configs) == 1


def test_a_run_can_be_stopped(runs, workers):
    workers.release.clear()
    runs.start(REQUEST)
    wait_for(runs, State.TRAINING)
    runs.stop("another")
    assert runs.status.state is State.TRAINING
    runs.stop("run-1")
    wait_for(runs, State.FINISHED)


def test_what_workers_raise_is_the_reason(runs, workers):
    workers.error = ValueError("the disk is full")
    runs.start(REQUEST)
    status = wait_for(runs, State.FAILED)
    assert status.detail == "ValueError: the disk is full"
    workers.error = None
    runs.start(REQUEST)  # The same run, once more.
    wait_for(runs, State.FINISHED)


def test_a_run_keeps_its_snapshot_and_refuses_to_become_another(runs, workers, fetched):
    runs.start(REQUEST)
    wait_for(runs, State.FINISHED)
    runs.start(RunRequest(run_id="run-1", recipe="flow_metaworld", dataset="demo", model="demo", max_steps=9000))
    wait_for(runs, State.FINISHED)
    assert fetched == ["demo"], "the snapshot of the first start"
    with pytest.raises(AlreadyExists, match="dataset"):
        runs.start(RunRequest(run_id="run-1", recipe="flow_metaworld", dataset="other", model="demo"))
    with pytest.raises(AlreadyExists, match="seed"):
        runs.start(RunRequest(run_id="run-1", recipe="flow_metaworld", dataset="demo", model="demo", seed=1))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"run_id": "../x"}, "run.run_id"),
        ({"run_id": ""}, "run.run_id"),
        ({"recipe": "os.system"}, "run.recipe"),
        ({"dataset": ""}, "run.dataset"),
        ({"model": ""}, "run.model"),
        ({"max_steps": -1}, "run.max_steps"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_field(runs, change, field):
    values = {"run_id": "run-1", "recipe": "flow_metaworld", "dataset": "demo", "model": "demo", **change}
    with pytest.raises(InvalidInput) as refused:
        runs.start(RunRequest(**values))
    assert refused.value.field == field


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_complete_and_travels(name):
    recipe = build_recipe(name)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert policy_class(recipe.policy_type)


@pytest.mark.parametrize("change", [{"batch_size": 0}, {"learning_rate": -1.0}, {"ema_decay": 1.5}, {"policy_type": ""}])
def test_impossible_recipes_are_refused(change):
    with pytest.raises(InvalidInput, match=next(iter(change))):
        Recipe(
            **{
                "policy_type": "flow",
                "batch_size": 8,
                "learning_rate": 1e-3,
                "schedule": Schedule(),
                "max_steps": 10,
                **change,
            }
        )


class TestProgress:
    def test_a_torn_last_line_costs_only_itself(self, tmp_path):
        path = tmp_path / "progress.jsonl"
        writer = ProgressWriter(path)
        writer.write(Point(kind="metrics", step=1, metrics={"train/loss": 1.0}))
        writer.close()
        with path.open("a") as file:
            file.write('{"kind": "metr')
        reader = ProgressReader(path)
        assert [point.step for point in reader.read_new()] == [1]
        again = ProgressWriter(path)
        again.write(Point(kind="started", step=1))
        assert [point.kind for point in reader.read_new()] == ["started"]
        assert reader.read_new() == []

    def test_what_a_restarted_worker_did_again_counts_once(self):
        def metrics(step, loss):
            return Point(kind="metrics", step=step, metrics={"train/loss": loss})

        points = [
            Point(kind="started", step=0),
            *(metrics(step, 1.0) for step in (10, 20, 30)),
            Point(kind="started", step=15),
            *(metrics(step, 2.0) for step in (20, 30)),
        ]
        assert [(p.step, p.metrics["train/loss"]) for p in curve(points)] == [(10, 1.0), (20, 2.0), (30, 2.0)]
