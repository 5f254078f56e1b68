"""Worker processes of simulated robots: started, watched, stopped early if asked, and their counts put together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

from .plan import Plan, Tally, count

# One core carries about this many requests a second with answers checked; workers beyond the cores help nobody.
REQUESTS_PER_S_OF_WORKER = 1000.0
# Interpreters take a while to be there; robots of all workers begin together.
START_S = 3.0
POLL_S = 0.1
STOP_TIMEOUT_S = 15.0


class Worker:
    """One process; its counts so far are in progress, in the end in tally."""

    def __init__(self, plan: Plan) -> None:
        self.progress: Counter[str] = Counter()
        self.tally: Tally | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "services.loadtest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent, which closes stdin.
        )
        assert self._process.stdin is not None
        self._process.stdin.write(plan.model_dump_json() + "\n")
        self._process.stdin.flush()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        return self._reader.is_alive()

    def stop(self) -> None:
        """Asks for the counts so far."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass

    def finish(self) -> Tally:
        """Its counts, when it is done; an error among them where it died."""
        self._reader.join(STOP_TIMEOUT_S)
        self.stop()
        if self._process.poll() is None:
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        code = self._process.wait()
        if self.tally is not None:
            return self.tally
        tally = Tally(requests=self.progress["requests"])
        count(tally.errors, f"a process of simulated robots ended with exit code {code}")
        return tally

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "tally" in message:
                self.tally = Tally.model_validate(message["tally"])
            else:
                self.progress = Counter(message["progress"])


def num_workers(plan: Plan) -> int:
    wanted = -(-plan.fleet * plan.rate_hz // REQUESTS_PER_S_OF_WORKER)
    return int(max(1, min(wanted, os.cpu_count() or 1, plan.fleet)))


def run(plan: Plan, workers: int, on_progress: Callable[[float, Counter[str]], None]) -> tuple[Tally, float, bool]:
    """Runs the plan's whole fleet; answers the counts, the seconds they are of, and whether Ctrl-C ended it early."""
    begins_s = time.monotonic() + START_S
    shares = [range(plan.fleet)[index::workers] for index in range(workers)]
    running: list[Worker] = []
    first = 0
    for share in shares:
        changes = {"first": first, "number": len(share), "begins_s": begins_s}
        running.append(Worker(plan.model_copy(update=changes)))
        first += len(share)
    interrupted = False
    try:
        while any(worker.is_alive for worker in running):
            time.sleep(POLL_S)
            on_progress(max(0.0, time.monotonic() - begins_s), sum((worker.progress for worker in running), Counter()))
    except KeyboardInterrupt:
        interrupted = True
    seconds = min(max(0.0, time.monotonic() - begins_s), plan.ramp_up_s + plan.seconds)
    for worker in running:
        if interrupted:
            worker.stop()
    total = Tally()
    for worker in running:
        total.add(worker.finish())
    return total, seconds, interrupted
