"""What fault tests of the inference service share: a server of each path, robots that go on asking, and who lives.

"plain" serves the flow policy, with a small pi052 beside it for text; "fused" serves that pi052 from prepared units.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import psutil
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.local import Service, Topology
from manyhands.clients.act_stream import ActStream, Chunk, Refusal, Reply
from manyhands.clients.inference import InferenceClient, Session
from manyhands.errors import Overloaded
from manyhands.inference.v1 import inference_pb2
from manyhands.security import SecuritySettings
from manyhands.spec import Spec
from policies import checkpoint
from policies.policy import Policy, Sample, TextKind, TextRequest
from services.inference.service import SERVICE_NAME

from . import inference_lab, prompted_lab
from .inference_lab import RAW, Arrays
from .waiting import wait_until

DEADLINE_S = 5.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
PATHS = ("plain", "fused")
CHUNK_MODEL, TEXT_MODEL = "tiny", "talker"
# The fused path adds in another order than the plain module.
TOLERANCE = {"plain": 0.0, "fused": 1e-5}
MAX_NEW_TOKENS = 1024
# Of an answer that is waited for.
NUM_TOKENS = 300
TASK = "reach"


@functools.cache
def chunk_policy(path: str) -> Policy[Any]:
    return inference_lab.make_policy(0) if path == "plain" else text_policy()


@functools.cache
def text_policy() -> Policy[Any]:
    """Long answers, so that something can happen in the middle of one."""
    return prompted_lab.policy("pi052", max_new_tokens=MAX_NEW_TOKENS).eval()


@dataclass(frozen=True, kw_only=True)
class Lab:
    """A running server of one path, and what it must answer."""

    path: str
    service: Service

    @property
    def address(self) -> str:
        return self.service.address

    @property
    def model(self) -> str:
        """That chunks are asked of."""
        return CHUNK_MODEL if self.path == "plain" else TEXT_MODEL

    @property
    def spec(self) -> Spec:
        return inference_lab.SPEC if self.path == "plain" else prompted_lab.SPEC

    def open_session(self, client: InferenceClient, robot_id: str, *, client_id: str = "") -> Session:
        return self._open(client, robot_id=robot_id, client_id=client_id, model=self.model, spec=self.spec)

    def _open(self, client: InferenceClient, *, client_id: str = "", **fields: Any) -> Session:
        """Comes back as late as it is told to: robots of the last test, and what they asked, count for a while longer."""
        give_up_s = time.monotonic() + 20.0
        while True:
            try:
                return client.open_session(client_id=client_id or uuid.uuid4().hex, replan_interval_steps=4, **fields)
            except Overloaded as error:
                if time.monotonic() > give_up_s or error.retry_after_s is None:
                    raise
                time.sleep(max(0.1, error.retry_after_s))

    def observation(self, seed: int) -> Arrays:
        return inference_lab.make_observation(seed) if self.path == "plain" else picture_and_state(seed)

    def ask(self, stream: ActStream, seed: int, *, deadline_s: float = DEADLINE_S) -> int:
        return stream.send(
            observation=self.observation(seed),
            noise_seed=seed,
            task=TASK,
            image_encoding=RAW,
            deadline_s=deadline_s,
        )

    def check_chunk(self, actions: npt.NDArray[np.float32], seed: int) -> None:
        """actions are those of ask(seed)."""
        expected = self.expected(seed)
        assert actions.shape == expected.shape
        error = float(np.linalg.norm(actions - expected) / np.linalg.norm(expected))
        assert error <= TOLERANCE[self.path], f"the chunk of seed {seed} is off by {error:.1e}"

    def expected(self, seed: int) -> npt.NDArray[np.float32]:
        """(H, R): what the policy answers to ask(seed) when it is called directly."""
        policy = chunk_policy(self.path)
        with torch.inference_mode():
            inputs = policy.preprocess([Sample(observation=self.observation(seed), task=TASK)], torch.device("cpu"))
            actions: npt.NDArray[np.float32] = policy.postprocess(policy.act(inputs, policy.draw_noise([seed])), inputs)[0]
        return actions

    def wait_until_serving(self) -> None:
        """Until health says so, after its engine was killed."""
        with grpc.insecure_channel(self.address) as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
            wait_until(lambda: check(request, timeout=5.0).status == SERVING, 60.0)

    def open_talk(self, client: InferenceClient, robot_id: str) -> Session:
        """A session with the model that has a text head."""
        return self._open(client, robot_id=robot_id, model=TEXT_MODEL, spec=prompted_lab.SPEC)


def talk(client: InferenceClient, session: Session, seed: int, **fields: Any) -> Iterator[inference_pb2.GenerateResponse]:
    """Asks what text() knows the answer to, a token at a time."""
    return client.generate(
        session.session_id,
        kind=inference_pb2.TEXT_KIND_SUBTASK,
        observation=picture_and_state(seed),
        task=f"tidy up {seed}",
        **{"deadline_s": 30.0, "max_new_tokens": NUM_TOKENS, **fields},
    )


@functools.cache
def text(seed: int) -> str:
    sample = Sample(observation=picture_and_state(seed), task=f"tidy up {seed}")
    with torch.inference_mode():
        request = TextRequest(kind=TextKind.SUBTASK, max_new_tokens=NUM_TOKENS)
        return "".join(text_policy().generate([sample], request, torch.device("cpu")))


def picture_and_state(seed: int) -> Arrays:
    """A picture of one grey, which JPEG keeps as it is."""
    random_numbers = np.random.default_rng(seed)
    grey = int(random_numbers.integers(0, 256))
    return {
        prompted_lab.CAMERA: np.full((16, 16, 3), grey, dtype=np.uint8),
        prompted_lab.STATE: random_numbers.uniform(-1.0, 1.0, 2).astype(np.float32),
    }


def save_checkpoints(folder: Path) -> None:
    checkpoint.save(inference_lab.make_policy(0), folder / CHUNK_MODEL)
    checkpoint.save(text_policy(), folder / TEXT_MODEL)


def serve(topology: Topology, checkpoints: Path, path: str, *flags: str, name: str = "") -> Lab:
    """`manyhands serve` of that path as a process."""
    models = [CHUNK_MODEL, TEXT_MODEL] if path == "plain" else [TEXT_MODEL]
    chosen = [flag for model in models for flag in ("--model", f"{model}={checkpoints / model}")]
    command = ["serve", *chosen, "--path", path, "--address", "127.0.0.1:0", *flags]
    return Lab(path=path, service=topology.start(name or f"serve-{path}", command))


def engine_of(service: Service) -> psutil.Process | None:
    """The one engine process of a front end, if it lives."""
    found = []
    for child in psutil.Process(service.process.pid).children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE and "services.inference.engine_process" in child.cmdline():
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    assert len(found) <= 1, "two engines at once"
    return found[0] if found else None


def kill_engine(service: Service) -> int:
    """kill -9; its process id."""
    engine = engine_of(service)
    assert engine is not None
    engine.kill()
    return engine.pid


def new_engine(service: Service, *killed: int) -> int:
    """Waits for an engine that is not one of those; its process id."""

    def found() -> int:
        engine = engine_of(service)
        return engine.pid if engine is not None and engine.pid not in killed else 0

    return wait_until(found)


@dataclass
class Robot:
    """Asks again when it was answered, after a refusal as late as it was told to. Keeps what it sent and got."""

    lab: Lab
    client: InferenceClient
    name: str
    sent: dict[int, int] = field(default_factory=dict)
    replies: list[Reply] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        first = sum(map(ord, self.name)) * 1000  # No two robots ask the same.
        try:
            with self.client.act_stream(self.lab.open_session(self.client, self.name).session_id) as stream:
                for seed in itertools.count(first):
                    self.sent[self.lab.ask(stream, seed)] = seed
                    reply = inference_lab.next_reply(stream)
                    self.replies.append(reply)
                    pause_s = reply.result.retry_after_s if isinstance(reply.result, Refusal) else 0.005
                    if self._stop.wait(pause_s):
                        return
        except BaseException as error:
            self.failures.append(error)

    @property
    def refusals(self) -> list[Refusal]:
        return [reply.result for reply in self.replies if isinstance(reply.result, Refusal)]

    def chunks_since(self, index: int) -> int:
        return sum(isinstance(reply.result, Chunk) for reply in self.replies[index:])

    def stop(self) -> None:
        self._stop.set()
        self.thread.join(20.0)
        assert not self.thread.is_alive()
        assert self.failures == [], f"the stream of {self.name} did not last"

    def check(self, every: int = 1) -> None:
        """Every request was answered once, and each chunk looked at is its own request's.

        Args:
            every: One of so many is computed again; the last always.
        """
        assert [reply.request_id for reply in self.replies] == list(self.sent)
        chunks = [(reply.request_id, reply.result) for reply in self.replies if isinstance(reply.result, Chunk)]
        for request_id, chunk in (*chunks[::every], *chunks[-1:]):
            self.lab.check_chunk(chunk.actions, self.sent[request_id])


class HealthWatch:
    """What health said of the service, one after the other."""

    def __init__(self, address: str) -> None:
        self.statuses: list[int] = []
        self._channel = grpc.insecure_channel(address)
        self._call = health_pb2_grpc.HealthStub(self._channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for answer in self._call:
                self.statuses.append(answer.status)
        except grpc.RpcError:
            pass

    def close(self) -> None:
        self._call.cancel()
        self._thread.join(5.0)
        self._channel.close()


def secured(folder: Path, authority: Path | None = None) -> SecuritySettings:
    """As an identity of manyhands lab-certificates."""
    return SecuritySettings(
        certificate=folder / "certificate.pem", key=folder / "key.pem", authority=authority or folder / "authority.pem"
    )
