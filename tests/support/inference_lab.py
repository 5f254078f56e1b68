"""What tests of the inference service share: a small policy, observations, and a server in this process or its own."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from deploy.local import Service, Topology
from manyhands import codec, stamps
from manyhands.clients.act_stream import ActStream, Chunk, Refusal, Reply
from manyhands.clients.inference import InferenceClient, Session
from manyhands.common.v1 import common_pb2
from manyhands.inference.v1 import inference_pb2, inference_pb2_grpc
from manyhands.server import GrpcServer
from manyhands.spec import Feature, FeatureKind, Spec
from policies import checkpoint
from policies.flow import FlowPolicy
from policies.policy import CommittedPrefix, Sample, TextRequest
from services.inference.local_engine import LocalEngine
from services.inference.models import ServedModel
from services.inference.service import SERVICE_NAME, InferenceServicer

# Several threads for matrices this small cost more than they save, and on a busy machine they wait for each other.
torch.set_num_threads(1)

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
CAMERAS = ("observation.images.front", "observation.images.wrist")
CAMERA_SIZE = 48
HORIZON = 8
ACTION_SIZE = 4
STATE_SIZE = 6
RAW = common_pb2.IMAGE_ENCODING_RAW_RGB8

SPEC = Spec(
    observation=(
        Feature(
            name="observation.state",
            kind=FeatureKind.STATE,
            dtype="float32",
            shape=(STATE_SIZE,),
            element_names=tuple(f"joint{index}.pos" for index in range(STATE_SIZE)),
            element_units=("rad",) * STATE_SIZE,
        ),
        *(
            Feature(name=name, kind=FeatureKind.IMAGE, dtype="uint8", shape=(CAMERA_SIZE, CAMERA_SIZE, 3))
            for name in CAMERAS
        ),
    ),
    action=(
        Feature(
            name="action",
            kind=FeatureKind.ACTION,
            dtype="float32",
            shape=(ACTION_SIZE,),
            element_names=tuple(f"joint{index}.pos" for index in range(ACTION_SIZE)),
            element_units=("rad",) * ACTION_SIZE,
        ),
    ),
    control_rate_hz=20.0,
)

Arrays = dict[str, npt.NDArray[np.generic]]


def make_policy(seed: int = 0, policy_class: type[FlowPolicy] = FlowPolicy, spec: Spec = SPEC) -> FlowPolicy:
    """A small policy with weights drawn from seed, for a robot with one state and one action."""
    torch.manual_seed(seed)
    cameras = [feature.name for feature in spec.images]
    config = {"horizon": HORIZON, "cameras": cameras, "width": 64, "num_blocks": 2}
    policy = policy_class.from_config(config, spec)
    state_size = next(feature.shape[0] for feature in spec.observation if feature.kind is FeatureKind.STATE)

    def statistics(size: int) -> dict[str, npt.NDArray[np.float64]]:
        values = {"mean": 0.1, "std": 0.5, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
        return {name: np.full(size, value) for name, value in values.items()}

    policy.set_statistics({"observation.state": statistics(state_size), "action": statistics(spec.action[0].shape[0])})
    return policy.eval()


class GatedPolicy(FlowPolicy):
    """Passes wait at a gate while it is shut, so that tests decide what is waiting meanwhile."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)

    def act(
        self,
        inputs: Any,
        noise: torch.Tensor,
        committed: CommittedPrefix | None = None,
        num_steps: int | None = None,
    ) -> torch.Tensor:
        self.entered.release()
        assert self.gate.wait(30.0), "the test never opened the gate"
        return super().act(inputs, noise, committed, num_steps)


class TalkingPolicy(FlowPolicy):
    """Says its instruction back, a word per token."""

    has_text_head = True

    def generate(self, samples: Sequence[Sample], request: TextRequest, device: torch.device) -> Iterator[str]:
        for word in f"{request.kind.value} {samples[0].task} {request.user_text}".split():
            yield word + " "


class MutteringPolicy(FlowPolicy):
    """Says what the test has it say, a word per token, once the gate is open; keeps what it was asked."""

    has_text_head = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()
        self.answers: list[str] = []
        self.asked: list[tuple[Sample, TextRequest]] = []
        self.num_stopped = 0

    def generate(self, samples: Sequence[Sample], request: TextRequest, device: torch.device) -> Iterator[str]:
        self.asked.append((samples[0], request))
        answer = self.answers.pop(0)
        assert self.gate.wait(30.0), "the test never opened the gate"
        if answer == "raise":
            raise RuntimeError("out of memory")
        try:
            for word in answer.split(" "):
                yield word + " "
        except GeneratorExit:
            self.num_stopped += 1


def make_observation(seed: int) -> Arrays:
    random_numbers = np.random.default_rng(seed)
    observation: Arrays = {"observation.state": random_numbers.normal(size=STATE_SIZE).astype(np.float32)}
    for name in CAMERAS:
        observation[name] = random_numbers.integers(0, 256, (CAMERA_SIZE, CAMERA_SIZE, 3), dtype=np.uint8)
    return observation


def local_chunk(
    policy: FlowPolicy,
    observation: Mapping[str, npt.NDArray[np.generic]],
    seed: int,
    *,
    task: str = "reach",
    prefix: npt.NDArray[np.float32] | None = None,
    delay_steps: int = 0,
    execution_horizon: int = 4,
) -> npt.NDArray[np.float32]:
    """(H, R): the policy called directly, alone."""
    committed = None
    if prefix is not None:
        padded = torch.zeros(1, policy.horizon, policy.model_action_size)
        padded[0, : len(prefix)] = torch.from_numpy(prefix.copy())
        committed = CommittedPrefix(
            actions=padded,
            length=torch.tensor([len(prefix)]),
            delay_steps=torch.tensor([delay_steps]),
            execution_horizon=torch.tensor([execution_horizon]),
        )
    with torch.inference_mode():
        inputs = policy.preprocess([Sample(observation=observation, task=task)], torch.device("cpu"))
        chunk = policy.act(inputs, policy.draw_noise([seed]), committed)
        return policy.postprocess(chunk, inputs)[0]


class InProcessService:
    """The service on a loop in a thread of this process, on a real socket."""

    def __init__(
        self, policy: FlowPolicy, *, max_batch: int = 4, names: Sequence[str] = ("tiny",), **servicer_options: Any
    ) -> None:
        self.policy = policy
        self.engine = LocalEngine({name: ServedModel(name, policy) for name in names}, max_batch=max_batch)
        self.engine.start()
        self._options = servicer_options
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self._start())

    async def _start(self) -> None:
        self._server = GrpcServer("127.0.0.1:0")
        self.servicer = InferenceServicer(self.engine, **self._options)
        self._server.add(inference_pb2_grpc.add_InferenceServiceServicer_to_server, self.servicer, SERVICE_NAME)
        self.servicer.start()
        await self._server.start()
        self.address = self._server.address

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Any], timeout_s: float = 20.0) -> Any:
        return self.start(coroutine).result(timeout_s)

    def close(self) -> None:
        if isinstance(self.policy, GatedPolicy):
            self.policy.gate.set()
        self.run(self.servicer.drain())
        self.run(self._server.stop(0.2))
        self.engine.stop()
        self.servicer.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def __enter__(self) -> InProcessService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(
    topology: Topology, folder: Path, policy: FlowPolicy, *flags: str, address: str = "127.0.0.1:0", name: str = "serve"
) -> Service:
    """`manyhands serve` as a process, model name "tiny"."""
    if not folder.exists():
        checkpoint.save(policy, folder)
    return topology.start(name, ["serve", "--model", f"tiny={folder}", "--address", address, *flags])


def open_session(
    client: InferenceClient, robot_id: str, *, client_id: str = "", model: str = "tiny", spec: Spec = SPEC
) -> Session:
    return client.open_session(
        robot_id=robot_id,
        client_id=client_id or uuid.uuid4().hex,
        model=model,
        spec=spec,
        replan_interval_steps=4,
    )


def ask(stream: ActStream, seed: int, *, observation: Arrays | None = None, **fields: Any) -> int:
    """Sends make_observation(seed), pictures raw, with noise seed."""
    fields.setdefault("deadline_s", 20.0)
    fields.setdefault("task", "reach")
    return stream.send(
        observation=make_observation(seed) if observation is None else observation,
        noise_seed=seed,
        image_encoding=RAW,
        **fields,
    )


def next_reply(stream: ActStream, timeout_s: float = 20.0) -> Reply:
    reply = stream.receive(timeout_s)
    assert reply is not None, f"no reply within {timeout_s} s"
    return reply


def next_chunk(stream: ActStream) -> Chunk:
    result = next_reply(stream).result
    assert isinstance(result, Chunk), result
    return result


def next_refusal(stream: ActStream) -> Refusal:
    result = next_reply(stream).result
    assert isinstance(result, Refusal), result
    return result


def shut_gate(policy: GatedPolicy, stream: ActStream) -> None:
    """Has the model busy with a request of stream until the gate opens."""
    while policy.entered.acquire(blocking=False):
        pass
    policy.gate.clear()
    ask(stream, 0)
    assert policy.entered.acquire(timeout=20.0)


def good_request(seed: int = 1) -> inference_pb2.ActRequest:
    """What ask() sends, for tests that spoil it or send it by themselves."""
    values = codec.encode_values(make_observation(seed), image_encoding=RAW)
    return inference_pb2.ActRequest(
        observation=common_pb2.Observation(values=values),
        task="reach",
        deadline=stamps.to_duration(20.0),
        noise_seed=seed,
    )
