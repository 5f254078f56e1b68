"""The second copy that a version is put together in: what is whole in it, what is brought, and what may never serve."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pytest
import torch

from manyhands import weights_manifest
from manyhands.errors import Cancelled, Corrupt, Refused
from manyhands.weights.v1 import weights_pb2
from manyhands.weights_manifest import RawTensor
from policies import checkpoint
from policies.flow import FlowPolicy
from services.inference import weights_bringer, weights_follower
from services.inference.models import ServedModel
from services.inference.spare import Spare
from services.inference.weights_bringer import WeightsBringer
from services.inference.weights_follower import WeightsFollower
from tests.support.inference_lab import SPEC, make_policy
from tests.support.scripted_weights import Pieces, ScriptedWeights, wrong_pieces
from tests.support.unit_lab import wait_for

NAME = "chunk_in.weight"


def content(policy: FlowPolicy, **changes: torch.Tensor) -> dict[str, RawTensor]:
    return checkpoint.to_wire({**policy.state_dict(), **changes})


def manifest_of(tensors: Mapping[str, RawTensor]) -> weights_pb2.Manifest:
    return weights_manifest.build(
        model="tiny",
        policy_type="flow",
        config_json=json.dumps(make_policy().config_dict()),
        spec=SPEC,
        tensors=tensors,
        publish_id="run/1",
    )


@pytest.fixture
def served() -> ServedModel:
    return ServedModel("tiny", make_policy(0))


@pytest.fixture
def tensors() -> dict[str, RawTensor]:
    return content(make_policy(1))


@pytest.fixture
def service(tensors: dict[str, RawTensor]) -> Iterator[ScriptedWeights]:
    with ScriptedWeights(manifest_of(tensors), tensors) as service:
        yield service


@pytest.fixture
def bringer(service: ScriptedWeights) -> WeightsBringer:
    return WeightsBringer(service.address, patience_s=0.0)


def nothing() -> None:
    pass


def fill(
    spare: Spare,
    served: ServedModel,
    manifest: weights_pb2.Manifest,
    bringer: WeightsBringer,
    check_going_on: Callable[[], None] = nothing,
) -> None:
    spare.fill(manifest, bringer, live=served.policy, live_digests=served.digests, check_going_on=check_going_on)


def assert_holds(policy: torch.nn.Module, tensors: Mapping[str, RawTensor]) -> None:
    for name, tensor in policy.state_dict().items():
        assert bytes(checkpoint.to_wire({name: tensor})[name].data) == bytes(tensors[name].data), name


def test_a_spare_has_the_structure_and_no_copy_of_the_weights(served: ServedModel) -> None:
    policy = served.policy
    policy.extra = torch.nn.Linear(1 << 10, 1 << 10)
    policy.tied = policy.extra.weight
    spare = Spare.of(policy)
    assert spare.digests == {}
    assert not spare.policy.training
    made, known = spare.policy.state_dict(keep_vars=True), policy.state_dict(keep_vars=True)
    assert list(made) == list(known)
    for name, tensor in known.items():
        assert (made[name].shape, made[name].dtype) == (tensor.shape, tensor.dtype)
        assert (type(made[name]), made[name].requires_grad) == (type(tensor), tensor.requires_grad)
        assert tensor.numel() == 0 or made[name].data_ptr() != tensor.data_ptr()
    assert spare.policy.tied is spare.policy.extra.weight


def test_making_a_spare_copies_nothing(served: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def copied(tensor: torch.Tensor, _memo: object) -> torch.Tensor:
        raise AssertionError(f"a tensor of shape {tuple(tensor.shape)} is copied")

    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", copied)
    Spare.of(served.policy)


def test_what_the_live_copy_has_is_not_fetched(served: ServedModel) -> None:
    changed = content(make_policy(0), **{NAME: torch.ones_like(served.policy.state_dict()[NAME])})
    spare = Spare.of(served.policy)
    with ScriptedWeights(manifest_of(changed), changed) as service:
        bringer = WeightsBringer(service.address)
        fill(spare, served, service.manifest, bringer)
        assert service.asked == [[NAME]]
        assert_holds(spare.policy, changed)
        fill(spare, served, service.manifest, bringer)
        assert service.asked == [[NAME]], "what the spare has is neither copied nor fetched"


@pytest.mark.parametrize("way", wrong_pieces())
def test_wrong_bytes_leave_no_digest_and_the_next_swap_brings_that_tensor(
    served: ServedModel, tensors: dict[str, RawTensor], service: ScriptedWeights, bringer: WeightsBringer, way: str
) -> None:
    spare = Spare.of(served.policy)
    # All of its tensors are those of the live copy, known as such.
    fill(spare, served, manifest_of(content(make_policy(0))), bringer)
    held = spare.digests[NAME]
    right = service.send
    service.send = lambda name, raw: wrong_pieces()[way](raw) if name == NAME else right(name, raw)
    with pytest.raises(Corrupt) as refused:
        fill(spare, served, service.manifest, bringer)
    assert refused.value.field == NAME
    # Not touched, or known as half written: never something else under the old digest.
    assert spare.digests.get(NAME) in (None, held)
    if NAME in spare.digests:
        assert torch.equal(spare.policy.state_dict()[NAME], served.policy.state_dict()[NAME])
    service.send = right
    fill(spare, served, service.manifest, bringer)
    assert_holds(spare.policy, tensors)


def test_half_a_tensor_has_no_digest(
    served: ServedModel, service: ScriptedWeights, bringer: WeightsBringer, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = Spare.of(served.policy)
    fill(spare, served, manifest_of(content(make_policy(0))), bringer)
    real, copied = np.copyto, iter((False, True))

    def ends_amid(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8]) -> None:
        if next(copied):
            raise RuntimeError("the memory is gone")
        real(target, source)

    monkeypatch.setattr(weights_bringer.np, "copyto", ends_amid)
    with pytest.raises(RuntimeError):
        fill(spare, served, service.manifest, bringer)
    assert len(spare.digests) == len(service.manifest.tensors) - 1


def test_a_cancelled_swap_is_completed_by_the_next(
    served: ServedModel, tensors: dict[str, RawTensor], service: ScriptedWeights, bringer: WeightsBringer
) -> None:
    spare = Spare.of(served.policy)
    calls = iter(range(100))

    def cancel_third() -> None:
        """Of those that are fetched."""
        if service.asked and next(calls) == 2:
            raise Cancelled("the server is going away; nothing was changed")

    with pytest.raises(Cancelled):
        fill(spare, served, service.manifest, bringer, cancel_third)
    come = set(spare.digests).intersection(service.asked[0])
    assert len(come) == 2
    fill(spare, served, service.manifest, bringer)
    assert come.isdisjoint(service.asked[-1])
    assert_holds(spare.policy, tensors)


def test_a_tensor_that_is_not_finite_is_checked_again_each_time(served: ServedModel) -> None:
    bad = content(make_policy(1), **{NAME: torch.full_like(served.policy.state_dict()[NAME], torch.inf)})
    spare = Spare.of(served.policy)
    with ScriptedWeights(manifest_of(bad), bad) as service:
        for _ in range(2):
            with pytest.raises(Corrupt, match="not finite") as refused:
                fill(spare, served, service.manifest, WeightsBringer(service.address))
            assert refused.value.field == NAME


def test_what_is_served_on_a_device_comes_by_way_of_the_host(
    served: ServedModel, service: ScriptedWeights, bringer: WeightsBringer
) -> None:
    spare = Spare.of(served.policy.to("meta"))
    fill(spare, served, service.manifest, bringer)
    assert spare.digests == {entry.name: entry.sha256 for entry in service.manifest.tensors}


@pytest.fixture
def follower(service: ScriptedWeights, served: ServedModel) -> Iterator[WeightsFollower]:
    def between_passes(_model: str, flip: Callable[[], None]) -> float:
        flip()
        return 0.0

    follower = WeightsFollower(service.address, {"tiny": served}, between_passes, follow=False)
    yield follower
    follower.stop()


def test_what_a_swap_needs_is_made_at_the_start_and_not_under_robots(
    follower: WeightsFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    follower.start()
    monkeypatch.setattr(Spare, "of", lambda _policy: pytest.fail("a module was copied while robots are served"))
    assert follower.swap("tiny", 1).result(20.0).current.number == 1


def test_the_way_of_a_version_is_gone_once_before_robots_come_by_the_thread_that_it_will_come_by(
    service: ScriptedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What happens the first time only, of a thread or a stream, stopped everybody for half a second."""
    threads: list[str] = []

    class Fused(ServedModel):
        def rehearse_stage(self) -> None:
            threads.append(threading.current_thread().name)

        def stage(self, policy: FlowPolicy) -> None:
            threads.append(threading.current_thread().name)

    monkeypatch.setattr(weights_follower, "FusedModel", Fused)
    served = Fused("tiny", make_policy(0))
    follower = WeightsFollower(service.address, {"tiny": served}, lambda _model, flip: flip() or 0.0, follow=False)
    follower.start()
    assert len(threads) == 1
    assert follower.swap("tiny", 1).result(20.0).current.number == 1
    follower.stop()
    assert len(threads) == 2
    assert len(set(threads)) == 1, threads


def test_where_the_way_of_a_version_cannot_be_gone_robots_are_served_and_have_the_memory(
    service: ScriptedWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    class Full(ServedModel):
        def rehearse_stage(self) -> None:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

        def forget_stage(self) -> None:
            told.append("forgotten")

    monkeypatch.setattr(weights_follower, "FusedModel", Full)
    monkeypatch.setattr(weights_follower.logger, "warning", lambda text, *values: told.append(text % values))
    follower = WeightsFollower(service.address, {"tiny": Full("tiny", make_policy(0))}, lambda *_: 0.0, follow=False)
    follower.start()
    follower.stop()
    assert told[0] == "forgotten"
    assert "CUBLAS_STATUS_ALLOC_FAILED" in told[1]


def test_a_version_that_cannot_be_tried_is_told_among_the_swaps(
    served: ServedModel, follower: WeightsFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(weights_follower, "_check_canary", fail)
    with pytest.raises(RuntimeError):
        follower.swap("tiny", 1).result(20.0)
    [swap] = follower.swaps()
    assert (swap.version.number, swap.accepted) == (1, False)
    assert "log" in swap.reason
    assert served.version.number == 0


def test_a_trial_that_an_end_of_the_server_cuts_off_says_nothing_of_the_version(
    follower: WeightsFollower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*_arguments: object) -> None:
        follower.end_swaps()
        raise RuntimeError("what it needs is closed")

    monkeypatch.setattr(weights_follower, "_check_canary", cut_off)
    with pytest.raises(Cancelled):
        follower.swap("tiny", 1).result(20.0)
    assert follower.swaps() == []


def test_wrong_pieces_are_refused_and_the_old_version_keeps_serving(
    served: ServedModel, tensors: dict[str, RawTensor], service: ScriptedWeights, follower: WeightsFollower
) -> None:
    right = service.send
    service.send = lambda name, raw: wrong_pieces()["other bytes"](raw) if name == NAME else right(name, raw)
    with pytest.raises(Refused, match=NAME):
        follower.swap("tiny", 1).result(20.0)
    assert served.version.number == 0
    assert_holds(served.policy, content(make_policy(0)))
    service.send = right
    assert follower.swap("tiny", 1).result(20.0).current.number == 1
    assert_holds(served.policy, tensors)


def test_an_end_amid_a_tensor_is_quick_and_changes_nothing(
    served: ServedModel, service: ScriptedWeights, follower: WeightsFollower
) -> None:
    ended = threading.Event()

    def silent(_name: str, raw: RawTensor) -> Pieces:
        yield weights_pb2.TensorPiece(sha256=raw.sha256, data=bytes(raw.data)[:4])
        ended.wait(30.0)

    service.send = silent
    swap = follower.swap("tiny", 1)
    wait_for(lambda: service.asked)
    time.sleep(0.05)  # It is in the midst of the first tensor, or about to be.
    follower.end_swaps()
    try:
        with pytest.raises(Cancelled, match="nothing was changed"):
            swap.result(5.0)
    finally:
        ended.set()
    assert served.version.number == 0
    assert_holds(served.policy, content(make_policy(0)))


def test_nothing_as_large_as_a_tensor_is_allocated_while_a_version_comes_in() -> None:
    """An engine's threads would wait for the interpreter while such memory is filled."""

    class Large(torch.nn.Module):
        type_name = "large"

        def __init__(self, value: float) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.full((1 << 24,), value, dtype=torch.bfloat16))

    live, wanted = Large(1.0), Large(2.0)
    large = checkpoint.as_wire(wanted.state_dict())
    manifest = manifest_of(large)
    with ScriptedWeights(manifest, large) as service:
        bringer = WeightsBringer(service.address)
        tracemalloc.start()
        try:
            spare = Spare.of(live)  # type: ignore[arg-type]
            spare.fill(manifest, bringer, live=live, live_digests={}, check_going_on=nothing)  # type: ignore[arg-type]
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert torch.equal(spare.policy.table, wanted.table)
    assert peak_bytes < memoryview(large["table"].data).nbytes * 3 // 4
