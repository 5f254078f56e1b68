"""A learner on Ray between a real store and a real weights service: a run, its progress, what it leaves, how it ends."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from manyhands import weights_manifest
from manyhands.clients.learner import LearnerClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import AlreadyExists, InvalidInput, Refused
from manyhands.learner.v1 import learner_pb2
from policies import checkpoint
from policies.policy import Sample
from tests.support import learner_lab
from tests.support.learner_lab import DATASET

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("learner")


@pytest.fixture(scope="module")
def lab(folder):
    started = [learner_lab.start_store(folder)]
    try:
        started.append(learner_lab.start_weights(folder).wait_ready())
        started.append(learner_lab.start_learner(folder, started[0].address, started[1].address))
        yield started[2].wait_ready(), started[1].address
    finally:
        for process in reversed(started):
            process.stop()


@pytest.fixture
def client(lab):
    with LearnerClient(lab[0].address) as connected:
        yield connected


def definition(run_id, **changes):
    values = {"recipe": "flow_smoke", "dataset": DATASET, "model": "smoke", "seed": 5}
    return learner_pb2.RunDefinition(run_id=run_id, **{**values, **changes})


def follow(client, *, until):
    """Responses up to the first for which until() holds."""
    seen = []
    for response in client.watch():
        seen.append(response)
        if response.status.state == learner_pb2.RUN_STATE_FAILED:
            raise AssertionError(response.status.detail)
        if until(response):
            return seen
    raise AssertionError("the stream ended")


def is_finished(response):
    return response.status.state == learner_pb2.RUN_STATE_FINISHED


def test_a_run_trains_publishes_and_leaves_a_policy(client, lab, folder):
    assert client.start_run(definition("whole")) == "whole"
    with pytest.raises(Refused, match="whole"):
        client.start_run(definition("another"))
    seen = follow(client, until=is_finished)

    steps = [response.step for response in seen if "train/loss" in response.metrics]
    assert steps == sorted(set(steps))
    assert steps[-1] == 200
    losses = [response.metrics["train/loss"] for response in seen if "train/loss" in response.metrics]
    assert losses[-1] < losses[0]
    status = client.status()
    assert (status.step, status.max_steps, status.worker_count, status.restart_count) == (200, 200, 1, 0)

    policy = checkpoint.load(Path(status.checkpoint_path))
    sample = Sample(observation={"observation.state": np.zeros(4, np.float32)}, task="follow the numbers")
    inputs = policy.preprocess([sample], torch.device("cpu"))
    assert np.isfinite(policy.postprocess(policy.act(inputs, policy.draw_noise([0])), inputs)).all()

    published = [response.published for response in seen if response.HasField("published")]
    assert [version.number for version in published] == list(range(1, len(published) + 1))
    assert list(status.published) == published
    with WeightsClient(lab[1]) as weights:
        manifest = weights.get_manifest("smoke")
        tensors = checkpoint.from_wire(weights.fetch(manifest))
    assert weights_manifest.digest(manifest) == published[-1].digest
    assert manifest.policy_type == "flow"
    assert json.loads(manifest.config_json) == policy.config_dict()
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in tensors.items())

    run = folder / "learner" / "runs" / "whole"
    assert (run / "loss.png").stat().st_size > 1000
    assert json.loads((run / "summary.json").read_text())["step"] == 200


def test_a_watcher_that_comes_back_misses_nothing(client):
    first = [response.step for response in follow(client, until=is_finished) if "train/loss" in response.metrics]
    again = []
    for response in client.watch(from_step=101):
        if is_finished(response):
            break
        if "train/loss" in response.metrics:
            again.append(response.step)
    assert again == [step for step in first if step > 100]


def test_requests_that_cannot_be_are_refused_by_field(client):
    for changes, field in (({"recipe": "os:system"}, "run.recipe"), ({"dataset": ""}, "run.dataset")):
        with pytest.raises(InvalidInput) as refused:
            client.start_run(definition("bad", **changes))
        assert refused.value.field == field
    with pytest.raises(AlreadyExists, match="seed"):
        client.start_run(definition("whole", seed=6))


def test_a_dataset_that_is_not_there_fails_the_run_with_its_name(client):
    client.start_run(definition("nothing", dataset="no-such"))
    for response in client.watch():
        if response.status.state == learner_pb2.RUN_STATE_FAILED:
            assert "no-such" in response.status.detail
            return


def worker_pid(folder: Path, run_id: str) -> int:
    lines = (folder / "learner" / "runs" / run_id / "progress.jsonl").read_text().splitlines()
    notes = [json.loads(line)["note"] for line in lines if '"started"' in line]
    return int(notes[-1].split()[1])


def test_a_killed_worker_starts_again_from_the_newest_checkpoint_and_a_run_can_be_stopped(client, folder):
    client.start_run(definition("long", max_steps=1_000_000))
    follow(client, until=lambda response: response.HasField("published"))
    os.kill(worker_pid(folder, "long"), signal.SIGKILL)
    follow(client, until=lambda response: response.status.restart_count == 1)
    starts = [
        json.loads(line)["step"]
        for line in (folder / "learner" / "runs" / "long" / "progress.jsonl").read_text().splitlines()
        if '"started"' in line
    ]
    assert starts[0] == 0 < starts[1]
    client.stop_run("long")
    follow(client, until=is_finished)
    assert client.status().step < 1_000_000
    assert Path(client.status().checkpoint_path).name >= f"step-{starts[1]:09d}"


def test_sigterm_ends_everything_within_five_seconds_and_a_run_keeps_its_checkpoint(client, lab, folder):
    """Last: it ends the module's learner."""
    learner, _ = lab
    client.start_run(definition("ended", max_steps=1_000_000))
    follow(client, until=lambda response: response.HasField("published"))
    processes = learner.descendants()
    assert len(processes) > 3
    assert learner.stop() < 8.0
    assert learner.process.returncode == 0, learner.log.read_text()
    assert learner_lab.wait_gone(processes, 5.0) == []
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline and list(Path("/tmp").glob(f"mh-ray-{learner.process.pid}-*")):
        time.sleep(0.05)
    assert list(Path("/tmp").glob(f"mh-ray-{learner.process.pid}-*")) == []
    names = [path.name for path in (folder / "learner" / "runs" / "ended" / "checkpoints").iterdir()]
    assert any(name.startswith("step-") for name in names)
