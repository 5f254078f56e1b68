"""Subtasks on the Act stream: asked beside a chunk, judged by the service, counted, and waited for by nobody."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY

from deploy.local import Topology
from manyhands.clients.act_stream import ActStream, Chunk, Refusal, Reply, SubtaskAnswer
from manyhands.clients.inference import InferenceClient
from manyhands.inference.v1 import inference_pb2
from manyhands.subtasks import Subtask
from policies import checkpoint
from policies.policy import TextKind, TextRequest
from services.inference import subtask_question
from tests.support import prompted_lab
from tests.support.inference_lab import (
    ENVIRONMENT,
    RAW,
    InProcessService,
    MutteringPolicy,
    ask,
    local_chunk,
    make_observation,
    make_policy,
    next_chunk,
    next_reply,
    open_session,
)
from tests.support.prompted_lab import CPU, sample
from tests.support.proxy import CuttableLink
from tests.support.waiting import wait_until


class Arm:
    """A robot that carries its subtask, as an actor does."""

    def __init__(self, stream: ActStream, task: str = "tidy up") -> None:
        self.stream = stream
        self.task = task
        self.subtask = Subtask()

    def ask(self, seed: int, *, for_subtask: bool = True) -> int:
        return ask(self.stream, seed, task=self.subtask.text or self.task, ask_subtask_for=self.task if for_subtask else "")

    def replies(self) -> tuple[Chunk, SubtaskAnswer]:
        """To a request that asked: both, in whatever order."""
        both = [next_reply(self.stream), next_reply(self.stream)]
        assert len({reply.request_id for reply in both}) == 1
        [chunk] = [reply.result for reply in both if isinstance(reply.result, Chunk)]
        [answer] = [reply.result for reply in both if isinstance(reply.result, SubtaskAnswer)]
        self.subtask = self.subtask.answered(answer.text)
        return chunk, answer


@pytest.fixture
def policy() -> MutteringPolicy:
    made = make_policy(policy_class=MutteringPolicy)
    assert isinstance(made, MutteringPolicy)
    return made


@pytest.fixture
def service(policy: MutteringPolicy) -> Iterator[InProcessService]:
    with InProcessService(policy) as service:
        yield service
        policy.gate.set()


@pytest.fixture
def client(service: InProcessService) -> Iterator[InferenceClient]:
    with InferenceClient(service.address) as client:
        yield client


@pytest.fixture
def arm(client: InferenceClient) -> Iterator[Arm]:
    with client.act_stream(open_session(client, "left").session_id) as stream:
        yield Arm(stream)


def status(client: InferenceClient) -> inference_pb2.SessionStatus:
    return client.status().sessions[0]


def test_the_last_good_subtask_goes_on_acting_through_gibberish(
    policy: MutteringPolicy, client: InferenceClient, arm: Arm
) -> None:
    policy.answers = ["grasp the cup", "the the the the", "...", "lift it"]
    acted, told = [], []
    for seed in range(5):
        arm.ask(seed, for_subtask=seed < 4)
        acted.append(arm.subtask.text)
        if seed < 4:
            chunk, answer = arm.replies()
            told.append((answer.accepted, answer.text, answer.reason))
        else:
            chunk = next_chunk(arm.stream)
        expected = local_chunk(policy, make_observation(seed), seed, task=acted[-1] or "tidy up")
        assert np.array_equal(chunk.actions, expected), "made for the subtask that the request names"
    assert acted == ["", "grasp the cup", "grasp the cup", "grasp the cup", "lift it"]
    assert told == [
        (True, "grasp the cup", ""),
        (False, "", "no instruction: 'the the the the '"),
        (False, "", "no instruction: '... '"),
        (True, "lift it", ""),
    ]
    assert [(given.task, request.kind, request.previous_text) for given, request in policy.asked] == [
        ("tidy up", TextKind.SUBTASK, ""),
        ("tidy up", TextKind.SUBTASK, "grasp the cup"),
        ("tidy up", TextKind.SUBTASK, "grasp the cup"),
        ("tidy up", TextKind.SUBTASK, "grasp the cup"),
    ]
    seen = status(client)
    assert (seen.subtask_count, seen.refused_subtask_count, seen.last_subtask) == (2, 2, "lift it")
    assert (seen.chunk_count, seen.refused_count) == (5, 0)


def test_operators_see_subtasks_as_they_see_other_questions(
    service: InProcessService, policy: MutteringPolicy, client: InferenceClient, arm: Arm
) -> None:
    def counted(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(f"manyhands_inference_{name}", {"model": "tiny", **labels}) or 0.0

    def counts() -> tuple[float, ...]:
        return (
            *(counted("text_questions_total", kind="subtask", outcome=outcome) for outcome in ("whole", "refused", "left")),
            counted("text_tokens_total"),
            counted("text_first_token_seconds_count"),
            counted("subtasks_refused_total"),
        )

    before = counts()
    policy.answers = ["grasp the cup", "the the the the", "raise", "never heard"]
    for seed in range(3):
        arm.ask(seed)
        arm.replies()
    policy.gate.clear()
    arm.ask(3)
    next_chunk(arm.stream)
    arm.stream.close()
    wait_until(lambda: counts()[2] > before[2])
    assert tuple(np.subtract(counts(), before)) == (2, 1, 1, 7, 2, 2)


def test_the_text_head_sees_what_the_chunk_was_asked_from(policy: MutteringPolicy, arm: Arm) -> None:
    policy.answers = ["grasp the cup"]
    arm.ask(7)
    arm.replies()
    seen = policy.asked[0][0].observation
    assert seen.keys() == make_observation(7).keys()
    for name, values in make_observation(7).items():
        assert np.array_equal(seen[name], values)


def test_chunks_flow_while_the_text_head_thinks(
    policy: MutteringPolicy, client: InferenceClient, arm: Arm, caplog: pytest.LogCaptureFixture
) -> None:
    policy.gate.clear()
    policy.answers = ["grasp the cup", "lift it"]
    with caplog.at_level(logging.INFO, logger=subtask_question.__name__):
        first = arm.ask(0)
        next_chunk(arm.stream)
        for seed in range(1, 6):  # Each asks too: one question at a time is enough.
            arm.ask(seed)
            next_chunk(arm.stream)
        wait_until(lambda: policy.asked)
        assert len(policy.asked) == 1
        assert status(client).chunk_count == 6
        policy.gate.set()
        reply = next_reply(arm.stream)
    assert reply.request_id == first
    assert reply.result == SubtaskAnswer(text="grasp the cup", accepted=True, reason="")
    assert reply.round_trip_s is not None
    assert sum("dropped" in record.message for record in caplog.records) == 1
    arm.ask(9)
    assert arm.replies()[1].text == "lift it", "and the next one is asked again"
    assert (status(client).subtask_count, status(client).refused_subtask_count) == (2, 0)


def test_a_text_head_that_fails_costs_no_chunk(policy: MutteringPolicy, client: InferenceClient, arm: Arm) -> None:
    policy.answers = ["raise", "grasp the cup"]
    arm.ask(0)
    _, answer = arm.replies()
    assert (answer.text, answer.accepted) == ("", False)
    assert "the model failed on this question" in answer.reason
    arm.ask(1)
    assert arm.replies()[1].accepted
    assert (status(client).subtask_count, status(client).refused_subtask_count) == (1, 1)


def test_an_answer_that_takes_too_long_is_given_up(
    policy: MutteringPolicy, client: InferenceClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subtask_question, "DEADLINE_S", 0.5)
    monkeypatch.setattr(subtask_question, "GRACE_S", 0.1)
    policy.gate.clear()
    policy.answers = ["grasp the cup", "lift it"]
    with client.act_stream(open_session(client, "left").session_id) as stream:
        arm = Arm(stream)
        arm.ask(0)
        assert arm.replies()[1].reason == "deadline: no subtask came within 0.5 s"
        monkeypatch.undo()
        policy.gate.set()
        arm.ask(1)
        assert arm.replies()[1].text == "lift it", "and the text of the first is never heard of"


def test_a_model_without_a_text_head_says_so_and_makes_chunks() -> None:
    with InProcessService(make_policy()) as service, InferenceClient(service.address) as client:
        session = open_session(client, "left")
        with client.act_stream(session.session_id) as stream:
            arm = Arm(stream)
            for seed in range(2):
                arm.ask(seed)
                assert "'tiny' has no text head" in arm.replies()[1].reason


def test_a_task_of_absurd_length_is_refused_by_name(arm: Arm, policy: MutteringPolicy) -> None:
    ask(arm.stream, 0, ask_subtask_for="x" * 5000)
    refusal = next_reply(arm.stream).result
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.field) == ("invalid", "ask_subtask_for")
    assert policy.asked == []


def test_a_link_that_is_cut_during_a_question_leaves_nothing_behind(
    service: InProcessService, policy: MutteringPolicy
) -> None:
    policy.gate.clear()
    policy.answers = ["grasp the cup", "lift it"]
    with (
        CuttableLink(service.address) as link,
        InferenceClient(link.address) as far,
        InferenceClient(service.address) as near,
    ):
        session = open_session(far, "left")
        old = far.act_stream(session.session_id)
        Arm(old).ask(0)
        next_chunk(old)
        wait_until(lambda: len(policy.asked) == 1)
        link.cut()
        # The same session over another way, as after a cut: what it acts on travels with its requests.
        near._counters[session.session_id] = far._counters[session.session_id]
        with near.act_stream(session.session_id) as stream:
            arm = Arm(stream)
            arm.subtask = Subtask(text="open the drawer")
            arm.ask(1, for_subtask=False)
            next_chunk(stream)
            policy.gate.set()
            wait_until(lambda: policy.num_stopped == 1)
            arm.ask(2)
            _, answer = arm.replies()
            assert answer.text == "lift it"
            assert policy.asked[1][1].previous_text == "open the drawer"
            assert (status(near).subtask_count, status(near).last_subtask) == (1, "lift it")
        link.mend()
        old.close()


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("subtasks") / "pi052"
    checkpoint.save(prompted_lab.policy("pi052", max_new_tokens=8), folder)
    return folder


@pytest.mark.parametrize("path", ["plain", "fused"])
def test_subtasks_of_a_served_pi052_are_its_own_and_chunks_follow_what_the_robot_names(
    checkpoint_folder: Path, tmp_path: Path, path: str
) -> None:
    """A real text head that was never trained: it talks gibberish, and the subtask that the robot has stays in force."""
    policy = prompted_lab.policy("pi052", max_new_tokens=8).eval()
    given = sample(subtask="")
    replies: list[Reply] = []
    with Topology(tmp_path, environment=ENVIRONMENT) as topology:
        words = ["serve", "--model", f"pi052={checkpoint_folder}", "--path", path, "--address", "127.0.0.1:0"]
        with InferenceClient(topology.start("serve", words).address) as client:
            session = client.open_session(
                robot_id="left", client_id="test", model="pi052", spec=prompted_lab.SPEC, replan_interval_steps=2
            )
            with client.act_stream(session.session_id) as stream:
                for task in ("tidy up", "grasp the cup"):
                    stream.send(
                        observation=given.observation,
                        task=task,
                        ask_subtask_for="tidy up",
                        noise_seed=5,
                        image_encoding=RAW,
                        deadline_s=20.0,
                    )
                    replies += [next_reply(stream), next_reply(stream)]
            seen = status(client)
    chunks = [reply.result for reply in replies if isinstance(reply.result, Chunk)]
    answers = [reply for reply in replies if isinstance(reply.result, SubtaskAnswer)]
    with torch.inference_mode():
        for task, chunk in zip(("tidy up", "grasp the cup"), chunks, strict=True):
            inputs = policy.preprocess([replace(given, task=task)], CPU)
            expected = policy.postprocess(policy.act(inputs, policy.draw_noise([5])), inputs)[0]
            np.testing.assert_allclose(chunk.actions, expected, rtol=1e-4, atol=1e-5)
    for previous_text, reply in zip(("", "grasp the cup"), answers, strict=True):
        request = TextRequest(kind=TextKind.SUBTASK, previous_text=previous_text)
        said = "".join(policy.generate([given], request, CPU))
        told = subtask_question.judged(said, None)
        assert reply.result == SubtaskAnswer(text=told.text, accepted=told.accepted, reason=told.reason)
        assert reply.version.model == "pi052"
    assert seen.subtask_count + seen.refused_subtask_count == 2
