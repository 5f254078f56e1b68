"""Rows and chunks through a slot come out as they went in; a slot of anything else is a BadSlot and nothing worse."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manyhands.common.v1 import common_pb2
from manyhands.errors import InternalError, ManyhandsError, TooLate
from manyhands.spec import Feature, FeatureKind, Spec
from services.inference.engine_port import Answer, ModelDescription, Observed, Rehearsal, Row, Superseded
from services.inference.slot_layout import BadSlot, Request, SlotLayout


def model(name: str, *, horizon: int, cameras: int, state_size: int) -> ModelDescription:
    spec = Spec(
        observation=(
            Feature(name="observation.state", kind=FeatureKind.STATE, dtype="float64", shape=(state_size,)),
            *(
                Feature(name=f"observation.images.{index}", kind=FeatureKind.IMAGE, dtype="uint8", shape=(5 + index, 7, 3))
                for index in range(cameras)
            ),
        ),
        action=(
            Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(3,)),
            Feature(name="gripper", kind=FeatureKind.ACTION, dtype="float32", shape=(1,)),
        ),
        control_rate_hz=10.0,
    )
    return ModelDescription(
        name=name,
        type_name="flow",
        spec=spec,
        used_spec=spec,
        horizon=horizon,
        model_action_size=6,
        has_text_head=False,
        masks_missing_cameras=True,
        parameter_count=1,
        version=common_pb2.PolicyVersion(model=name),
    )


MODELS = [model("small", horizon=4, cameras=1, state_size=2), model("big", horizon=9, cameras=3, state_size=5)]
LAYOUT = SlotLayout(MODELS)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    chosen = draw(st.sampled_from(MODELS))
    random_numbers = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    observation: dict[str, np.ndarray] = {}
    for feature in chosen.spec.observation:
        if feature.kind is FeatureKind.STATE:
            observation[feature.name] = random_numbers.normal(size=feature.shape)
        elif draw(st.booleans()):  # A camera that the robot lacks.
            observation[feature.name] = random_numbers.integers(0, 256, feature.shape, dtype=np.uint8)
    steps = draw(st.integers(0, chosen.horizon))
    prefix = random_numbers.normal(size=(steps, chosen.model_action_size)).astype(np.float32) if steps else None
    return Request(
        token=draw(st.integers(0, (1 << 64) - 1)),
        owner=draw(st.text(alphabet="0123456789abcdefé", max_size=32)),
        request_id=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        arrived_s=draw(st.floats(0, 1e9)),
        deadline_s=draw(st.floats(0, 1e9)),
        model=chosen.name,
        row=Row(
            sample=Observed(observation=observation, task=draw(st.text(max_size=200))),
            prefix=prefix,
            delay_steps=draw(st.integers(0, chosen.horizon)),
            execution_horizon=draw(st.integers(0, chosen.horizon)),
            seed=draw(st.integers(-(1 << 63), (1 << 63) - 1)),
        ),
        is_ahead=draw(st.booleans()),
        is_rehearsal=draw(st.booleans()),
        gate=draw(st.integers(0, (1 << 32) - 1)),
    )


@settings(max_examples=80, deadline=None)
@given(first=requests(), second=requests())
def test_a_request_comes_out_as_it_went_in_whatever_was_in_the_slot_before(first: Request, second: Request) -> None:
    body = memoryview(bytearray(LAYOUT.request_bytes))
    LAYOUT.write_request(body, first)
    LAYOUT.write_request(body, second)
    read = LAYOUT.read_request(body)
    body[:] = bytes(len(body))  # What was read is a copy.
    assert (read.token, read.owner, read.request_id, read.model, read.is_ahead, read.is_rehearsal, read.gate) == (
        second.token,
        second.owner,
        second.request_id,
        second.model,
        second.is_ahead,
        second.is_rehearsal,
        second.gate,
    )
    assert (read.arrived_s, read.deadline_s) == (second.arrived_s, second.deadline_s)
    assert read.row.sample.task == second.row.sample.task
    assert read.row.sample.observation.keys() == second.row.sample.observation.keys()
    for name, array in second.row.sample.observation.items():
        assert read.row.sample.observation[name].dtype == array.dtype
        np.testing.assert_array_equal(read.row.sample.observation[name], array)
    assert (read.row.seed, read.row.delay_steps, read.row.execution_horizon) == (
        second.row.seed,
        second.row.delay_steps,
        second.row.execution_horizon,
    )
    if second.row.prefix is None:
        assert read.row.prefix is None
    else:
        np.testing.assert_array_equal(read.row.prefix, second.row.prefix)


def answer(chosen: ModelDescription, seed: int = 0) -> Answer:
    random_numbers = np.random.default_rng(seed)
    return Answer(
        actions=random_numbers.normal(size=(chosen.horizon, 4)).astype(np.float32),
        model_actions=random_numbers.normal(size=(chosen.horizon, chosen.model_action_size)).astype(np.float32),
        version=common_pb2.PolicyVersion(model=chosen.name, number=7, digest=bytes(range(32))),
        queue_s=0.1,
        prefix_s=0.2,
        sample_s=0.3,
        postprocess_s=0.4,
        batch_size=3,
    )


@pytest.mark.parametrize("chosen", MODELS, ids=lambda chosen: chosen.name)
def test_an_answer_comes_out_as_it_went_in(chosen: ModelDescription) -> None:
    body = memoryview(bytearray(LAYOUT.answer_bytes))
    sent = answer(chosen)
    LAYOUT.write_answer(body, 99, chosen.name, sent)
    token, read = LAYOUT.read_answer(body)
    assert token == 99
    assert isinstance(read, Answer)
    np.testing.assert_array_equal(read.actions, sent.actions)
    np.testing.assert_array_equal(read.model_actions, sent.model_actions)
    assert read.version == sent.version
    assert (read.queue_s, read.prefix_s, read.sample_s, read.postprocess_s, read.batch_size) == (0.1, 0.2, 0.3, 0.4, 3)
    LAYOUT.write_answer(body, 102, chosen.name, Rehearsal(answer=sent))
    token, rehearsal = LAYOUT.read_answer(body)
    assert token == 102
    assert isinstance(rehearsal, Rehearsal)
    np.testing.assert_array_equal(rehearsal.answer.actions, sent.actions)
    LAYOUT.write_answer(body, 100, chosen.name, Superseded())
    assert LAYOUT.read_answer(body) == (100, Superseded())
    LAYOUT.write_answer(body, 101, chosen.name, TooLate("x" * 5000, field="deadline", retry_after_s=0.5))
    token, error = LAYOUT.read_answer(body)
    assert token == 101
    assert isinstance(error, TooLate)
    assert (error.field, error.retry_after_s) == ("deadline", 0.5)


def test_a_chunk_of_another_shape_than_described_becomes_an_error() -> None:
    body = memoryview(bytearray(LAYOUT.answer_bytes))
    LAYOUT.write_answer(body, 1, "small", answer(MODELS[1]))
    assert isinstance(LAYOUT.read_answer(body)[1], InternalError)


def test_a_row_that_is_not_as_the_spec_has_it_does_not_get_in() -> None:
    body = memoryview(bytearray(LAYOUT.request_bytes))
    row = Row(
        sample=Observed(observation={"observation.state": np.zeros(3)}, task=""),
        prefix=None,
        delay_steps=0,
        execution_horizon=1,
        seed=0,
    )
    request = Request(token=1, owner="a", request_id=1, arrived_s=0.0, deadline_s=1.0, model="small", row=row)
    with pytest.raises(InternalError, match=r"observation\.state"):
        LAYOUT.write_request(body, request)


@settings(max_examples=300, deadline=None)
@given(header=st.binary(min_size=128, max_size=128), fields=st.dictionaries(st.integers(0, 27), st.integers(0, 255)))
def test_hostile_headers_are_bad_slots_and_nothing_worse(header: bytes, fields: dict[int, int]) -> None:
    """Random headers, and a good one with some bytes changed."""
    for written in (header, None):
        requests_body = memoryview(bytearray(LAYOUT.request_bytes))
        answers_body = memoryview(bytearray(LAYOUT.answer_bytes))
        LAYOUT.write_answer(answers_body, 5, "big", answer(MODELS[1]))
        if written is not None:
            requests_body[:128] = written
            answers_body[:128] = written
        else:
            for place, value in fields.items():
                answers_body[4 * place] = value
        try:
            _, outcome = LAYOUT.read_answer(answers_body)
        except BadSlot:
            pass
        else:
            assert isinstance(outcome, Answer | Superseded | ManyhandsError)
        try:
            LAYOUT.read_request(requests_body)
        except BadSlot:
            pass


@pytest.mark.parametrize(
    ("place", "form", "value", "named"),
    [
        (8, "<I", 9, "kind"),
        (12, "<I", 2, "model"),
        (16, "<q", -1, "version"),
        (24, "<d", float("nan"), "stage times"),
        (32, "<d", -1.0, "stage times"),
        (56, "<i", 0, "batch size"),
        (60, "<I", 1 << 31, "digest"),
        (256, "<f", float("inf"), "not finite"),
    ],
)
def test_each_field_of_an_answer_is_checked(place: int, form: str, value: float, named: str) -> None:
    body = memoryview(bytearray(LAYOUT.answer_bytes))
    LAYOUT.write_answer(body, 5, "big", answer(MODELS[1]))
    struct.pack_into(form, body, place, value)
    with pytest.raises(BadSlot, match=named):
        LAYOUT.read_answer(body)


@settings(max_examples=50, deadline=None)
@given(request=requests(), place=st.sampled_from([48, 52, 56, 60, 64, 68]), value=st.integers(10, (1 << 31) - 1))
def test_sizes_of_a_request_that_cannot_be_are_bad_slots(request: Request, place: int, value: int) -> None:
    assume(place not in (64, 68) or value > 20_000)
    body = memoryview(bytearray(LAYOUT.request_bytes))
    LAYOUT.write_request(body, request)
    struct.pack_into("<i", body, place, value)
    with pytest.raises(BadSlot):
        LAYOUT.read_request(body)
