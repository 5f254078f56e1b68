"""Text from a model with a text head, token by token, and a clear no from one without."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from manyhands.clients.inference import InferenceClient, Session
from manyhands.errors import AlreadyExists, InvalidInput, NotFound, Refused
from manyhands.inference.v1 import inference_pb2
from tests.support.inference_lab import (
    STATE_SIZE,
    InProcessService,
    MutteringPolicy,
    TalkingPolicy,
    make_observation,
    make_policy,
    open_session,
)
from tests.support.waiting import wait_until

IDLE_TIMEOUT_S = 1.5


def test_a_model_without_a_text_head_says_so(client: InferenceClient) -> None:
    session = open_session(client, "left")
    with pytest.raises(Refused, match="no text head"):
        list(
            client.generate(
                session.session_id,
                kind=inference_pb2.TEXT_KIND_SUBTASK,
                observation=make_observation(1),
                task="make coffee",
            )
        )


def test_text_comes_token_by_token() -> None:
    with (
        InProcessService(make_policy(policy_class=TalkingPolicy)) as service,
        InferenceClient(service.address) as client,
    ):
        session = open_session(client, "left")
        assert session.has_text_head
        answers = list(
            client.generate(
                session.session_id,
                kind=inference_pb2.TEXT_KIND_VISUAL_QUESTION,
                observation=make_observation(1),
                task="make coffee",
                user_text="what do you see",
                request_id="q1",
            )
        )
        assert [answer.text for answer in answers[:3]] == ["visual_question ", "make ", "coffee "]
        assert [answer.token_count for answer in answers] == [1, 2, 3, 4, 5, 6, 7, 7]
        assert answers[-1].finished
        assert answers[-1].full_text == "visual_question make coffee what do you see "
        assert {answer.request_id for answer in answers} == {"q1"}
        spoiled = make_observation(1)
        spoiled["observation.state"] = np.full(STATE_SIZE, np.inf, dtype=np.float32)
        with pytest.raises(InvalidInput) as refused:
            list(
                client.generate(
                    session.session_id, kind=inference_pb2.TEXT_KIND_SUBTASK, observation=spoiled, task="make coffee"
                )
            )
        assert refused.value.field == "observation.state"
        with pytest.raises(InvalidInput):
            list(
                client.generate(
                    session.session_id, kind=inference_pb2.TEXT_KIND_SUBTASK, observation=spoiled, task="make coffee"
                )
            )
        [record] = client.status().sessions[0].refusals
        assert (record.reason, record.count, record.field) == (inference_pb2.REFUSAL_REASON_INVALID, 2, "observation.state")
        assert record.message.startswith("a question: ")


@pytest.fixture
def thinking() -> Iterator[tuple[MutteringPolicy, InProcessService]]:
    """A service whose sessions do not outlive a short silence, and a text head that waits for its gate."""
    policy = make_policy(policy_class=MutteringPolicy)
    assert isinstance(policy, MutteringPolicy)
    policy.gate.clear()
    with InProcessService(policy, idle_timeout_s=IDLE_TIMEOUT_S) as service:
        yield policy, service
        policy.gate.set()


class Questioner(threading.Thread):
    """Asks one question; what it heard is there when it has ended."""

    def __init__(self, client: InferenceClient, session: Session) -> None:
        super().__init__(daemon=True)
        self._client, self._session = client, session
        self.text = ""
        self.error: Exception | None = None

    def run(self) -> None:
        answers = self._client.generate(
            self._session.session_id,
            kind=inference_pb2.TEXT_KIND_MEMORY,
            observation=make_observation(1),
            task="make coffee",
        )
        try:
            self.text = list(answers)[-1].full_text
        except Exception as error:
            self.error = error


@pytest.mark.parametrize("how", ["opened anew", "closed"])
def test_a_session_that_ends_takes_its_questions_with_it(
    how: str, thinking: tuple[MutteringPolicy, InProcessService]
) -> None:
    """Else a client would have eight at once again with each session that it opens."""
    policy, service = thinking
    policy.answers = ["one", "two"]
    with InferenceClient(service.address) as client:
        session = open_session(client, "left", client_id="actor")
        asked = [Questioner(client, session) for _ in range(2)]
        for one in asked:
            one.start()
        wait_until(lambda: policy.asked)  # The other one waits behind it.
        if how == "closed":
            client.close_session(session.session_id)
        else:
            open_session(client, "left", client_id="actor")
        for one in asked:
            one.join(5.0)
            assert isinstance(one.error, NotFound), one.error
        policy.gate.set()
        wait_until(lambda: policy.num_stopped == len(policy.asked))


def test_a_question_that_is_thought_about_keeps_its_session(thinking: tuple[MutteringPolicy, InProcessService]) -> None:
    policy, service = thinking
    policy.answers = ["one"]
    with InferenceClient(service.address) as client:
        session = open_session(client, "left")
        asked = Questioner(client, session)
        asked.start()
        time.sleep(2 * IDLE_TIMEOUT_S)
        assert [one.robot_id for one in client.status().sessions] == ["left"]
        with pytest.raises(AlreadyExists, match="whose question is being answered") as refused:
            open_session(client, "left")
        assert refused.value.retry_after_s == IDLE_TIMEOUT_S
        policy.gate.set()
        asked.join(5.0)
        assert (asked.text, asked.error) == ("one ", None)
        wait_until(lambda: not client.status().sessions)
