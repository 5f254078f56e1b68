"""The Prometheus page of a real `manyhands serve`: what is on it, that it moves, and that robots cannot make it grow."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from deploy.local import Service, Topology
from manyhands.clients.act_stream import Chunk, SubtaskAnswer
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import ManyhandsError, Refused
from manyhands.inference.v1 import inference_pb2
from policies import checkpoint
from services.inference.engine_process import LOAD_PERIOD_S
from tests.support import prompted_lab
from tests.support.inference_lab import (
    ENVIRONMENT,
    RAW,
    ask,
    make_observation,
    make_policy,
    next_chunk,
    next_refusal,
    next_reply,
    open_session,
)
from tests.support.ports import free_port
from tests.support.waiting import wait_until
from tests.support.weights_lab import publish, start_weights

STAGES = {"decode", "queue", "prefix", "sample", "postprocess", "total"}
# Name as it is scraped, without _total of counters: type and labels.
FAMILIES = {
    "manyhands_inference_stage_seconds": ("histogram", {"model", "stage"}),
    "manyhands_inference_chunks": ("counter", {"model"}),
    "manyhands_inference_batch_size": ("histogram", {"model"}),
    "manyhands_inference_missed_deadlines": ("counter", {"model"}),
    "manyhands_inference_refusals": ("counter", {"model", "reason"}),
    "manyhands_inference_text_questions": ("counter", {"model", "kind", "outcome"}),
    "manyhands_inference_subtasks_refused": ("counter", {"model"}),
    "manyhands_inference_text_tokens": ("counter", {"model"}),
    "manyhands_inference_text_first_token_seconds": ("histogram", {"model"}),
    "manyhands_inference_sessions": ("gauge", {"model"}),
    "manyhands_inference_requests_in_flight": ("gauge", set()),
    "manyhands_inference_queue_length": ("gauge", set()),
    "manyhands_inference_served_version": ("gauge", {"model"}),
    "manyhands_inference_possible_chunks_per_second": ("gauge", {"model"}),
    "manyhands_inference_text_share": ("gauge", {"model"}),
    "manyhands_inference_asked_chunks_per_second": ("gauge", {"model"}),
    "manyhands_inference_swaps": ("counter", {"model", "outcome"}),
    "manyhands_inference_swap_pause_seconds": ("histogram", {"model"}),
    "manyhands_inference_engine_restarts": ("counter", set()),
    "manyhands_engine_deaths": ("counter", set()),
}
# On a device with memory of its own; without one they have no sample.
MEMORY = {"manyhands_inference_device_memory_used_bytes", "manyhands_inference_device_memory_bytes"}
# Of models that run in units; whole passes have no sample.
DEVICE_USE = {
    "manyhands_inference_device_seconds": {"model", "kind"},
    "manyhands_inference_device_units": {"model", "kind"},
    "manyhands_inference_device_rows": {"model", "kind"},
    "manyhands_inference_device_gap_seconds": {"device"},
}


@dataclass(kw_only=True)
class Page:
    metrics_url: str

    def families(self) -> dict[str, Metric]:
        with urllib.request.urlopen(self.metrics_url, timeout=5) as response:
            return {family.name: family for family in text_string_to_metric_families(response.read().decode())}

    def value(self, sample: str, **labels: str) -> float:
        """Of one series; 0 where it is not there."""
        for family in self.families().values():
            for one in family.samples:
                if one.name == sample and one.labels == labels:
                    return one.value
        return 0.0


@dataclass(kw_only=True)
class Served(Page):
    service: Service
    learner: WeightsClient


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A small policy "tiny", a tiny pi052 "talks", and a weights service."""
    folder, port = tmp_path_factory.mktemp("served"), free_port()
    checkpoint.save(make_policy(0), folder / "tiny")
    checkpoint.save(prompted_lab.policy("pi052"), folder / "talks")
    with Topology(folder / "logs", environment=ENVIRONMENT) as topology:
        weights = start_weights(topology, folder)
        models = [f"--model=tiny={folder / 'tiny'}", f"--model=talks={folder / 'talks'}"]
        command = ["serve", *models, "--address", "127.0.0.1:0", "--weights", weights, "--metrics-port", str(port)]
        service = topology.start("serve", command)
        with WeightsClient(weights) as learner:
            yield Served(service=service, metrics_url=f"http://127.0.0.1:{port}/metrics", learner=learner)


@pytest.fixture
def client(served: Served) -> Iterator[InferenceClient]:
    with InferenceClient(served.service.address) as client:
        yield client


def test_names_types_and_labels_are_those_that_are_promised(served: Served) -> None:
    families = {name: family for name, family in served.families().items() if "_inference_" in name or "_engine_" in name}
    families = {name: family for name, family in families.items() if not name.endswith("_created")}
    assert families.keys() == FAMILIES.keys() | MEMORY | DEVICE_USE.keys()
    for name, (kind, labels) in FAMILIES.items():
        assert families[name].type == kind, name
        assert families[name].documentation
        samples = families[name].samples
        assert samples, f"{name} is there before anything happened"
        for sample in samples:
            assert sample.labels.keys() - {"le"} == labels, name
    assert all(families[name].samples == [] for name in MEMORY), "a CPU has no memory of its own"
    assert all(families[name].samples == [] for name in DEVICE_USE), "nothing runs in units"
    stages = {sample.labels["stage"] for sample in families["manyhands_inference_stage_seconds"].samples}
    assert stages == STAGES
    page = served.families()
    assert "manyhands_rpc_seconds" in page, "what every process has"


def test_chunks_sessions_and_refusals_move_it(served: Served, client: InferenceClient) -> None:
    def stage_count(stage: str) -> float:
        return served.value("manyhands_inference_stage_seconds_count", model="tiny", stage=stage)

    before = {stage: stage_count(stage) for stage in STAGES}
    session = open_session(client, "left")
    with client.act_stream(session.session_id) as stream:
        for seed in range(5):
            ask(stream, seed)
            next_chunk(stream)
        bad = make_observation(9)
        bad["observation.state"] = np.full_like(bad["observation.state"], np.nan)
        for _ in range(3):
            ask(stream, 9, observation=bad)
            assert next_refusal(stream).reason == "invalid"
        ask(stream, 10, deadline_s=1e-4)
        late = next_reply(stream)
        assert late.result.reason == "deadline"  # type: ignore[union-attr]
        wait_until(lambda: served.value("manyhands_inference_sessions", model="tiny") == 1, 5, "a session")
        assert served.value("manyhands_inference_asked_chunks_per_second", model="tiny") == pytest.approx(20 / 4)
        wait_until(lambda: served.value("manyhands_inference_possible_chunks_per_second", model="tiny") > 0, 5, "capacity")
    assert {stage: stage_count(stage) - count for stage, count in before.items()} == dict.fromkeys(STAGES, 5.0)
    assert served.value("manyhands_inference_stage_seconds_sum", model="tiny", stage="total") > 0
    assert served.value("manyhands_inference_chunks_total", model="tiny") >= 5
    assert served.value("manyhands_inference_batch_size_count", model="tiny") >= 5
    assert served.value("manyhands_inference_batch_size_bucket", model="tiny", le="1.0") >= 5, "one robot: batches of one"
    assert served.value("manyhands_inference_refusals_total", model="tiny", reason="invalid") == 3
    assert served.value("manyhands_inference_refusals_total", model="tiny", reason="deadline") == 1
    assert served.value("manyhands_inference_missed_deadlines_total", model="tiny") == 1
    status = next(one for one in client.status().sessions if one.robot_id == "left")
    assert [(one.reason, one.count) for one in status.refusals] == [
        (inference_pb2.REFUSAL_REASON_INVALID, 3),
        (inference_pb2.REFUSAL_REASON_DEADLINE, 1),
    ]
    assert "must be finite" in status.refusals[0].message or "not finite" in status.refusals[0].message
    log = served.service.log_path.read_text()
    assert log.count("of left is refused: observation.state") == 1, "once for the burst"
    client.close_session(session.session_id)
    wait_until(lambda: served.value("manyhands_inference_sessions", model="tiny") == 0, 5, "no session")
    wait_until(lambda: served.value("manyhands_inference_requests_in_flight") == 0, 5, "nothing in flight")


def test_text_moves_it(served: Served, client: InferenceClient) -> None:
    session = client.open_session(
        robot_id="reader", client_id="reader-1", model="talks", spec=prompted_lab.SPEC, replan_interval_steps=3
    )
    observation = dict(prompted_lab.sample().observation)

    def generate(**options: object) -> list[inference_pb2.GenerateResponse]:
        return list(
            client.generate(
                session.session_id,
                kind=inference_pb2.TEXT_KIND_SUBTASK,
                observation=observation,
                task="tidy up",
                **options,  # type: ignore[arg-type]
            )
        )

    answers = generate(max_new_tokens=5)
    assert answers[-1].finished
    with pytest.raises(ManyhandsError):
        generate(temperature=99.0)

    def questions(outcome: str) -> float:
        return served.value("manyhands_inference_text_questions_total", model="talks", kind="subtask", outcome=outcome)

    assert (questions("whole"), questions("refused"), questions("left")) == (1, 1, 0)
    assert served.value("manyhands_inference_text_tokens_total", model="talks") == answers[-1].token_count
    assert served.value("manyhands_inference_text_first_token_seconds_count", model="talks") == min(
        1, answers[-1].token_count
    )


def test_swaps_and_the_served_version_move_it(served: Served, client: InferenceClient) -> None:
    def swaps(outcome: str) -> float:
        return served.value("manyhands_inference_swaps_total", model="tiny", outcome=outcome)

    good = publish(served.learner, make_policy(1), step=1)
    name = next(iter(make_policy(1).state_dict()))
    bad = publish(
        served.learner, make_policy(1), step=2, **{name: torch.full_like(make_policy(1).state_dict()[name], np.nan)}
    )
    client.swap_weights("tiny", good.number)
    assert swaps("accepted") == 1
    assert served.value("manyhands_inference_swap_pause_seconds_count", model="tiny") == 1
    with pytest.raises(Refused):
        client.swap_weights("tiny", bad.number)
    assert (swaps("accepted"), swaps("refused")) == (1, 1)
    wait_until(
        lambda: served.value("manyhands_inference_served_version", model="tiny") == good.number, 5, "the version is shown"
    )
    assert served.value("manyhands_inference_served_version", model="talks") == 0


def test_robots_cannot_make_the_page_grow(served: Served, client: InferenceClient) -> None:
    """A hundred names, tasks and broken requests later it has the series that it had."""

    def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {
            (sample.name, tuple(sorted(sample.labels.items())))
            for family in served.families().values()
            for sample in family.samples
        }

    session = open_session(client, "first")
    with client.act_stream(session.session_id) as stream:
        ask(stream, 1)
        next_chunk(stream)
    with client.act_stream("no such session") as stream:
        ask(stream, 1)
        next_refusal(stream)
    client.close_session(session.session_id)
    before = series()
    for number in range(30):
        hostile = f"robot-{number}-evil"
        session = open_session(client, hostile, client_id=f"client-{number}-evil")
        with client.act_stream(session.session_id) as stream:
            ask(stream, number, task=f"task-{number}-evil")
            assert isinstance(next_reply(stream).result, Chunk)
            ask(stream, number, observation={f"observation.{hostile}": np.zeros(3, np.float32)})
            next_refusal(stream)
        client.close_session(session.session_id)
        with pytest.raises(ManyhandsError):
            client.open_session(
                robot_id=hostile,
                client_id=hostile,
                model=f"model-{number}-evil",
                spec=prompted_lab.SPEC,
                replan_interval_steps=1,
            )
    after = series()
    assert not [one for one in after if "evil" in str(one)]
    # Status codes of methods are the only labels that a caller brings about, and they are a closed list.
    assert {one for one in after - before if "manyhands_rpc" not in one[0]} == set()
    assert len(after - before) < 10


def test_an_engine_that_is_started_again_is_counted(served: Served, client: InferenceClient) -> None:
    (engine,) = (
        child
        for child in psutil.Process(served.service.process.pid).children()
        if "services.inference.engine_process" in child.cmdline()
    )
    os.kill(engine.pid, signal.SIGKILL)
    wait_until(lambda: served.value("manyhands_engine_deaths_total") == 1, 10, "a death")
    wait_until(lambda: served.value("manyhands_inference_engine_restarts_total") == 1, 60, "a restart")
    assert client.status().engine_restart_count == 1


def test_units_show_what_the_device_did(tmp_path: Path) -> None:
    policy, port = prompted_lab.policy("pi052"), free_port()
    checkpoint.save(policy, tmp_path / "talks")
    page, num_chunks = Page(metrics_url=f"http://127.0.0.1:{port}/metrics"), 3

    def shown(kind: str) -> tuple[float, ...]:
        return tuple(
            page.value(f"manyhands_inference_device_{name}_total", model="talks", kind=kind)
            for name in ("units", "rows", "seconds")
        )

    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        command = ["serve", f"--model=talks={tmp_path / 'talks'}", "--path", "fused", "--address", "127.0.0.1:0"]
        service = topology.start("serve", [*command, "--metrics-port", str(port)])
        families = page.families()
        for name, labels in DEVICE_USE.items():
            assert families[name].type == "counter"
            assert families[name].documentation
            samples = [sample for sample in families[name].samples if not sample.name.endswith("_created")]
            assert [sample.value for sample in samples] == [0] * (1 if "device" in labels else 5), "there from the start"
            assert all(sample.labels.keys() == labels for sample in samples)
        with InferenceClient(service.address) as client:
            session = client.open_session(
                robot_id="left", client_id="left-1", model="talks", spec=prompted_lab.SPEC, replan_interval_steps=3
            )
            given = prompted_lab.sample(subtask="")
            with client.act_stream(session.session_id) as stream:
                for seed in range(num_chunks):
                    stream.send(
                        observation=given.observation,
                        task=given.task,
                        noise_seed=seed,
                        image_encoding=RAW,
                        deadline_s=20.0,
                    )
                    assert isinstance(next_reply(stream).result, Chunk)
            num_steps = num_chunks * policy.config.num_steps
            wait_until(lambda: shown("expert")[:2] == (num_steps, num_steps), 5, "Euler steps")
        assert shown("prefix")[:2] == (num_chunks, num_chunks)
        assert shown("text")[:2] == (0, 0)
        assert 0 < shown("expert")[2] < 20
        assert 0 < shown("prefix")[2] < 20
        assert page.value("manyhands_inference_device_gap_seconds_total", device="cpu") == 0, "nothing runs ahead on a CPU"


def test_a_question_about_what_its_robot_acts_on_takes_fewer_units(tmp_path: Path) -> None:
    """Asked by itself, and with the request for a chunk; not one about anything else, nor another robot's."""
    port = free_port()
    checkpoint.save(prompted_lab.policy("pi052"), tmp_path / "talks")
    page = Page(metrics_url=f"http://127.0.0.1:{port}/metrics")

    def units() -> float:
        return page.value("manyhands_inference_device_units_total", model="talks", kind="text_prefix")

    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        command = ["serve", f"--model=talks={tmp_path / 'talks'}", "--path", "fused", "--address", "127.0.0.1:0"]
        service = topology.start("serve", [*command, "--metrics-port", str(port)])
        with InferenceClient(service.address) as client:
            given = prompted_lab.sample(subtask="")

            def opened(name: str) -> str:
                return client.open_session(
                    robot_id=name, client_id=name, model="talks", spec=prompted_lab.SPEC, replan_interval_steps=3
                ).session_id

            left = opened("left")

            def taken(ask: Callable[[], None]) -> float:
                before = units()
                ask()
                # The page is as old as the engine's last word, which comes every second while something changes.
                wait_until(lambda: units() > before, 10, "slices of a prefix")
                time.sleep(2 * LOAD_PERIOD_S)
                return units() - before

            def question(session: str, shade: int) -> None:
                pictures = {name: np.full_like(value, shade) if value.ndim == 3 else value for name, value in seen.items()}
                [*_] = client.generate(
                    session, kind=inference_pb2.TEXT_KIND_SUBTASK, observation=pictures, task=given.task, max_new_tokens=2
                )

            # JPEG keeps a picture of one shade as it is.
            seen = {name: np.full_like(value, 60) if value.ndim == 3 else value for name, value in given.observation.items()}
            with client.act_stream(left) as stream:

                def chunk(**asking: str) -> None:
                    stream.send(observation=seen, task=given.task, noise_seed=0, deadline_s=20.0, **asking)
                    while not isinstance(next_reply(stream).result, SubtaskAnswer if asking else Chunk):
                        pass

                chunk()
                whole = taken(lambda: question(left, 90))
                right = opened("right")  # Now: one without a stream lasts for seconds only.
                assert taken(lambda: question(right, 60)) == whole
                less = taken(lambda: question(left, 60))
                assert 0 < less < whole
                assert taken(lambda: chunk(ask_subtask_for="tidy up")) == less
