"""Text from a model with a text head, token by token, and a clear no from one without."""

from __future__ import annotations

import numpy as np
import pytest

from manyhands.clients.inference import InferenceClient
from manyhands.errors import InvalidInput, Refused
from manyhands.inference.v1 import inference_pb2
from tests.support.inference_lab import (
    STATE_SIZE,
    InProcessService,
    TalkingPolicy,
    make_observation,
    make_policy,
    open_session,
)


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
