"""Loads of simulated robots, by `manyhands loadtest` as users run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

Found = dict[str, Any]

ROBOTS, RATE_HZ, DEADLINE_MS = 16, 5.0, 100.0
ASK_EVERY_S, ASK_TOKENS = 2.0, 20
FLEET = ("--robots", str(ROBOTS), "--rate-hz", str(RATE_HZ))
# It exits with 1 where robots saw errors, which its file tells.
FOUND_ERRORS = 1
STOP_TIMEOUT_S = 30.0


def asking(every_s: float, tokens: int) -> tuple[str, ...]:
    return ("--ask-every-s", str(every_s), "--ask-tokens", str(tokens))


class Load:
    """A load test in progress; use as a context manager.

    Args:
        folder: For its result.
        flags: Of manyhands loadtest.
    """

    def __init__(self, address: str, task: str, folder: Path, *flags: str) -> None:
        self._result = folder / "load.json"
        self._result.unlink(missing_ok=True)
        words = ["--address", address, "--task", task, "--json", str(self._result), "--deadline-ms", str(DEADLINE_MS)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "manyhands", "loadtest", *words, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "COLUMNS": "120"},
        )

    def finish(self, timeout_s: float) -> Found:
        """What it found, at its end.

        Raises:
            RuntimeError: It found nothing; with what it said.
            TimeoutExpired: It runs on.
        """
        said, _ = self._process.communicate(timeout=timeout_s)
        if self._process.returncode not in (0, FOUND_ERRORS) or not self._result.exists():
            raise RuntimeError(f"the load test ended with exit code {self._process.returncode}:\n{said[-2000:]}")
        found: Found = json.loads(self._result.read_text())
        return found

    def stop(self) -> Found:
        """Ends it now; what it found until then."""
        self._process.send_signal(signal.SIGINT)
        return self.finish(STOP_TIMEOUT_S)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def __enter__(self) -> Load:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            # Its robots end with their pipe.
            self._process.kill()
            self._process.communicate()


def run(address: str, task: str, folder: Path, *flags: str, timeout_s: float) -> Found:
    with Load(address, task, folder, *flags) as load:
        return load.finish(timeout_s)


def is_clean(found: Found) -> bool:
    """Every robot was there all the time, and each of its requests was answered in time; questions may have been refused."""
    refused = [reason for reason in found["refusals"] if not reason.startswith("text: ")]
    bad = ("missed_deadlines", "errors", "skipped", "drains", "robots_never_served")
    return not refused and not any(found[name] for name in bad)
