"""Traces of requests, as a real OTLP collector over gRPC receives them from a real `manyhands serve`."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from deploy.local import Service, Topology
from manyhands.clients.inference import InferenceClient
from manyhands.errors import InvalidInput, Refused
from manyhands.inference.v1 import inference_pb2
from policies import checkpoint
from services.inference.tracing import Traces
from tests.support import prompted_lab
from tests.support.inference_lab import (
    ENVIRONMENT,
    ask,
    make_observation,
    make_policy,
    next_chunk,
    next_refusal,
    next_reply,
    open_session,
    serve,
)
from tests.support.waiting import wait_until


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps what it gets."""

    def __init__(self) -> None:
        self.received: list[trace_pb2.ResourceSpans] = []

    def Export(self, request: Any, context: Any) -> trace_service_pb2.ExportTraceServiceResponse:  # noqa: N802
        self.received.extend(request.resource_spans)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[trace_pb2.Span]:
        return [span for resource in self.received for scope in resource.scope_spans for span in scope.spans]

    def named(self, name: str) -> list[trace_pb2.Span]:
        return [span for span in self.spans() if span.name == name and not span.parent_span_id]

    def children(self, parent: trace_pb2.Span) -> list[trace_pb2.Span]:
        found = [span for span in self.spans() if span.parent_span_id == parent.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)


def attributes(span: trace_pb2.Span | trace_pb2.ResourceSpans) -> dict[str, Any]:
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in span.attributes}


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(max_workers=2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}"
    server.stop(None)


@pytest.fixture
def topology(tmp_path: Path) -> Iterator[Topology]:
    with Topology(tmp_path / "logs", environment=ENVIRONMENT) as topology:
        yield topology


def test_a_chunk_is_a_span_with_its_stages_and_so_is_a_text(
    topology: Topology, tmp_path: Path, collector: tuple[Collector, str]
) -> None:
    received, endpoint = collector
    checkpoint.save(prompted_lab.policy("pi052"), tmp_path / "talks")
    flags = ("--model", f"talks={tmp_path / 'talks'}", "--otlp-endpoint", endpoint)
    service = serve(topology, tmp_path / "tiny", make_policy(0), *flags)
    before_ns = time.time_ns()
    with InferenceClient(service.address) as client:
        session = open_session(client, "left")
        with client.act_stream(session.session_id) as stream:
            ask(stream, 1)
            next_chunk(stream)
            bad = make_observation(9)
            bad["observation.state"] = np.full_like(bad["observation.state"], np.nan)
            ask(stream, 9, observation=bad)
            next_refusal(stream)
        reader = client.open_session(
            robot_id="reader", client_id="reader-1", model="talks", spec=prompted_lab.SPEC, replan_interval_steps=3
        )
        answers = client.generate(
            reader.session_id,
            kind=inference_pb2.TEXT_KIND_SUBTASK,
            observation=dict(prompted_lab.sample().observation),
            task="tidy up",
            request_id="q7",
            max_new_tokens=4,
        )
        tokens = list(answers)[-1].token_count
        with client.act_stream(reader.session_id) as stream:
            observation = dict(prompted_lab.sample().observation)
            ask(stream, 1, observation=observation, task="tidy up", ask_subtask_for="tidy up")
            next_reply(stream)
            next_reply(stream)
    wait_until(lambda: (len(received.named("chunk")), len(received.named("text"))) == (3, 2), 15, "spans arrive")
    after_ns = time.time_ns()
    assert attributes(received.received[0].resource)["service.name"] == "manyhands-inference"
    chunk, refused, _ = sorted(received.named("chunk"), key=lambda span: span.start_time_unix_nano)
    assert before_ns < chunk.start_time_unix_nano < chunk.end_time_unix_nano < after_ns
    told = attributes(chunk)
    assert (told["manyhands.session"], told["manyhands.request_id"]) == (session.session_id[:8], "1")
    assert (told["manyhands.robot"], told["manyhands.model"], told["manyhands.version"]) == ("left", "tiny", 0)
    assert (told["manyhands.batch_size"], told["manyhands.is_late"]) == (1, False)
    stages = received.children(chunk)
    assert [stage.name for stage in stages] == ["decode", "queue", "prefix", "sample", "postprocess"]
    assert all(stage.trace_id == chunk.trace_id for stage in stages)
    assert stages[0].start_time_unix_nano == chunk.start_time_unix_nano
    for one, following in itertools.pairwise(stages):
        assert one.end_time_unix_nano == following.start_time_unix_nano
    assert stages[-1].end_time_unix_nano <= chunk.end_time_unix_nano
    sampled = next(stage for stage in stages if stage.name == "sample")
    assert sampled.end_time_unix_nano > sampled.start_time_unix_nano
    assert refused.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert "finite" in refused.status.message
    assert (attributes(refused)["manyhands.refusal"], attributes(refused)["manyhands.request_id"]) == ("invalid", "2")
    text, subtask = sorted(received.named("text"), key=lambda span: span.start_time_unix_nano)
    told = attributes(text)
    assert (told["manyhands.request_id"], told["manyhands.robot"], told["manyhands.tokens"]) == ("q7", "reader", tokens)
    assert told["manyhands.text_kind"] == "subtask"
    told = attributes(subtask)
    assert (told["manyhands.text_kind"], told["manyhands.robot"], told["manyhands.request_id"]) == ("subtask", "reader", "1")
    assert session.session_id not in str(received.spans()), "whoever has all of it could speak for the session"


def test_a_share_of_requests_is_traced(topology: Topology, tmp_path: Path, collector: tuple[Collector, str]) -> None:
    received, endpoint = collector
    service = serve(topology, tmp_path / "tiny", make_policy(0), "--otlp-endpoint", endpoint, "--trace-share", "0.3")
    with InferenceClient(service.address) as client:
        session = open_session(client, "left")
        with client.act_stream(session.session_id) as stream:
            for seed in range(100):
                ask(stream, seed)
                next_chunk(stream)
    topology.stop("serve")
    # Binomial(100, 0.3) is outside with a probability of 1e-6.
    assert 9 <= len(received.named("chunk")) <= 56
    assert len(received.spans()) == 6 * len(received.named("chunk")), "whole traces, nothing was lost at the end"


def test_a_collector_that_is_away_or_hangs_holds_nothing_up(topology: Topology, tmp_path: Path) -> None:
    hanging = subprocess.Popen(
        [sys.executable, "-c", "import socket,time\ns=socket.create_server(('127.0.0.1',0))\n"
         "print(s.getsockname()[1],flush=True)\ntime.sleep(600)"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert hanging.stdout is not None
        endpoints = {"away": "127.0.0.1:1", "hangs": f"127.0.0.1:{int(hanging.stdout.readline())}"}
        for name, endpoint in endpoints.items():
            service = serve(topology, tmp_path / "tiny", make_policy(0), "--otlp-endpoint", endpoint, name=name)
            _serve_some(service)
            started = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(10) == 0
            assert time.monotonic() - started < 5
            assert service.log_path.read_text().count("Failed to export") <= 1, "it does not fill the log"
    finally:
        hanging.kill()
        hanging.wait()


def _serve_some(service: Service) -> None:
    with InferenceClient(service.address) as client:
        session = open_session(client, "left")
        with client.act_stream(session.session_id) as stream:
            for seed in range(20):
                ask(stream, seed)
                next_chunk(stream)


def test_what_cannot_be_is_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="not loopback and needs TLS"):
        Traces("collector.example:4317")
    for endpoint in ("http://127.0.0.1:4317", "127.0.0.1", "127.0.0.1:4317/v1/traces"):
        with pytest.raises(InvalidInput, match="HOST:PORT"):
            Traces(endpoint)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    with pytest.raises(Refused, match=r"pip install 'manyhands\[trace\]'"):
        Traces("127.0.0.1:4317")
