"""What an actor needs around it: robot and actor as processes, store and inference service as small servers of this process.

The two servers speak the real contracts over real sockets, and can be stopped, restarted on the same port and made to
misbehave, which a real service is not asked to do.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from manyhands import codec, errors, stamps
from manyhands.common.v1 import common_pb2
from manyhands.dataset.v1 import dataset_pb2, dataset_pb2_grpc
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.server import SERVER_OPTIONS
from manyhands.spec import Spec

REPOSITORY = Path(__file__).parents[2]


class Process:
    """A manyhands command that prints READY."""

    def __init__(self, *words: str, log: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._log = log
        with log.open("ab") as file:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "manyhands", *words],
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                cwd=log.parent,
                text=True,
            )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line.startswith("READY "), f"{words[0]} did not start: {log.read_text()[-2000:]}"
        self.address = line.split()[1]

    def kill(self) -> None:
        """kill -9"""
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(10)

    def stop_and_go(self, seconds: float) -> None:
        self.popen.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.popen.send_signal(signal.SIGCONT)

    def terminate(self, timeout_s: float = 10.0) -> int:
        """SIGTERM; the exit code."""
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    @property
    def log(self) -> str:
        return self._log.read_text()


def start_robot(folder: Path, name: str = "left", *, address: str = "127.0.0.1:0", **flags: object) -> Process:
    words = ["--robot", "arm", "--robot-id", name, "--address", address, "--state-dir", str(folder / f"robot-{name}")]
    for flag, value in flags.items():
        words += [f"--{flag.replace('_', '-')}", str(value)]
    return Process("robot", *words, log=folder / f"robot-{name}.log")


def start_actor(folder: Path, robot: str, *flags: str, name: str = "left") -> Process:
    words = ["--robot", robot, "--spool", str(folder / f"spool-{name}"), *flags]
    return Process("actor", *words, log=folder / f"actor-{name}.log")


class Server:
    """A sync gRPC server that can be stopped and come back on its port."""

    def __init__(self, register: Callable[[Any, grpc.Server], None], servicer: Any) -> None:
        self._register = register
        self.servicer = servicer
        self.address = ""
        self._server: grpc.Server | None = None
        self.start()

    def start(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(32), options=SERVER_OPTIONS)
        self._register(self.servicer, self._server)
        port = self._server.add_insecure_port(self.address or "127.0.0.1:0")
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        """Cuts every stream."""
        if self._server is not None:
            self._server.stop(grace=None).wait()
            self._server = None


@dataclass
class StoredEpisode:
    begin: dataset_pb2.Begin
    frames: list[dataset_pb2.Frame] = field(default_factory=list)
    end: dataset_pb2.End | None = None
    discarded: bool = False


def abort(context: grpc.ServicerContext, error: errors.ManyhandsError) -> None:
    status = errors.to_status(error)
    context.set_trailing_metadata(((errors.STATUS_DETAILS_KEY, status.SerializeToString()),))
    context.abort(error.code, status.message)


class MemoryStore(dataset_pb2_grpc.DatasetServiceServicer):
    """Keeps episodes over its server's restarts; complains into problems about anything the contract forbids."""

    def __init__(self) -> None:
        self.datasets: dict[str, dataset_pb2.DatasetDefinition] = {}
        self.episodes: dict[str, StoredEpisode] = {}
        self.acked: dict[str, int] = {}
        self.problems: list[str] = []
        self.seals: list[str] = []

    def GetDataset(self, request: dataset_pb2.GetDatasetRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if request.dataset not in self.datasets:
            abort(context, errors.NotFound(f"no dataset {request.dataset!r}"))
        info = dataset_pb2.DatasetInfo(definition=self.datasets[request.dataset])
        return dataset_pb2.GetDatasetResponse(dataset=info)

    def CreateDataset(self, request: dataset_pb2.CreateDatasetRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        definition = request.definition
        if self.datasets.setdefault(definition.name, definition) != definition:
            abort(context, errors.AlreadyExists(f"dataset {definition.name} is another"))
        return dataset_pb2.CreateDatasetResponse(dataset=dataset_pb2.DatasetInfo(definition=definition))

    def AppendEpisode(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        uuid = ""
        for request in requests:
            part = request.WhichOneof("part")
            if part == "begin":
                uuid = request.begin.episode_uuid
                episode = self.episodes.setdefault(uuid, StoredEpisode(begin=request.begin))
                if episode.end is not None:
                    yield self._answer(uuid, sealed=dataset_pb2.Sealed(frame_count=len(episode.frames)))
                else:
                    yield self._answer(uuid, resume=dataset_pb2.Resume(next_sequence=len(episode.frames)))
            elif part == "frame":
                if request.frame.sequence != len(episode.frames):
                    self.problems.append(f"{uuid}: frame {request.frame.sequence} after {len(episode.frames)}")
                    abort(context, errors.OutOfOrder("a hole"))
                episode.frames.append(request.frame)
                self.acked[uuid] = request.frame.sequence
                yield self._answer(uuid, ack=dataset_pb2.Ack(durable_sequence=request.frame.sequence))
            elif part == "end":
                digest = hashlib.sha256(b"".join(f.SerializeToString(deterministic=True) for f in episode.frames)).digest()
                if (request.end.frame_count, request.end.sha256) != (len(episode.frames), digest):
                    self.problems.append(f"{uuid}: end does not fit its frames")
                    abort(context, errors.Corrupt("end does not fit"))
                episode.end = request.end
                self.seals.append(uuid)
                yield self._answer(uuid, sealed=dataset_pb2.Sealed(frame_count=len(episode.frames)))
            else:
                self.episodes.pop(uuid, None)
                yield self._answer(uuid, discarded=dataset_pb2.Discarded())

    @property
    def sealed(self) -> list[StoredEpisode]:
        return [self.episodes[uuid] for uuid in self.seals]

    def _answer(self, uuid: str, **part: Any) -> dataset_pb2.AppendEpisodeResponse:
        return dataset_pb2.AppendEpisodeResponse(episode_uuid=uuid, **part)


class ScriptedPolicy(inference_pb2_grpc.InferenceServiceServicer):
    """Answers every observation of the arm with a straight line to its goal; counts what it was asked."""

    horizon = 16

    def __init__(self, model_spec: Spec) -> None:
        self.model_spec = model_spec
        self.required = ["observation.state"]
        self.sessions: dict[str, str] = {}
        self.holders: dict[str, str] = {}
        self.requests: list[inference_pb2.ActRequest] = []
        self.version = 0
        self.delay_s = 0.0
        self.speed = 0.05  # rad a step
        self.corrupt: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]] = lambda actions: actions
        self.drain = threading.Event()
        self.refuse = ""
        self.has_text_head = False
        self.says: list[str] = []  # To questions for a subtask, one after the other; "" is refused as no instruction.
        self.thinks = False  # Says nothing, for as long as it thinks.

    def restarted(self) -> None:
        """What a new process knows: nothing."""
        self.sessions.clear()
        self.holders.clear()

    def OpenSession(self, request: inference_pb2.OpenSessionRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        if self.refuse:
            abort(context, errors.InvalidInput("does not fit the model", field=self.refuse))
        if self.holders.setdefault(request.robot_id, request.client_id) != request.client_id:
            error = errors.AlreadyExists(
                f"robot {request.robot_id!r} has a live session", field="robot_id", retry_after_s=1.0
            )
            abort(context, error)
        session_id = f"{request.robot_id}-{len(self.sessions)}"
        self.sessions[session_id] = request.robot_id
        return inference_pb2.OpenSessionResponse(
            session_id=session_id,
            model_spec=self.model_spec.to_proto(),
            version=self._version(),
            chunk_horizon=self.horizon,
            replan_interval_steps=request.replan_interval_steps,
            has_text_head=self.has_text_head,
            required_observations=self.required,
        )

    def CloseSession(self, request: inference_pb2.CloseSessionRequest, context: grpc.ServicerContext) -> Any:  # noqa: N802
        robot = self.sessions.pop(request.session_id, "")
        self.holders.pop(robot, None)
        return inference_pb2.CloseSessionResponse()

    def Act(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        for request in requests:
            self.requests.append(request)
            answer = inference_pb2.ActResponse(
                session_id=request.session_id,
                request_id=request.request_id,
                version=self._version(),
                request_sent=request.sent,
                times=inference_pb2.StageTimes(total=stamps.to_duration(self.delay_s), batch_size=1),
            )
            if request.session_id not in self.sessions:
                answer.refusal.reason = inference_pb2.REFUSAL_REASON_UNKNOWN_SESSION
                yield answer
                continue
            time.sleep(self.delay_s)
            state = np.asarray(codec.decode_value(request.observation.values[0]), dtype=np.float64)
            position, goal = state[:6], state[6:]
            steps = np.arange(1, self.horizon + 1)[:, None]
            actions = self.corrupt(
                (position + np.clip(goal - position, -self.speed * steps, self.speed * steps)).astype(np.float32)
            )
            answer.chunk.actions.CopyFrom(codec.encode_tensor(actions))
            answer.chunk.model_actions.CopyFrom(codec.encode_tensor(actions))
            yield answer
            if request.ask_subtask_for and self.says and not self.thinks:
                text = self.says.pop(0)
                yield inference_pb2.ActResponse(
                    session_id=request.session_id,
                    request_id=request.request_id,
                    version=self._version(),
                    request_sent=request.sent,
                    subtask=inference_pb2.Subtask(text=text, accepted=bool(text), reason="" if text else "no instruction"),
                )
            if self.drain.is_set():
                self.drain.clear()
                yield inference_pb2.ActResponse(drain=inference_pb2.Drain(reason="maintenance"))

    def _version(self) -> common_pb2.PolicyVersion:
        return common_pb2.PolicyVersion(model="line", number=self.version, digest=bytes([self.version]) * 32)


def serve_store() -> tuple[Server, MemoryStore]:
    store = MemoryStore()
    return Server(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, store), store


def serve_policy(spec: Spec) -> tuple[Server, ScriptedPolicy]:
    policy = ScriptedPolicy(spec)
    return Server(inference_pb2_grpc.add_InferenceServiceServicer_to_server, policy), policy
