"""kill -9 of the learner under a run, and a weights service that is away while it trains."""

from __future__ import annotations

import json

import pytest

from manyhands.clients.learner import LearnerClient
from manyhands.clients.weights import WeightsClient
from manyhands.learner.v1 import learner_pb2
from tests.support import learner_lab
from tests.support.learner_lab import DATASET

pytestmark = pytest.mark.timeout(240)


def definition(run_id, **changes):
    values = {"recipe": "flow_smoke", "dataset": DATASET, "model": "smoke", "seed": 5}
    return learner_pb2.RunDefinition(run_id=run_id, **{**values, **changes})


def test_a_killed_learner_resumes_its_run_and_a_missing_weights_service_costs_no_step(tmp_path):
    store = learner_lab.start_store(tmp_path)
    # Takes a port and goes away again: the run starts with nobody there to publish to.
    weights = learner_lab.start_weights(tmp_path).wait_ready()
    weights.stop()
    learner = learner_lab.start_learner(tmp_path, store.address, weights.address).wait_ready()
    processes = [store, weights, learner]
    try:
        with LearnerClient(learner.address) as client:
            client.start_run(definition("r", max_steps=100_000))
            for response in client.watch():
                assert response.status.state != learner_pb2.RUN_STATE_FAILED, response.status.detail
                if response.step >= 200 and response.status.checkpoint_path:
                    assert "weights service" in response.status.detail
                    break
        ray = learner.descendants()
        assert len(ray) > 3
        learner.kill()

        weights = learner_lab.start_weights(tmp_path, weights.address).wait_ready()
        learner = learner_lab.start_learner(tmp_path, store.address, weights.address).wait_ready()
        processes += [weights, learner]
        with LearnerClient(learner.address) as client:
            assert client.status().state == learner_pb2.RUN_STATE_IDLE
            client.start_run(definition("r", max_steps=100_000))
            for response in client.watch():
                assert response.status.state != learner_pb2.RUN_STATE_FAILED, response.status.detail
                if response.HasField("published"):
                    break
            client.stop_run("r")
            for response in client.watch():
                if response.status.state == learner_pb2.RUN_STATE_FINISHED:
                    break
        lines = (tmp_path / "learner" / "runs" / "r" / "progress.jsonl").read_text().splitlines()
        starts = [json.loads(line)["step"] for line in lines if '"started"' in line]
        assert starts[0] == 0 < starts[1]
        with WeightsClient(weights.address) as reader:
            assert reader.list_versions("smoke")[-1].version.number >= 1
        # Its raylet and workers went at once; Ray's agents look for their parent now and then.
        assert learner_lab.wait_gone(ray, 60.0) == [], "what the killed learner had started is gone"
    finally:
        for process in processes:
            process.stop()
