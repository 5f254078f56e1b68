"""Publishing beside training: the newest version wins, and a service that is away costs nothing else."""

from __future__ import annotations

import threading

import pytest

from learner.publishing import BackgroundPublisher, Version
from manyhands.common.v1 import common_pb2
from manyhands.errors import InvalidInput, Unreachable
from manyhands.spec import Feature, FeatureKind, Spec

SPEC = Spec(
    observation=(),
    action=(Feature(name="action", kind=FeatureKind.ACTION, dtype="float32", shape=(2,)),),
    control_rate_hz=10.0,
)


def version(step):
    return Version(step=step, policy_type="flow", config_json="{}", spec=SPEC, tensors={}, metrics={})


class Service:
    """A weights service that can be held up or away."""

    def __init__(self):
        self.asked: list[int] = []
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.errors: list[Exception] = []

    def publish(self, version):
        self.asked.append(version.step)
        self.entered.set()
        assert self.free.wait(10)
        if self.errors:
            raise self.errors.pop(0)
        return common_pb2.PolicyVersion(model="m", number=len(self.asked))


@pytest.fixture
def service():
    return Service()


@pytest.fixture
def told():
    return {"published": [], "failed": []}


@pytest.fixture
def publisher(service, told):
    made = BackgroundPublisher(
        service.publish,
        published=lambda version, answer: told["published"].append((version.step, answer.number)),
        failed=lambda version, message: told["failed"].append((version.step, message)),
    )
    yield made
    service.free.set()
    made.close(5)


def test_versions_come_out(publisher, told):
    publisher.offer(version(10))
    assert publisher.close(5)
    assert told["published"] == [(10, 1)]


def test_what_waits_is_replaced_by_what_is_newer(publisher, service, told):
    service.free.clear()
    publisher.offer(version(1))
    assert service.entered.wait(5)
    for step in (2, 3, 4):
        publisher.offer(version(step))
    service.free.set()
    assert publisher.close(5)
    assert [step for step, _ in told["published"]] == [1, 4]


def test_offering_never_waits_for_the_service(publisher, service):
    service.free.clear()
    for step in range(1000):  # Would hang for ever.
        publisher.offer(version(step))


def test_a_service_that_comes_back_gets_the_version(publisher, service, told):
    service.errors = [Unreachable("gone"), Unreachable("gone")]
    publisher.offer(version(5))
    assert publisher.close(10)
    assert told["published"] == [(5, 3)]
    assert len(told["failed"]) == 1, "told once, not at every attempt"


def test_a_newer_version_takes_the_place_of_one_that_cannot_be_sent(publisher, service, told):
    service.errors = [Unreachable("gone")] * 3
    publisher.offer(version(5))
    assert service.entered.wait(5)
    publisher.offer(version(6))
    assert publisher.close(10)
    assert told["published"][0][0] == 6


@pytest.mark.parametrize("error", [InvalidInput("bad name"), ZeroDivisionError("a bug")])
def test_a_version_that_cannot_be_right_is_dropped_and_the_next_one_goes(publisher, service, told, error):
    service.errors = [error]
    publisher.offer(version(5))
    while not told["failed"]:
        pass
    publisher.offer(version(6))
    assert publisher.close(5)
    assert service.asked == [5, 6]
    assert told["published"] == [(6, 2)]


def test_closing_does_not_wait_for_ever(publisher, service):
    service.errors = [Unreachable("gone")] * 1000
    publisher.offer(version(5))
    assert not publisher.close(0.3)
