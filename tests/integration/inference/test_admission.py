"""What text takes of the device counts: intervals grow with questions and shrink again, and nobody is let in beyond it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from manyhands.clients.act_stream import ActStream, Chunk, SubtaskAnswer
from manyhands.clients.inference import InferenceClient, Session
from manyhands.errors import InvalidInput, Overloaded
from manyhands.inference.v1 import inference_pb2
from services.inference.capacity import DeviceCapacity
from services.inference.engine_port import Question, TextEnd
from tests.support.inference_lab import (
    HORIZON,
    InProcessService,
    TalkingPolicy,
    ask,
    make_observation,
    make_policy,
    next_chunk,
    next_reply,
    open_session,
)
from tests.support.waiting import wait_until

# Two robots that replan every 4 of 20 steps a second fit exactly.
DEVICE = DeviceCapacity(chunks_per_s=12.5, question_s=0.6, text_step_s=0.02, max_texts=4)
ASKED_STEPS = 4


class Clock:
    """Goes on when the test says so, from where the engine's is: what fades, fades by just as much."""

    def __init__(self) -> None:
        self.now_s = time.monotonic()

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(clock: Clock) -> Iterator[InProcessService]:
    with InProcessService(make_policy(policy_class=TalkingPolicy), clock=clock) as service:
        service.engine.capacity = lambda model: DEVICE  # type: ignore[method-assign]
        yield service


@pytest.fixture
def session(client: InferenceClient) -> Session:
    return open_session(client, "left")


@pytest.fixture
def stream(client: InferenceClient, session: Session) -> Iterator[ActStream]:
    with client.act_stream(session.session_id) as stream:
        yield stream


def generate(client: InferenceClient, session: Session, stream: ActStream) -> None:
    kind = inference_pb2.TEXT_KIND_VISUAL_QUESTION
    list(client.generate(session.session_id, kind=kind, observation=make_observation(1), task="reach", user_text="what now"))


def ask_for_subtask(client: InferenceClient, session: Session, stream: ActStream) -> None:
    ask(stream, 1, ask_subtask_for="tidy up")
    kinds = {type(next_reply(stream).result) for _ in range(2)}
    assert kinds == {Chunk, SubtaskAnswer}


def interval_steps(stream: ActStream) -> int:
    ask(stream, 2)
    return next_chunk(stream).replan_interval_steps


def load(client: InferenceClient) -> inference_pb2.ModelLoad:
    return client.status().loads[0]


# TalkingPolicy's words: "visual_question reach what now" and "subtask tidy up".
@pytest.mark.parametrize(("question", "num_tokens", "longer_steps"), [(generate, 4, 6), (ask_for_subtask, 3, 5)])
def test_intervals_grow_with_questions_and_shrink_when_they_stop(
    client: InferenceClient,
    session: Session,
    stream: ActStream,
    clock: Clock,
    question: Callable[[InferenceClient, Session, ActStream], None],
    num_tokens: int,
    longer_steps: int,
) -> None:
    with client.act_stream(open_session(client, "right").session_id):
        assert session.replan_interval_steps == interval_steps(stream) == ASKED_STEPS
        assert load(client).text_share == 0.0
        for _ in range(3):  # 0.3 a second, as the fading count has it.
            question(client, session, stream)
        busy = load(client)
        # Their prefixes, and a step for every token: what one robot asks, one question after the other, shares none.
        assert busy.text_share == pytest.approx(0.3 * (0.6 + num_tokens * 0.02))
        assert busy.usable_chunks_per_s == pytest.approx(10.0 * (1 - busy.text_share))
        # 10 chunks a second were asked for, and 8 are left.
        wait_until(lambda: interval_steps(stream) == longer_steps, 5, "a longer interval")
        clock.now_s += 15.0
        assert load(client).text_share == pytest.approx(busy.text_share * 0.22, rel=0.05)
        clock.now_s += 60.0
        wait_until(lambda: interval_steps(stream) == ASKED_STEPS, 5, "the interval that was asked for")
        assert load(client).text_share == 0.0


def test_questions_that_the_engine_refuses_cost_nobody_anything(
    service: InProcessService, client: InferenceClient, session: Session, stream: ActStream
) -> None:
    def refuse(question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
        heard(TextEnd(error=InvalidInput("is 4096; ask for fewer", field="max_new_tokens")))
        return lambda: None

    service.engine.ask = refuse  # type: ignore[method-assign]
    for number in range(12):
        with pytest.raises(InvalidInput):
            generate(client, session, stream)
        ask(stream, 1 + number, ask_subtask_for="tidy up")
        assert {type(next_reply(stream).result) for _ in range(2)} == {Chunk, SubtaskAnswer}
    assert load(client).text_share == 0.0


def test_a_robot_is_refused_with_a_reason_and_a_time_while_text_leaves_no_room(
    client: InferenceClient, session: Session, stream: ActStream, clock: Clock
) -> None:
    with contextlib.ExitStack() as stack:
        for robot in (session, open_session(client, "front"), open_session(client, "back")):
            theirs = stream if robot is session else stack.enter_context(client.act_stream(robot.session_id))
            for _ in range(4):
                generate(client, robot, theirs)
        with pytest.raises(
            Overloaded, match=r"3 robots use .* 12\.5 chunks/s of which text takes 74%.*ask fewer"
        ) as refused:
            open_session(client, "right")
        assert refused.value.field == "model"
        assert refused.value.retry_after_s == pytest.approx(4.0)
    assert interval_steps(stream) <= HORIZON, "whoever is in is served on"
    clock.now_s += 60.0
    # A newcomer's own questions are not known, and not held against it. Four robots want twice what there is.
    assert open_session(client, "right").replan_interval_steps == 2 * ASKED_STEPS


def test_one_robot_that_asks_without_a_pause_keeps_no_other_out(
    client: InferenceClient, session: Session, stream: ActStream
) -> None:
    for _ in range(13):
        generate(client, session, stream)
    assert load(client).text_share == pytest.approx(0.25)
    with client.act_stream(open_session(client, "right").session_id):
        # 10 chunks a second are asked for, three quarters of 10 are left.
        wait_until(lambda: interval_steps(stream) == ASKED_STEPS + 2, 5, "a longer interval")


def test_without_figures_of_text_its_share_is_not_counted(
    service: InProcessService, client: InferenceClient, session: Session, stream: ActStream
) -> None:
    service.engine.capacity = lambda model: DeviceCapacity(chunks_per_s=12.5)  # type: ignore[method-assign]
    for _ in range(12):
        generate(client, session, stream)
    assert load(client).text_share == 0.0
    assert load(client).usable_chunks_per_s == pytest.approx(10.0)
    assert open_session(client, "right").replan_interval_steps == ASKED_STEPS


def test_models_share_the_device(clock: Clock) -> None:
    """A chunk of the slow model costs two and a half of the fast one: 5 and 12.5 a second, four fifths promised."""
    capacities = {"fast": DEVICE, "slow": DeviceCapacity(chunks_per_s=5.0, question_s=0.6, text_step_s=0.02, max_texts=4)}
    policy = make_policy(policy_class=TalkingPolicy)
    with (
        InProcessService(policy, names=("fast", "slow"), clock=clock) as service,
        InferenceClient(service.address) as client,
    ):
        service.engine.capacity = lambda model: capacities[model]  # type: ignore[method-assign]
        slow = open_session(client, "slow", model="slow")
        # 12.5 and 5 chunks of the fast model are asked for, where 10 are promised.
        fast = open_session(client, "fast", model="fast")
        assert fast.replan_interval_steps == 7
        # With nothing but whole chunks executed it is 6.25, 2.5 and 2.5: alone with one of its own kind it would fit.
        with pytest.raises(Overloaded, match=r"2 robots use"):
            open_session(client, "fast too", model="fast")
        # What one model's text takes, the other one lacks.
        with client.act_stream(fast.session_id) as stream:
            before = interval_steps(stream)
            for _ in range(8):
                generate(client, slow, stream)
            client.status()
            wait_until(lambda: interval_steps(stream) > before, 5, "a longer interval")


def test_a_robot_that_waits_for_its_chunks_executes_less_of_them(
    service: InProcessService, client: InferenceClient, session: Session, stream: ActStream
) -> None:
    """Nobody is asked for an interval that outlasts the chunk, and what cannot be stretched so far is not promised."""
    service.engine.capacity = lambda model: DeviceCapacity(chunks_per_s=6.25)  # type: ignore[method-assign]
    right = open_session(client, "right")
    # 10 chunks a second are asked for, 5 promised.
    assert right.replan_interval_steps == interval_steps(stream) == HORIZON
    client.close_session(right.session_id)
    prefix = next_model_actions(stream)
    ask(stream, 4, committed_prefix=prefix, delay_steps=3, execution_horizon=HORIZON)
    next_chunk(stream)
    # Of 8 actions 5 are left: 4 chunks a second of this robot, and 2.5 of another one.
    with pytest.raises(Overloaded, match="1 robots use"):
        open_session(client, "right")
    service.engine.capacity = lambda model: DeviceCapacity(chunks_per_s=1.0)  # type: ignore[method-assign]
    assert interval_steps(stream) == HORIZON - 3


def next_model_actions(stream: ActStream) -> np.ndarray:
    ask(stream, 3)
    return next_chunk(stream).model_actions
