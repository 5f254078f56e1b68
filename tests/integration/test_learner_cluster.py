"""How a learner's Ray ends while a thread still waits in it: a real local Ray in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]

# Ray ends a process, with status 1, whose thread calls it after ray.shutdown(): this thread never stops calling.
SCRIPT = """
import os, sys, threading
from pathlib import Path
import psutil
from learner.cluster import RayCluster

cluster = RayCluster("", num_workers=1)
cluster.start()
print(os.getpid(), *[process.pid for process in psutil.Process().children(recursive=True)], flush=True)

import ray, ray.train.torch

@ray.remote(num_cpus=0, max_restarts=int(sys.argv[1]), max_task_retries=int(sys.argv[1]))
class Controller:
    def work(self):
        return os.getpid()

class Trainer:
    def __init__(self, *args, **kwargs):
        pass

    def fit(self):
        controller = Controller.remote()
        while True:
            ray.get(controller.work.remote())
            training.set()

ray.train.torch.TorchTrainer = Trainer
training, ended = threading.Event(), []

def fit():
    try:
        cluster.fit({}, folder=Path("."), max_failures=0)
    except Exception as error:
        ended.append(type(error).__name__)

thread = threading.Thread(target=fit, daemon=True)
thread.start()
assert training.wait(60)
if cluster.stop():
    thread.join(1.0)
    fit()
    print(*ended, flush=True)
else:
    print("still inside", flush=True)
    os._exit(0)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("num_restarts", "end"),
    # A controller that is killed raises in its caller, which comes back; one that is started anew keeps it. Where the thread
    # came back, a second run is refused: Ray must not start itself in a process that ends.
    [(0, "ActorDiedError Refused"), (-1, "still inside")],
)
def test_ray_is_shut_down_once_threads_have_left_it_and_left_alone_where_they_do_not(num_restarts, end):
    command = [sys.executable, "-c", SCRIPT, str(num_restarts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    pids, *_, last = done.stdout.splitlines()  # Ray's own words may stand between.
    assert last == end, done.stdout
    own, *children = map(int, pids.split())
    assert len(children) > 3
    assert [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE] == []
    assert list(Path("/tmp").glob(f"mh-ray-{own}-*")) == []
