"""New weights under load, and back: what robots notice of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deploy.local import Service, Topology
from manyhands import stamps
from manyhands.clients.inference import InferenceClient
from manyhands.clients.weights import WeightsClient
from manyhands.errors import ManyhandsError
from policies import checkpoint
from policies.tensor_file import TensorFile
from services.loadtest.report import percentiles
from tests.benchmarks.serving import model as served
from tests.benchmarks.serving.loads import ASK_EVERY_S, ASK_TOKENS, FLEET, Found, Load, asking

# Until the load test's robots are there.
CONNECT_S = 5.0
# "Around the swap": from so long before the first chunk of the new weights until as long after it.
AROUND_S = 2.0
# The load is ended when the swaps are done.
ENDLESS_S = 3600.0
CHANGE = 0.99

Timeline = list[tuple[float, float, int]]


def publish(weights: Service, folder: Path, say: Callable[[str], None]) -> list[float]:
    """Version 1, the weights that the checkpoint has, and 2, all of them others; answers how many seconds each took."""
    policy_type, config, spec = checkpoint.read_config(folder / served.NAME)
    file = TensorFile(folder / served.NAME / checkpoint.TENSORS_FILE)
    tensors = {name: file[name] for name in file}
    took_s = []
    with WeightsClient(weights.address, timeout_s=60.0) as learner:
        for number in (1, 2):
            if number == 2:
                _change(tensors)
            begin_s = time.perf_counter()
            version = learner.publish(
                model=served.NAME,
                policy_type=policy_type,
                config_json=json.dumps(config),
                spec=spec,
                tensors=checkpoint.as_wire(tensors),
                publish_id=f"bench/{number}",
            )
            took_s.append(time.perf_counter() - begin_s)
            say(f"version {version.number} was published in {took_s[-1]:.1f} s")
    return took_s


def _change(tensors: dict[str, torch.Tensor]) -> None:
    """All weights; statistics are no weights."""
    for name, tensor in tensors.items():
        if "normalizer" not in name:
            tensor.mul_(CHANGE)


def measure(
    topology: Topology,
    server: Service,
    task: str,
    folder: Path,
    settle_s: float,
    timeout_s: float,
    say: Callable[[str], None],
) -> Found:
    """To version 2 and back to 1, under the fleet's load; settle_s before, between and after.

    Returns:
        load: What robots saw altogether.
        failure: Of a swap that was refused or took too long, after which none was asked for; else "".
        swaps: Of each its number; took_s from asking to the answer; pause_ms that the server says; latencies of chunks
            before it was asked for (since the swap before it), meanwhile, and around the change; added_ms, the longest
            around over the longest before.
    """
    until_s = time.monotonic() + timeout_s
    flags = (*FLEET, "--seconds", str(ENDLESS_S), *asking(ASK_EVERY_S, ASK_TOKENS), "--timeline")
    asked, failure = [], ""
    with Load(server.address, task, folder, *flags) as load, InferenceClient(server.address) as client:
        time.sleep(CONNECT_S + settle_s)
        for number in (2, 1):
            topology.check(server.name)
            begin_unix_s, begin_s = time.time(), time.perf_counter()
            allowed_s = max(1.0, until_s - time.monotonic() - 2 * settle_s)
            try:
                response = client.swap_weights(served.NAME, number, timeout_s=allowed_s)
            except ManyhandsError as error:
                failure = f"version {number}: {type(error).__name__}: {error}"
                say(failure)
                break
            took_s, pause_ms = time.perf_counter() - begin_s, stamps.to_seconds(response.pause) * 1e3
            asked.append((number, begin_unix_s, took_s, pause_ms))
            say(f"version {response.current.number} serves after {took_s:.1f} s, pause {pause_ms:.2f} ms")
            time.sleep(settle_s)
        found = load.stop()
    timeline: Timeline = found.pop("timeline")
    swaps, from_unix_s = [], 0.0
    for number, begin_unix_s, took_s, pause_ms in asked:
        first = (at for at, _, version in timeline if at >= begin_unix_s and version == number)
        changed_unix_s = next(first, begin_unix_s + took_s)
        before = between(timeline, from_unix_s, begin_unix_s)
        around = between(timeline, changed_unix_s - AROUND_S, changed_unix_s + AROUND_S)
        swaps.append(
            {
                "number": number,
                "took_s": took_s,
                "pause_ms": pause_ms,
                "before": before,
                "meanwhile": between(timeline, begin_unix_s, changed_unix_s),
                "around": around,
                "added_ms": around["max"] - before["max"],
            }
        )
        from_unix_s = changed_unix_s + AROUND_S
    return {"load": found, "swaps": swaps, "failure": failure}


def between(timeline: Timeline, begin_unix_s: float, end_unix_s: float) -> dict[str, Any]:
    """Of chunks that came then."""
    latencies = [latency for at, latency, _ in timeline if begin_unix_s <= at < end_unix_s]
    return {**percentiles(latencies or [0.0]), "chunks": len(latencies)}
