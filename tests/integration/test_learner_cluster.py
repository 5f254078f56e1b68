"""How a learner's Ray ends while a thread still waits in it: a real local Ray in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.support import learner_lab

ROOT = Path(__file__).parents[2]

# Ray ends a process, with status 1, whose thread calls it after ray.shutdown(): this thread never stops calling.
SCRIPT = """
import sys, threading
from pathlib import Path
from learner.cluster import RayCluster

cluster = RayCluster("", num_workers=1)
cluster.start()

import ray, ray.train.torch

@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Controller:
    def work(self):
        return 1

class Trainer:
    def __init__(self, *args, **kwargs):
        pass

    def fit(self):
        controller = Controller.remote()
        while True:
            ray.get(controller.work.remote())
            training.set()

ray.train.torch.TorchTrainer = Trainer
training = threading.Event()
threading.Thread(target=lambda: cluster.fit({}, folder=Path("."), max_failures=0), daemon=True).start()
assert training.wait(60)
print("training", flush=True)
sys.stdin.read()
print("ended", end="")  # Not flushed here.
cluster.exit()
"""


@pytest.mark.timeout(120)
def test_a_learner_ends_well_while_a_thread_waits_in_ray_and_leaves_nothing():
    # Not tmp_path: Ray appends 70 bytes to it for its sockets, whose paths end at 107.
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=ROOT,
            env={**os.environ, "TMPDIR": folder, "PYTHONUNBUFFERED": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as learner,
    ):
        assert learner.stdout is not None
        assert learner.stdout.readline() == "training\n"
        processes = psutil.Process(learner.pid).children(recursive=True)
        assert len(processes) > 3
        assert len(list(Path(folder).glob("mh-ray-*"))) == 1
        said, _ = learner.communicate(timeout=30.0)
        assert (learner.returncode, said) == (0, "ended")
        assert learner_lab.wait_gone(processes, 5.0) == []
        assert list(Path(folder).iterdir()) == []
