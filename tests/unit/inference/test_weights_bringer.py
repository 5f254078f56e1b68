"""The process that brings weights in: what comes is whole and finite, and however it ends, nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import Cancelled, InternalError, InvalidInput, NotFound, Unreachable
from manyhands.weights.v1 import weights_pb2
from manyhands.weights_manifest import RawTensor
from services.inference import bring_in, weights_bringer
from services.inference.weights_bringer import WeightsBringer
from tests.support.inference_lab import SPEC
from tests.support.scripted_weights import Pieces, ScriptedWeights
from tests.support.unit_lab import wait_for


def service_of(**tensors: np.ndarray) -> ScriptedWeights:
    raws = {name: weights_manifest.raw_tensor(value) for name, value in tensors.items()}
    manifest = weights_manifest.build(
        model="tiny", policy_type="flow", config_json="{}", spec=SPEC, tensors=raws, publish_id="run/1"
    )
    return ScriptedWeights(manifest, raws)


def brought(bringer: WeightsBringer, service: ScriptedWeights) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def place(entry: weights_pb2.TensorEntry) -> np.ndarray:
        found[entry.name] = np.zeros(weights_manifest.entry_bytes(entry), np.uint8)
        return found[entry.name]

    names = [entry.name for entry in bringer.fetch_into(service.manifest.tensors, place)]
    assert sorted(names) == sorted(found)
    return found


def processes(of: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(of).children()
    return [
        child
        for child in children
        if child.status() != psutil.STATUS_ZOMBIE and "services.inference.bring_in" in child.cmdline()
    ]


def num_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def silent() -> Iterator[ScriptedWeights]:
    """Sends the beginning of a tensor and nothing more."""
    ended = threading.Event()

    def begin(_name: str, raw: RawTensor) -> Pieces:
        yield weights_pb2.TensorPiece(sha256=raw.sha256, data=bytes(raw.data)[:4])
        ended.wait(30.0)

    with service_of(table=np.arange(100, dtype=np.float32)) as service:
        service.send = begin
        yield service
        ended.set()


def test_tensors_of_any_size_come_whole_and_nothing_is_left_of_the_process() -> None:
    """Some larger than all of the ring."""
    size = bring_in.SHAPE.slot_count * bring_in.PIECE_BYTES
    tensors = {
        "large": np.random.default_rng(0).integers(0, 256, size + 12345, dtype=np.uint8),
        "one piece": np.arange(bring_in.PIECE_BYTES // 4, dtype=np.float32),
        "scalar": np.float64(2.5).reshape(()),
        "empty": np.zeros((0, 3), dtype=np.float32),
        "same as scalar": np.float64(2.5).reshape(()),
    }
    with service_of(**tensors) as service:
        bringer = WeightsBringer(service.address)
        brought(bringer, service)
        files = num_files()
        found = brought(bringer, service)
        for name, tensor in tensors.items():
            assert found[name].tobytes() == tensor.tobytes(), name
        assert processes() == []
        assert num_files() == files


def test_what_the_service_refuses_is_told_as_it_says_it() -> None:
    def gone(_name: str, raw: RawTensor) -> Pieces:
        raise ConnectionError("the service goes away")

    with service_of(table=np.ones(3, dtype=np.float32)) as service:
        service.send = gone
        with pytest.raises(Unreachable, match="the service goes away"):
            brought(WeightsBringer(service.address, patience_s=0.0), service)
    with pytest.raises(Unreachable, match="Connection refused"):
        brought(WeightsBringer("127.0.0.1:1", patience_s=0.0), service)


def test_memory_of_another_size_is_not_written() -> None:
    with service_of(table=np.ones(3, dtype=np.float32)) as service:
        bringer = WeightsBringer(service.address)
        with pytest.raises(InvalidInput, match=r"\(11,\).*\(12,\)"):
            list(bringer.fetch_into(service.manifest.tensors, lambda entry: np.zeros(11, np.uint8)))
    assert processes() == []


def test_a_process_that_is_killed_costs_one_try(silent: ScriptedWeights) -> None:
    bringer, errors = WeightsBringer(silent.address), []

    def bring() -> None:
        try:
            brought(bringer, silent)
        except Unreachable as error:
            errors.append(str(error))

    bringing = threading.Thread(target=bring)
    bringing.start()
    wait_for(lambda: silent.asked)
    processes()[0].kill()
    bringing.join(10.0)
    assert errors == ["the process that brings weights in ended with exit code -9; try again"]
    with service_of(table=np.ones(3, dtype=np.float32)) as other:
        again = WeightsBringer(other.address)
        assert brought(again, other)["table"].tobytes() == np.ones(3, dtype=np.float32).tobytes()


def test_a_process_that_cannot_do_it_is_not_tried_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_bringer, "MODULE", "services.inference.not_there")
    with (
        service_of(table=np.ones(3, dtype=np.float32)) as service,
        pytest.raises(InternalError, match="exit code 1; the log"),
    ):
        brought(WeightsBringer(service.address), service)


def test_it_logs_as_the_engine_does(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_bringer.logs, "current", lambda: ("info", True))
    with service_of(table=np.ones(3, dtype=np.float32)) as service:
        brought(WeightsBringer(service.address), service)
    [said] = [json.loads(line) for line in capfd.readouterr().err.splitlines() if line[:1] == "{"]
    assert (said["process"], said["message"]) == ("bring-in", "bringing 1 tensors in, 0.0 MB")


def test_close_ends_what_is_brought_in_and_what_would_be(silent: ScriptedWeights) -> None:
    bringer, cancelled = WeightsBringer(silent.address), threading.Event()

    def bring() -> None:
        with pytest.raises(Cancelled):
            brought(bringer, silent)
        cancelled.set()

    threading.Thread(target=bring).start()
    wait_for(lambda: silent.asked)
    bringer.close()
    assert cancelled.wait(5.0)
    assert processes() == []
    with pytest.raises(Cancelled):
        brought(bringer, silent)


def test_it_ends_with_the_engine_that_started_it(silent: ScriptedWeights) -> None:
    code = f"""
import numpy as np
from manyhands.weights.v1 import weights_pb2
from services.inference.weights_bringer import WeightsBringer
entry = weights_pb2.TensorEntry.FromString(bytes.fromhex({silent.manifest.tensors[0].SerializeToString().hex()!r}))
list(WeightsBringer({silent.address!r}).fetch_into([entry], lambda entry: np.zeros(400, np.uint8)))
"""
    engine = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: silent.asked)
    [bringing] = processes(engine.pid)
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    assert bringing.wait(5.0) is None or not bringing.is_running()


def test_a_version_that_the_service_has_dropped_is_not_found() -> None:
    with service_of(table=np.ones(3, dtype=np.float32)) as service:
        service.missing = True
        with pytest.raises(NotFound):
            brought(WeightsBringer(service.address), service)


@pytest.mark.parametrize(
    ("dtype", "finite", "not_finite"),
    [
        (common_pb2.DATA_TYPE_FLOAT16, np.float16([1, -65504]), np.float16([1, np.inf])),
        (common_pb2.DATA_TYPE_BFLOAT16, np.array([0x3F80, 0xFF7F], "<u2"), np.array([0x3F80, 0xFFC0], "<u2")),
        (common_pb2.DATA_TYPE_FLOAT32, np.float32([1, 3e38]), np.float32([1, -np.inf])),
        (common_pb2.DATA_TYPE_FLOAT64, np.float64([1, 1e308]), np.float64([np.nan, 1])),
        (common_pb2.DATA_TYPE_INT64, np.array([-1, 1 << 62]), None),
    ],
)
def test_numbers_that_are_none_are_found_wherever_they_are(
    dtype: int, finite: np.ndarray, not_finite: np.ndarray | None
) -> None:
    assert bring_in.is_finite(dtype, finite.view(np.uint8))
    assert bring_in.is_finite(dtype, np.zeros(0, np.uint8))
    if not_finite is not None:
        assert not bring_in.is_finite(dtype, not_finite.view(np.uint8))
        many = np.concatenate([np.tile(finite, 1 << 18), not_finite])
        assert not bring_in.is_finite(dtype, many.view(np.uint8))


def test_it_has_the_priority_of_the_thread_that_starts_it(silent: ScriptedWeights) -> None:
    bringer, seen = WeightsBringer(silent.address), []

    def bring() -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 7)
        with pytest.raises(Cancelled):
            brought(bringer, silent)

    bringing = threading.Thread(target=bring)
    bringing.start()
    wait_for(lambda: silent.asked)
    seen.append(processes()[0].nice())
    bringer.close()
    bringing.join(10.0)
    assert seen == [7]
