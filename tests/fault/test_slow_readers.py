"""A client that reads nothing of what it is answered: held back, while the others are served as ever."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil

from manyhands import channel, codec, stamps
from manyhands.clients.act_stream import Chunk
from manyhands.clients.inference import InferenceClient
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2
from tests.support.fault_lab import TASK, Lab, engine_of
from tests.support.inference_lab import RAW, next_reply
from tests.support.waiting import wait_until

MAX_GROWTH_BYTES = 24 * 1024 * 1024
NEIGHBOUR_DEADLINE_S = 2.0


def test_a_reader_that_does_not_read_holds_up_nobody(plain_lab: Lab) -> None:
    lab = plain_lab
    with InferenceClient(lab.address) as client, channel.connect(lab.address) as raw:
        with client.act_stream(lab.open_session(client, "before").session_id) as stream:
            for seed in range(5):
                lab.ask(stream, seed)
                next_reply(stream)
        engine = engine_of(lab.service)
        assert engine is not None
        processes = (psutil.Process(lab.service.process.pid), engine)
        before = [process.memory_info().rss for process in processes]
        session = lab.open_session(client, "deaf")
        observation = common_pb2.Observation(values=codec.encode_values(lab.observation(1), image_encoding=RAW))
        sent = 0

        def endless() -> Iterator[bytes]:
            nonlocal sent
            while True:
                sent += 1
                yield inference_pb2.ActRequest(
                    session_id=session.session_id,
                    request_id=sent,
                    observation=observation,
                    task=TASK,
                    deadline=stamps.to_duration(NEIGHBOUR_DEADLINE_S),
                ).SerializeToString()

        deaf = raw.stream_stream("/manyhands.inference.v1.InferenceService/Act")(endless(), timeout=60.0)
        wait_until(lambda: sent > 50)
        with client.act_stream(lab.open_session(client, "quick").session_id) as stream:
            for seed in range(20):  # While the deaf one's are still taken.
                lab.ask(stream, seed, deadline_s=NEIGHBOUR_DEADLINE_S)
                assert isinstance(next_reply(stream).result, Chunk)

            def held_back() -> bool:
                """Nothing more is taken from a client that reads nothing."""
                already, until_s = sent, time.monotonic() + 0.5
                wait_until(lambda: time.monotonic() > until_s or sent > already)
                return sent == already

            wait_until(held_back)
            for seed in range(20):
                lab.ask(stream, seed, deadline_s=NEIGHBOUR_DEADLINE_S)
                result = next_reply(stream).result
                assert isinstance(result, Chunk)
                lab.check_chunk(result.actions, seed)
        grown = [process.memory_info().rss - was for process, was in zip(processes, before, strict=True)]
        assert all(growth < MAX_GROWTH_BYTES for growth in grown), f"front end and engine grew by {grown} bytes"
        deaf.cancel()
        # What it did not read is forgotten with its stream.
        wait_until(lambda: all(not status.connected for status in client.status().sessions if status.robot_id == "deaf"))
