"""Ray, as light as it goes: started once when the learner starts, so that a run does not wait for it.

Everything Ray starts here dies with the process that started it, also by kill -9: Ray asks the kernel for that (its head's
processes are children with a parent-death signal, and workers end with their raylet). What a killed learner leaves is a
folder in /tmp, swept at the next start.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from manyhands.errors import Refused

from .worker import run_worker

logger = logging.getLogger(__name__)

# Unix socket paths end at 107 bytes and Ray appends about 70: its folder cannot be below a run's output.
_PREFIX = "mh-ray-"
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
# Quiet and offline. Set before Ray is imported.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}
# How often Ray Train looks at its workers. Its own 2 s would be most of what a learner may take to end.
_POLL_VARIABLE, _POLL_S = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", 0.25
# For threads to come back from a Ray whose workers were killed.
_LEAVE_TIMEOUT_S = 1.0


class RayCluster:
    """A local Ray, or a connection to one that runs already.

    start() belongs into the main thread: the kernel's parent-death signal follows the thread that forked.

    Args:
        address: Of a running cluster ("ray-head:6379"); empty starts a local one.
        num_workers: Training workers that must fit.
    """

    def __init__(self, address: str, *, num_workers: int) -> None:
        self._address = address
        self._num_workers = num_workers
        self._folder: Path | None = None
        self._left = threading.Condition()
        self._num_inside = 0
        self._ended = False

    def start(self) -> None:
        os.environ.setdefault(_POLL_VARIABLE, str(_POLL_S))
        if not self._address:
            os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
            # Ray listens on every interface, whatever node address it is given, and runs what its clients send: only who
            # has this token is one. Its processes inherit it; nothing is written to the home folder.
            os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
        import ray

        try:
            if self._address:
                ray.init(address=self._address, log_to_driver=False, logging_level=logging.WARNING)
                return
            sweep_leftovers(Path(tempfile.gettempdir()))
            self._folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))
            ray.init(
                address="local",
                # One for Ray Train's controller; workers are told their threads, Ray's CPUs are only seats.
                num_cpus=self._num_workers + 1,
                num_gpus=None,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _temp_dir=str(self._folder),
            )
        except (RuntimeError, ConnectionError, OSError, ValueError) as error:
            raise Refused(
                f"Ray does not start: {error}; 'manyhands doctor' checks memory, disk and ports", field="ray"
            ) from error
        # Beside everything else: a run that comes before it is through waits for what is left of it.
        threading.Thread(target=self._warm_up, name="warm-up", daemon=True).start()

    def fit(self, config: Mapping[str, Any], *, folder: Path, max_failures: int) -> None:
        """Runs worker.run_worker(config) in every worker; one that dies restarts all, at most max_failures times.

        Raises:
            Refused: After stop().
            Exception: What the workers raised, or Ray's own.
        """
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        gpus = bool(config.get("use_gpu", False))
        with self._inside():
            trainer = TorchTrainer(
                run_worker,
                train_loop_config=dict(config),
                scaling_config=ScalingConfig(num_workers=self._num_workers, use_gpu=gpus, resources_per_worker={"CPU": 1}),
                run_config=RunConfig(
                    name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=max_failures)
                ),
            )
            trainer.fit()

    def stop(self) -> bool:
        """Ends Ray, and what runs on it. Of a local one nothing is left: what does not go by itself is killed.

        Returns:
            Whether the process may end as any other. If not, a thread still waits in Ray, which would end the process with
            status 1 the moment it is shut down: only os._exit() is left, at which a cluster that goes on ends its part.
        """
        import ray

        started = psutil.Process().children(recursive=True) if self._folder is not None else []
        with self._left:
            self._ended = True
            if self._num_inside > 0:
                # Those that wait for a run come back once what runs our code is gone. Ray names it so, and its agents alike.
                _kill(p for p in started if (name := _name(p)).startswith("ray::") and not name.endswith("Agent"))
            may_shut_down = self._left.wait_for(lambda: self._num_inside == 0, _LEAVE_TIMEOUT_S)
        if may_shut_down:
            ray.shutdown()
            started = psutil.wait_procs(started, timeout=1.0)[1]
        _kill(started)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        return may_shut_down

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Counts a thread that waits in Ray. After stop() none may: Ray would start itself anew."""
        with self._left:
            if self._ended:
                raise Refused("this learner ends; start the run again on the next one", field="ray")
            self._num_inside += 1
        try:
            yield
        finally:
            with self._left:
                self._num_inside -= 1
                self._left.notify_all()

    def _warm_up(self) -> None:
        """Importing torch takes seconds: done now, in processes that the run's workers then take over."""
        import ray
        import ray.train.torch

        @ray.remote(num_cpus=1, max_retries=0)
        def import_everything() -> int:
            import ray.train.torch  # noqa: F401

            import learner.worker  # noqa: F401

            return os.getpid()

        try:
            with self._inside():
                ray.get([import_everything.remote() for _ in range(self._num_workers)])
        except Exception as error:  # Ended meanwhile, or a run will meet the same error and say it.
            logger.debug("warming up: %s", error)


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return str(process.name())
    return ""


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def sweep_leftovers(temporary: Path) -> None:
    """Removes folders of learners that are not alive any more."""
    for folder in temporary.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            logger.info("removing %s, left by a learner that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)
