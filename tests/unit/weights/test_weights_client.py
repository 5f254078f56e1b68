"""Tensors that come piece by piece to where they belong: each checked, none joined in memory, none asked for twice."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from manyhands import weights_manifest
from manyhands.clients.weights import Bytes, WeightsClient, pieces
from manyhands.errors import Corrupt, InvalidInput, Unreachable
from manyhands.weights.v1 import weights_pb2
from manyhands.weights_manifest import PIECE_BYTES, RawTensor
from tests.support.scripted_weights import Pieces, ScriptedWeights, wrong_pieces

LARGE_BYTES = 8 * PIECE_BYTES
TENSORS = {
    name: weights_manifest.raw_tensor(value)
    for name, value in {
        "bias": np.arange(4, dtype=np.float32),
        "empty": np.zeros((0, 3), np.float32),
        "norm": np.full(4, 2.5, np.float32),
        "table": np.arange(LARGE_BYTES // 4, dtype=np.int32),
        "tied": np.arange(4, dtype=np.float32),
    }.items()
}
MANIFEST = weights_manifest.build(
    model="tiny", policy_type="flow", config_json="{}", spec=None, tensors=TENSORS, publish_id="run/1"
)


@pytest.fixture
def service() -> Iterator[ScriptedWeights]:
    with ScriptedWeights(MANIFEST, TENSORS) as service:
        yield service


@pytest.fixture
def client(service: ScriptedWeights) -> Iterator[WeightsClient]:
    with WeightsClient(service.address, patience_s=5.0) as client:
        yield client


class Places:
    """Memory for every tensor, and which of it was asked for, in order."""

    def __init__(self) -> None:
        self.memory = {name: np.full(memoryview(raw.data).nbytes, 255, np.uint8) for name, raw in TENSORS.items()}
        self.asked: list[str] = []

    def __call__(self, entry: weights_pb2.TensorEntry) -> Bytes:
        self.asked.append(entry.name)
        return self.memory[entry.name]

    def hold(self, name: str) -> bool:
        return self.memory[name].tobytes() == bytes(TENSORS[name].data)


def test_every_tensor_comes_to_its_place_and_equal_ones_come_once(service: ScriptedWeights, client: WeightsClient) -> None:
    places = Places()
    whole = [entry.name for entry in client.fetch_into(MANIFEST.tensors, places)]
    assert sorted(whole) == sorted(places.asked) == sorted(TENSORS)
    assert [name for name in TENSORS if not places.hold(name)] == []
    assert service.asked == [["bias", "empty", "norm", "table"]]


def test_a_tensor_is_known_before_the_next_one_is_written(client: WeightsClient) -> None:
    places = Places()
    for entry in client.fetch_into(MANIFEST.tensors, places):
        assert places.asked[-1] == entry.name


@pytest.mark.parametrize("way", wrong_pieces())
def test_wrong_pieces_are_refused_with_the_tensor_s_name(service: ScriptedWeights, client: WeightsClient, way: str) -> None:
    def send(name: str, raw: RawTensor) -> Pieces:
        return wrong_pieces()[way](raw) if name == "norm" else pieces(raw.sha256, raw.data)

    service.send = send
    places = Places()
    whole = []
    with pytest.raises(Corrupt) as refused:
        whole.extend(entry.name for entry in client.fetch_into(MANIFEST.tensors, places))
    assert refused.value.field == "norm"
    assert whole == ["bias", "tied", "empty"]
    assert len(service.asked) == 1, "wrong bytes are not asked for again"
    assert places.hold("bias")


def test_a_broken_link_begins_only_the_broken_tensor_again(service: ScriptedWeights, client: WeightsClient) -> None:
    def send(name: str, raw: RawTensor) -> Pieces:
        for number, piece in enumerate(pieces(raw.sha256, raw.data)):
            if name == "table" and number == 3 and len(service.asked) == 1:
                raise ConnectionError("the link is cut")
            yield piece

    service.send = send
    places = Places()
    for _ in client.fetch_into(MANIFEST.tensors, places):
        pass
    assert places.hold("table")
    assert service.asked == [["bias", "empty", "norm", "table"], ["table"]]
    assert places.asked.count("table") == 2
    assert places.asked.count("bias") == 1


def test_what_place_raises_comes_out_and_a_stream_that_ends_early_is_unreachable(service: ScriptedWeights) -> None:
    with WeightsClient(service.address, patience_s=0.0) as client:
        with pytest.raises(InvalidInput, match=r"bias: the memory for it has shape \(3,\), its bytes need \(16,\)"):
            list(client.fetch_into(MANIFEST.tensors, lambda entry: np.empty(3, np.uint8)))
        service.send = lambda name, raw: iter(()) if name == "table" else pieces(raw.sha256, raw.data)
        with pytest.raises(Unreachable, match="1 tensors early"):
            list(client.fetch_into(MANIFEST.tensors, Places()))


def test_nothing_as_large_as_a_tensor_is_allocated_while_it_comes(client: WeightsClient) -> None:
    """Such memory is filled, and given back, while no other thread has the interpreter."""
    places = Places()
    entry = next(entry for entry in MANIFEST.tensors if entry.name == "table")
    tracemalloc.start()
    try:
        list(client.fetch_into([entry], places))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert places.hold("table")
    # The service's copies are in this process too: a piece is in memory up to three times on each side.
    assert peak_bytes < LARGE_BYTES * 3 // 4
