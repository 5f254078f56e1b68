"""What an engine does when its device fails: an error that no later pass survives is told once, others cost one robot."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from manyhands.errors import InternalError
from policies.flow import FlowPolicy
from services.inference.engine import canary_row
from services.inference.engine_port import Answer, Job, Outcome
from services.inference.local_engine import LocalEngine
from services.inference.models import ServedModel
from tests.support.inference_lab import make_policy


class FailingPolicy(FlowPolicy):
    """Raises what it is told to, once."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.error: Exception | None = None

    def act(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        error, self.error = self.error, None
        if error is not None:
            raise error
        return super().act(*arguments, **keywords)


@pytest.fixture
def policy() -> FailingPolicy:
    made = make_policy(policy_class=FailingPolicy)
    assert isinstance(made, FailingPolicy)
    return made


@pytest.fixture
def fatal() -> list[Exception]:
    return []


@pytest.fixture
def engine(policy: FailingPolicy, fatal: list[Exception]) -> Iterator[LocalEngine]:
    engine = LocalEngine({"tiny": ServedModel("tiny", policy)}, max_batch=2, on_fatal=fatal.append)
    engine.start()
    yield engine
    engine.stop()


def run(engine: LocalEngine, policy: FlowPolicy) -> Outcome:
    outcome: Future[Outcome] = Future()
    now_s = time.monotonic()
    job = Job(model="tiny", row=canary_row(policy), done=outcome.set_result)
    engine.submit(owner="robot", request_id=1, arrived_s=now_s, deadline_s=now_s + 20.0, job=job)
    return outcome.result(20.0)


def test_a_failed_device_is_told(engine: LocalEngine, policy: FailingPolicy, fatal: list[Exception]) -> None:
    policy.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    assert isinstance(run(engine, policy), InternalError)
    assert [type(error) for error in fatal] == [torch.AcceleratorError]


@pytest.mark.parametrize("error", [RuntimeError("shapes"), torch.OutOfMemoryError("too little memory")])
def test_an_error_of_one_pass_is_not_the_devices(
    engine: LocalEngine, policy: FailingPolicy, fatal: list[Exception], error: Exception
) -> None:
    policy.error = error
    assert isinstance(run(engine, policy), InternalError)
    assert isinstance(run(engine, policy), Answer)
    assert fatal == []


def test_warming_up_is_shown_to_its_end(policy: FailingPolicy) -> None:
    shown: list[tuple[str, int, int]] = []
    engine = LocalEngine({"tiny": ServedModel("tiny", policy)}, max_batch=4)
    engine.start(lambda *progress: shown.append(progress))
    engine.stop()
    assert shown[0] == ("preparing tiny", 1, shown[-1][2])
    assert shown[-1][1] == shown[-1][2] == len(shown)
