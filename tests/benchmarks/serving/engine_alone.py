"""What a chunk of one robot takes the engine, without a service around it: from a prepared row to the chunk on the host.

python -m tests.benchmarks.serving.engine_alone CHECKPOINT DEVICE TASK COUNT

The units that the service runs, called one after the other on one thread, with a pause before each chunk, as of a robot that
replans. Prints JSON. A process of its own, so that the device is the server's alone afterwards.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from policies import checkpoint
from services.inference.engine_port import Observed, Row
from services.inference.fused_model import FusedModel
from services.loadtest.report import percentiles
from tests.benchmarks.serving import model as served

PAUSE_S = 0.05
WARM_UP = 5


def measure(folder: Path, device: str, task: str, count: int) -> dict[str, object]:
    policy = checkpoint.load(folder)
    model = FusedModel(served.NAME, policy, torch.device(device), max_rows=1, max_texts=1)
    torch.set_num_threads(1)  # Threads would only wait for each other on a busy machine: what the host does is small.
    asked = [
        Row(
            sample=Observed(observation=sample.observation, task=task),
            prefix=None,
            delay_steps=0,
            execution_horizon=0,
            seed=seed,
        )
        for seed, sample in enumerate(served.samples(policy.spec, task))
    ]
    preparing_ms, whole_ms = [], []
    for index in range(WARM_UP + count):
        time.sleep(PAUSE_S)
        begin_s = time.perf_counter()
        row = model.chunk_row(asked[index % len(asked)])
        ready_s = time.perf_counter()
        model.run_prefix([row])
        for step in range(model.num_steps):
            model.run_expert([(row, step)])
        arrived = model.fetch([row])
        model.wait()
        arrived()
        end_s = time.perf_counter()
        model.release(row)
        if index >= WARM_UP:  # The first ones capture graphs.
            preparing_ms.append((ready_s - begin_s) * 1e3)
            whole_ms.append((end_s - ready_s) * 1e3)
    return {"chunk_ms": percentiles(whole_ms), "preparing_ms": percentiles(preparing_ms), "bucket": model.bucket(row)}


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))))
