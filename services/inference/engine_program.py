"""Starting and ending the program of an engine process, and of one that works for it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from manyhands.processes import end_with_parent

# A process that holds tens of gigabytes takes a while to end even when killed.
REAP_S = 10.0
# Exit code of a process whose parent is gone.
GONE = 0
_STDERR = 2
_PR_SET_PDEATHSIG = 1
_ROOT = Path(__file__).resolve().parents[2]


class EngineProgram:
    """A running process.

    Args:
        module: Its main.
        files: Descriptors that it inherits: socket, memory, eventfds.
    """

    def __init__(self, module: str, files: Sequence[int]) -> None:
        # The kernel ends it from its first instruction on; where setpriv is missing, from begin() on, after its imports.
        words = [*end_with_parent(signal.SIGKILL), sys.executable, "-P", "-m", module]
        command = [*words, "--parent", str(os.getpid()), "--files"]
        # Python makes this vfork and exec at once: nothing of this process, which has threads, is copied.
        self._process = subprocess.Popen(
            [*command, *map(str, files)],
            stdin=subprocess.DEVNULL,
            stdout=_STDERR,  # READY is the front end's to say.
            pass_fds=files,
            env=_environment(),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def wait(self, timeout_s: float) -> int | None:
        """Its exit code, when it has ended; None where it has not."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    async def reaped(self) -> int | None:
        """Waits until the killed process has ended, and its memory on the device is free; its exit code.

        None after REAP_S: the kernel cannot end it now (a device that hangs).
        """
        return await asyncio.to_thread(self.wait, REAP_S)


def begin(num_files: int, arguments: Sequence[str] | None = None) -> list[int]:
    """What a process that EngineProgram starts does first.

    It ends with its parent. Signals to the whole group are the front end's, which drains first and then ends the others.

    Returns:
        The descriptors that it inherits.
    """
    parser = argparse.ArgumentParser(description="Started by 'manyhands serve', which hands it its files.")
    parser.add_argument("--parent", type=int, required=True, help="process id of whoever starts it")
    parser.add_argument("--files", type=int, nargs=num_files, required=True, help="inherited descriptors")
    options = parser.parse_args(arguments)
    _end_with_parent(options.parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    files: list[int] = options.files
    return files


def _end_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that started it ends, whatever this process is doing then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # It ended before the kernel was told.
        raise SystemExit(GONE)


def _environment() -> dict[str, str]:
    """This process's own code and nothing of the working folder is what the engine imports."""
    if str(_ROOT) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return dict(os.environ)
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in (known, str(_ROOT)) if path)}
