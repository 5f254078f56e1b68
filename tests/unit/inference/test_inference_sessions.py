"""The handshake and the life of sessions, with a clock of numbers."""

from __future__ import annotations

import dataclasses

import pytest

from manyhands.errors import AlreadyExists, InvalidInput, NotFound, Overloaded
from manyhands.spec import Feature, FeatureKind, Spec
from services.inference import capacity, sharing
from services.inference.capacity import Demand
from services.inference.sessions import AdaptationKind, Fit, Session, Sessions, fit

STATE = Feature(
    name="observation.state",
    kind=FeatureKind.STATE,
    dtype="float32",
    shape=(3,),
    element_names=("shoulder.pos", "elbow.pos", "gripper.pos"),
    element_units=("rad", "rad", "m"),
)
FRONT = Feature(name="observation.images.front", kind=FeatureKind.IMAGE, dtype="uint8", shape=(64, 96, 3))
WRIST = Feature(name="observation.images.wrist", kind=FeatureKind.IMAGE, dtype="uint8", shape=(64, 96, 3))
ACTION = dataclasses.replace(STATE, name="action", kind=FeatureKind.ACTION)
MODEL = Spec(observation=(STATE, FRONT, WRIST), action=(ACTION,), control_rate_hz=20.0)


def robot(*, observation: tuple[Feature, ...] = MODEL.observation, action: Feature = ACTION, rate: float = 20.0) -> Spec:
    return Spec(observation=observation, action=(action,), control_rate_hz=rate)


def anonymous(feature: Feature, size: int) -> Feature:
    return dataclasses.replace(feature, shape=(size,), element_names=(), element_units=())


def test_an_equal_spec_needs_no_adaptation() -> None:
    result = fit(MODEL, MODEL, masks_cameras=False)
    assert result.adaptations == ()
    assert result.required == MODEL.observation
    assert result.action_size == 3


def test_what_the_model_does_not_use_is_ignored_and_other_sizes_are_adapted() -> None:
    extra = dataclasses.replace(FRONT, name="observation.images.ceiling")
    big = dataclasses.replace(FRONT, shape=(480, 640, 3))
    result = fit(robot(observation=(extra, STATE, big, WRIST)), MODEL, masks_cameras=False)
    assert {a.feature: a.kind for a in result.adaptations} == {
        "observation.images.front": AdaptationKind.RESIZED,
        "observation.images.ceiling": AdaptationKind.IGNORED,
    }
    assert result.required == (STATE, big, WRIST)


def test_a_model_without_element_names_takes_a_shorter_vector() -> None:
    model = Spec(observation=(anonymous(STATE, 32), FRONT), action=(anonymous(ACTION, 32),), control_rate_hz=20.0)
    result = fit(robot(observation=(STATE, FRONT)), model, masks_cameras=False)
    assert [a.kind for a in result.adaptations] == [AdaptationKind.PADDED, AdaptationKind.PADDED]
    assert result.action_size == 3


def test_a_missing_camera_is_masked_only_by_a_model_that_was_trained_so() -> None:
    one_eyed = robot(observation=(STATE, WRIST))
    result = fit(one_eyed, MODEL, masks_cameras=True)
    assert [(a.feature, a.kind) for a in result.adaptations] == [("observation.images.front", AdaptationKind.MASKED)]
    with pytest.raises(InvalidInput, match="the model needs it") as refused:
        fit(one_eyed, MODEL, masks_cameras=False)
    assert refused.value.field == "observation.images.front"
    with pytest.raises(InvalidInput, match="none of the model's cameras"):
        fit(robot(observation=(STATE,)), MODEL, masks_cameras=True)


@pytest.mark.parametrize(
    ("spec", "field", "words"),
    [
        (robot(rate=30.0), "spec.control_rate_hz", "is 30.0 on the robot"),
        (robot(observation=(STATE, WRIST, FRONT)), "observation.images.wrist", "out of order"),
        (robot(observation=(FRONT, WRIST)), "observation.state", "the model needs it"),
        (
            robot(observation=(dataclasses.replace(STATE, dtype="float64"), FRONT, WRIST)),
            "observation.state",
            "is float64",
        ),
        (
            robot(
                observation=(
                    dataclasses.replace(STATE, element_names=("elbow.pos", "shoulder.pos", "gripper.pos")),
                    FRONT,
                    WRIST,
                )
            ),
            "observation.state",
            "element 0 is 'elbow.pos' on the robot, 'shoulder.pos' in the model",
        ),
        (
            robot(observation=(dataclasses.replace(STATE, element_units=("deg", "rad", "m")), FRONT, WRIST)),
            "observation.state",
            "unit 0 is 'deg' on the robot, 'rad' in the model",
        ),
        (robot(observation=(anonymous(STATE, 3), FRONT, WRIST)), "observation.state", "element 0 is nothing"),
        (robot(action=anonymous(ACTION, 4)), "action", "element 0 is nothing on the robot"),
        (robot(action=dataclasses.replace(ACTION, name="action.arm")), "action.arm", "the model answers action"),
        (
            robot(action=dataclasses.replace(ACTION, element_units=("rad", "rad", "rad"))),
            "action",
            "unit 2 is 'rad' on the robot, 'm' in the model",
        ),
    ],
)
def test_a_spec_that_would_move_the_robot_wrongly_is_refused_by_name(spec: Spec, field: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words) as refused:
        fit(spec, MODEL, masks_cameras=True)
    assert refused.value.field == field


def open_session(sessions: Sessions, robot_id: str, client_id: str, now_s: float) -> tuple[Session, Session | None]:
    return sessions.open(
        robot_id=robot_id,
        client_id=client_id,
        model="tiny",
        robot_fit=Fit(required=(), adaptations=(), action_size=1),
        asked_interval_steps=8,
        control_rate_hz=20.0,
        now_s=now_s,
    )


def test_a_robot_id_has_one_client_until_its_session_expires() -> None:
    sessions = Sessions(max_sessions=4, idle_timeout_s=4.0)
    first, _ = open_session(sessions, "left", "client-a", 0.0)
    with pytest.raises(AlreadyExists, match=r"expires in 3\.0 s") as refused:
        open_session(sessions, "left", "client-b", 1.0)
    assert refused.value.retry_after_s == pytest.approx(3.05)
    stream = object()
    sessions.attach(first, stream)
    assert sessions.expire(100.0) == []
    with pytest.raises(AlreadyExists, match="stream is open"):
        open_session(sessions, "left", "client-b", 100.0)
    sessions.detach(first, stream, 100.0)
    assert sessions.expire(103.9) == []
    assert sessions.expire(104.0) == [first]
    open_session(sessions, "left", "client-b", 104.0)
    with pytest.raises(NotFound):
        sessions.get(first.session_id)


def test_the_same_client_replaces_its_own_session_also_when_full() -> None:
    sessions = Sessions(max_sessions=1, idle_timeout_s=4.0)
    first, _ = open_session(sessions, "left", "client-a", 0.0)
    second, replaced = open_session(sessions, "left", "client-a", 1.0)
    assert replaced is first
    assert second.session_id != first.session_id
    with pytest.raises(NotFound):
        sessions.get(first.session_id)
    with pytest.raises(Overloaded) as refused:
        open_session(sessions, "right", "client-b", 1.0)
    assert refused.value.retry_after_s == 4.0


def test_a_stream_that_was_taken_over_does_not_detach_its_successor() -> None:
    sessions = Sessions(max_sessions=1, idle_timeout_s=4.0)
    session, _ = open_session(sessions, "left", "client-a", 0.0)
    old, new = object(), object()
    assert sessions.attach(session, old) is None
    assert sessions.attach(session, new) is old
    sessions.detach(session, old, 1.0)
    assert sessions.expire(100.0) == []
    assert session.stream is new


@pytest.mark.parametrize("name", ["", "x" * 129, "line\nbreak"])
def test_impossible_names_are_refused(name: str) -> None:
    sessions = Sessions(max_sessions=1, idle_timeout_s=4.0)
    with pytest.raises(InvalidInput) as refused:
        open_session(sessions, name, "client-a", 0.0)
    assert refused.value.field == "robot_id"


def test_everyones_interval_grows_before_anyone_is_refused() -> None:
    demand = Demand(rate_hz=20.0, interval_steps=4, horizon=16)  # 5 chunks/s; at least 1.25.
    assert capacity.stretch([demand] * 4, None) == 1.0
    assert capacity.stretch([demand] * 4, 25.0) == 1.0  # 20 asked, 20 usable.
    factor = capacity.stretch([demand] * 8, 25.0)
    assert factor == pytest.approx(2.0)
    assert capacity.interval_steps(demand, factor) == 8
    assert capacity.interval_steps(demand, 100.0) == 16
    assert capacity.fits([demand] * 16, 25.0)
    assert not capacity.fits([demand] * 17, 25.0)


def test_text_takes_its_share_of_the_capacity_and_delay_its_part_of_the_horizon() -> None:
    asking = capacity.TextDemand(questions_per_s=0.5, tokens=20, within_s=1.0)

    def device(question_s: float, text_step_s: float, max_texts: int) -> capacity.DeviceCapacity:
        return capacity.DeviceCapacity(
            chunks_per_s=25.0, question_s=question_s, text_step_s=text_step_s, max_texts=max_texts
        )

    # Eight prefixes of 6 ms, and 20 steps of 1 ms that serve all.
    assert capacity.text_share([asking] * 16, device(0.006, 0.001, 32)) == pytest.approx(8 * 0.006 + 20 * 0.001)
    assert capacity.text_share([asking], device(0.0, 0.001, 32)) == pytest.approx(0.010)
    assert capacity.text_share([asking] * 160, device(0.0, 0.001, 4)) == pytest.approx(160 * 10 / 4 * 0.001)
    assert capacity.text_share([asking] * 1000, device(0.006, 0.001, 4)) == capacity.MAX_TEXT_SHARE
    assert capacity.text_share([], device(1.0, 1.0, 4)) == 0.0
    # Two robots that ask without a pause: a step has two texts at most, whatever there is room for.
    restless = capacity.TextDemand(questions_per_s=4.0, tokens=20, within_s=1.0)
    assert capacity.text_share([restless] * 2, device(0.0, 0.001, 32)) == pytest.approx(80 * 0.001)
    # One that would take all of the device with its questions is counted for a quarter of it, and others beside it.
    greedy = capacity.TextDemand(questions_per_s=100.0, tokens=20, within_s=1.0)
    assert capacity.text_share([greedy], device(0.006, 0.001, 32)) == pytest.approx(0.25)
    beside = capacity.text_share([greedy, asking], device(0.006, 0.0, 32))
    assert beside == pytest.approx(0.25 + 0.5 * 0.006)
    # Its prefix runs before the first token is known.
    begun = capacity.TextDemand(questions_per_s=0.5, tokens=0.0)
    assert capacity.text_share([begun], device(0.006, 0.001, 4)) == pytest.approx(0.003)
    # Where nobody measured text, it is not counted.
    assert capacity.text_share([asking] * 16, capacity.DeviceCapacity(chunks_per_s=25.0)) == 0.0
    demand = Demand(rate_hz=20.0, interval_steps=4, horizon=16, delay_steps=6)
    assert capacity.interval_steps(demand, 100.0) == 10
    assert capacity.fits([demand] * 10, 25.0)
    assert not capacity.fits([demand] * 10, 25.0, 0.1)
    assert capacity.stretch([demand] * 4, 25.0, 0.5) == pytest.approx(2.0)


def test_what_is_promised_shares_steps_as_far_as_the_scheduler_does() -> None:
    """Where ten steps alone cost as much as a prefix, eight rows share them; where they cost a quarter, none do."""
    costly = {1: 0.75, 2: 1.0, 3: 1.3, 4: 1.3, 5: 1.5, 6: 1.5, 7: 1.5, 8: 1.5, 9: 2.4}
    rate = sharing.chunks_per_s(prefix_s=7.6e-3, step_s=lambda rows: costly[rows] * 1e-3, num_steps=10, max_rows=9)
    assert rate == pytest.approx(1 / (7.6e-3 + 15.0e-3 / 8))
    few = sharing.chunks_per_s(prefix_s=7.6e-3, step_s=lambda rows: costly[rows] * 1e-3, num_steps=10, max_rows=2)
    assert few == pytest.approx(1 / (7.6e-3 + 10.0e-3 / 2))
    cheap = sharing.chunks_per_s(prefix_s=5.9e-3, step_s=lambda rows: (0.15 + 0.013 * rows) * 1e-3, num_steps=10, max_rows=8)
    assert cheap == pytest.approx(1 / (5.9e-3 + 1.63e-3))


def test_steps_are_shared_while_there_are_enough_left_of_them() -> None:
    def pays(steps_left: int) -> bool:
        return sharing.pays(
            prefix_s=7.5e-3,
            step_s=lambda rows: {1: 0.7, 2: 0.75}[rows] * 1e-3,
            num_rows=1,
            steps_left=steps_left,
            num_steps=10,
        )

    assert pays(10)
    assert not pays(3)  # 2.1 + 7 - 7.5 is less than a third of a prefix.


def test_a_chunk_of_another_model_counts_by_what_it_costs() -> None:
    demand, costly = (Demand(rate_hz=20.0, interval_steps=4, horizon=16, cost=cost) for cost in (1.0, 2.5))
    assert capacity.stretch([demand] * 2 + [costly] * 2, 25.0) == pytest.approx(35 / 20)
    assert capacity.fits([demand] * 6 + [costly] * 4, 25.0)
    assert not capacity.fits([demand] * 7 + [costly] * 4, 25.0)


def test_admission_lengthens_intervals_first_and_refuses_with_a_reason() -> None:
    demand = Demand(rate_hz=20.0, interval_steps=4, horizon=16)
    rate = sharing.chunks_per_s(prefix_s=0.030, step_s=lambda rows: 0.001 * rows, num_steps=10, max_rows=8)
    assert rate == pytest.approx(25.0)
    assert capacity.admit([demand] * 3, demand, chunks_per_s=rate) == pytest.approx(1.0)
    assert capacity.admit([demand] * 15, demand, chunks_per_s=rate) == pytest.approx(4.0)
    with pytest.raises(capacity.DeviceFull, match=r"16 robots .* 25\.0 chunks/s"):
        capacity.admit([demand] * 16, demand, chunks_per_s=rate)
    with pytest.raises(capacity.DeviceFull, match="text takes 50%"):
        capacity.admit([demand] * 15, demand, chunks_per_s=rate, text_share=0.5)
