"""Processes of a topology on one machine: started in order, watched, and ended together whatever happens.

Every process is the one command `manyhands` with its own log file; it says "READY host:port" when it serves. Stopping goes
wave by wave, politely first. Should the supervisor itself be killed, the kernel ends its children (PR_SET_PDEATHSIG), so
nothing is left holding ports or GPUs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from manyhands.errors import Refused, TooLate
from manyhands.processes import end_with_parent

_READY_PREFIX = "READY "
_POLL_INTERVAL_S = 0.05
_NUM_LOG_LINES_SHOWN = 15


@dataclass(frozen=True, kw_only=True)
class Service:
    """A running process of the topology.

    Attributes:
        name: Unique in the topology; also the log file's name.
        command: Subcommand and flags, as after `manyhands`.
        address: "host:port" that it said it serves on.
        process: The process itself.
        log_path: Everything it printed.
        wave: Services of a higher wave are ended before those of a lower one: whoever writes before whoever keeps.
    """

    name: str
    command: tuple[str, ...]
    address: str
    process: subprocess.Popen[bytes]
    log_path: Path
    wave: int = 0


class Topology:
    """Starts and ends the processes; use as a context manager.

    Args:
        log_dir: Made if missing; one file per process.
        environment: Added to this process's environment for all of them.
        stop_timeout_s: How long a process may take to end by itself after SIGTERM.
    """

    def __init__(self, log_dir: Path, *, environment: Mapping[str, str] | None = None, stop_timeout_s: float = 8.0) -> None:
        self.log_dir = log_dir
        self.services: dict[str, Service] = {}
        self._environment = {**os.environ, **(environment or {})}
        self._stop_timeout_s = stop_timeout_s
        self._log_offsets: dict[str, int] = {}
        log_dir.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Topology:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def launch(self, name: str, command: Sequence[str], *, wave: int = 0) -> Service:
        """Starts one process and returns at once; wait_ready() completes it. Names may be reused once the old one ended."""
        old = self.services.get(name)
        if old is not None and old.process.poll() is None:
            raise Refused(f"{name} is running already (pid {old.process.pid})", field="name")
        log_path = self.log_dir / f"{name}.log"
        # A restart must not find its predecessor's READY.
        offset = log_path.stat().st_size if log_path.exists() else 0
        with log_path.open("ab") as log:
            process = subprocess.Popen(
                [*end_with_parent(), sys.executable, "-m", "manyhands", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # A group of its own: Ctrl-C in the terminal reaches the supervisor alone, which ends the rest in order.
                start_new_session=True,
            )
        service = Service(name=name, command=tuple(command), address="", process=process, log_path=log_path, wave=wave)
        self.services[name] = service
        self._log_offsets[name] = offset
        return service

    def wait_ready(self, name: str, *, timeout_s: float = 60.0) -> Service:
        """The service with its address, once it says READY.

        Raises:
            Refused: It ended instead; the message ends with the last lines of its log.
            TooLate: It said nothing for timeout_s.
        """
        service = self.services[name]
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with service.log_path.open("rb") as log:
                log.seek(self._log_offsets[name])
                for line in log.read().decode(errors="replace").splitlines(keepends=True):
                    if line.startswith(_READY_PREFIX) and line.endswith("\n"):
                        address = line[len(_READY_PREFIX) :].split()[0]
                        self.services[name] = dataclasses.replace(service, address=address)
                        return self.services[name]
            self.check(name)
            time.sleep(_POLL_INTERVAL_S)
        raise TooLate(f"{name} did not become ready within {timeout_s:.0f} s{_tail(service.log_path)}", field=name)

    def start(self, name: str, command: Sequence[str], *, wave: int = 0, timeout_s: float = 60.0) -> Service:
        self.launch(name, command, wave=wave)
        return self.wait_ready(name, timeout_s=timeout_s)

    def run(self, name: str, command: Sequence[str], *, timeout_s: float = 120.0) -> None:
        """Runs a command to its end, printing into the same folder of logs; Refused unless it exits with 0."""
        log_path = self.log_dir / f"{name}.log"
        with log_path.open("ab") as log:
            try:
                code = subprocess.run(
                    [*end_with_parent(), sys.executable, "-m", "manyhands", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    timeout=timeout_s,
                ).returncode
            except subprocess.TimeoutExpired:
                raise TooLate(f"{name} took longer than {timeout_s:.0f} s{_tail(log_path)}", field=name) from None
        if code:
            raise Refused(f"{name} ended with exit code {code}{_tail(log_path)}", field=name)

    def check(self, *names: str) -> None:
        """Raises Refused if one of the processes (all, if none is named) has ended."""
        for name in names or tuple(self.services):
            service = self.services[name]
            code = service.process.poll()
            if code is not None:
                raise Refused(f"{name} ended with exit code {code}{_tail(service.log_path)}", field=name)

    def stop(self, *names: str) -> None:
        """Ends the named processes (all, if none is named), wave by wave from the highest. Safe to call twice."""
        chosen = [service for name, service in self.services.items() if not names or name in names]
        for wave in sorted({service.wave for service in chosen}, reverse=True):
            self._stop_together([service for service in chosen if service.wave == wave])

    def _stop_together(self, services: Sequence[Service]) -> None:
        for service in services:
            _signal_group(service.process, signal.SIGTERM)
        deadline = time.monotonic() + self._stop_timeout_s
        for service in services:
            try:
                service.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal_group(service.process, signal.SIGKILL)
                service.process.wait()
            # What a process started and left behind belongs to its group.
            _signal_group(service.process, signal.SIGKILL, also_if_ended=True)

    def kill(self, name: str) -> None:
        """kill -9, as a crash would."""
        process = self.services[name].process
        process.kill()
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals, *, also_if_ended: bool = False) -> None:
    if process.poll() is None or also_if_ended:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines()[-_NUM_LOG_LINES_SHOWN:] if path.exists() else []
    return f"; its log {path} ends with:\n  " + "\n  ".join(lines) if lines else f"; its log {path} is empty"
