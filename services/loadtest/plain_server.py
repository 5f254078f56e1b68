"""A plain policy server to compare with: websocket and msgpack, one request one reply, all work in the loop.

    python -m services.loadtest.plain_server CHECKPOINT DEVICE TORCH_THREADS

It does what the inference service does for a request (decodes pictures, prepares, runs the same policy module, answers in
both spaces), in the shape that such servers commonly have. Only for loopback: it knows nobody and checks nothing.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import msgpack
import numpy as np
import numpy.typing as npt
import torch
import uvloop
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from policies import checkpoint
from policies.policy import Policy, Sample

from ..inference.models import canary_sample


class PlainServer:
    def __init__(self, policy: Policy[Any], device: torch.device) -> None:
        self._policy = policy.eval()
        self._device = device
        used = policy.used_observations()
        self._required = [feature.name for feature in policy.spec.observation if feature.name in used]

    def warm_up(self) -> None:
        for _ in range(3):
            canary = canary_sample(self._policy.spec)
            self._act(Sample(observation=canary.observation, task=canary.task), 0)

    async def handle(self, socket: ServerConnection) -> None:
        try:
            await socket.send(msgpack.packb({"required_observations": self._required}))
            async for message in socket:
                await socket.send(self._answer(message))
        except ConnectionClosed:
            pass

    def _answer(self, message: str | bytes) -> bytes:
        received = time.perf_counter()
        request = msgpack.unpackb(message)
        observation = {name: _decode(value) for name, value in request["observation"].items()}
        decoded = time.perf_counter()
        actions, model_actions = self._act(Sample(observation=observation, task=request["task"]), request["noise_seed"])
        finished = time.perf_counter()
        stage_s = {"decode": decoded - received, "sample": finished - decoded, "total": finished - received}
        packed: bytes = msgpack.packb(
            {"actions": _encode(actions), "model_actions": _encode(model_actions), "stage_s": stage_s}
        )
        return packed

    def _act(self, sample: Sample, seed: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        policy = self._policy
        with torch.inference_mode():
            inputs = policy.preprocess([sample], self._device)
            chunk = policy.act(inputs, policy.draw_noise([seed]).to(self._device))
            model_actions = policy.carried(chunk, inputs).float().cpu().numpy()[0]
            return policy.postprocess(chunk, inputs)[0], model_actions


def _decode(value: dict[str, Any]) -> npt.NDArray[np.generic]:
    if "jpeg" in value:
        bgr = cv2.imdecode(np.frombuffer(value["jpeg"], dtype=np.uint8), cv2.IMREAD_COLOR)
        if bgr is None:
            raise ValueError("a picture cannot be decoded")
        return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return np.frombuffer(value["data"], dtype=value["dtype"]).reshape(value["shape"])


def _encode(actions: npt.NDArray[np.float32]) -> dict[str, Any]:
    return {"data": np.ascontiguousarray(actions, dtype=np.float32).tobytes(), "shape": list(actions.shape)}


async def _run(server: PlainServer) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with serve(server.handle, "127.0.0.1", 0, compression=None, max_size=None) as listening:
        port = next(iter(listening.sockets)).getsockname()[1]
        print(f"READY 127.0.0.1:{port}", flush=True)
        await stopped.wait()


def main() -> int:
    folder, device, torch_threads = sys.argv[1:]
    if int(torch_threads):
        torch.set_num_threads(int(torch_threads))
    cv2.setNumThreads(1)
    server = PlainServer(checkpoint.load(Path(folder), torch.device(device)), torch.device(device))
    server.warm_up()
    uvloop.run(_run(server))
    return 0


if __name__ == "__main__":
    sys.exit(main())
