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
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

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
            Exception: What the workers raised, or Ray's own.
        """
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        gpus = bool(config.get("use_gpu", False))
        trainer = TorchTrainer(
            run_worker,
            train_loop_config=dict(config),
            scaling_config=ScalingConfig(num_workers=self._num_workers, use_gpu=gpus, resources_per_worker={"CPU": 1}),
            run_config=RunConfig(
                name="ray", storage_path=str(folder), failure_config=FailureConfig(max_failures=max_failures)
            ),
        )
        trainer.fit()

    def stop(self) -> None:
        """Ends Ray in a process that has an error to tell before it ends; no run may be in progress.

        Of a local one nothing is left: what does not go by itself within a second is killed.
        """
        import ray

        processes = self._processes()
        ray.shutdown()
        _kill(psutil.wait_procs(processes, timeout=1.0)[1])
        self._remove_folder()

    def exit(self) -> NoReturn:
        """Ends this process, with status 0, and with it what runs on Ray: all of a local one, our part of another.

        Without ray.shutdown(): a thread that waits for a run cannot be called back, and one that calls Ray after it ends the
        process with status 1. A cluster that goes on sees the connection close.
        """
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        # Parents first: a raylet that lives would start a worker anew.
        _kill(self._processes())
        self._remove_folder()
        os._exit(0)

    def _processes(self) -> list[psutil.Process]:
        """Of a local Ray."""
        return psutil.Process().children(recursive=True) if self._folder is not None else []

    def _remove_folder(self) -> None:
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _warm_up(self) -> None:
        """Importing torch takes seconds: done now, in processes that the run's workers then take over."""
        import ray
        import ray.train.torch

        @ray.remote(num_cpus=1)
        def import_everything() -> int:
            import ray.train.torch  # noqa: F401

            import learner.worker  # noqa: F401

            return os.getpid()

        try:
            ray.get([import_everything.remote() for _ in range(self._num_workers)])
        except Exception as error:  # Ended meanwhile, or a run will meet the same error and say it.
            logger.debug("warming up: %s", error)


def _kill(processes: list[psutil.Process]) -> None:
    """Answers when they are gone, or after a second: one that is amid a system call may still leave a file."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=1.0)


def sweep_leftovers(temporary: Path) -> None:
    """Removes folders of learners that are not alive any more."""
    for folder in temporary.glob(f"{_PREFIX}*"):
        pid = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            logger.info("removing %s, left by a learner that was killed", folder)
            shutil.rmtree(folder, ignore_errors=True)
