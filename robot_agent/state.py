"""What an agent must not forget over a restart: the last epoch it granted, and an emergency stop.

    STATE_DIR/agent.lock            held while an agent runs; two agents never share a robot's memory
    STATE_DIR/epoch                 decimal number
    STATE_DIR/emergency-stop        the reason; present means latched

Every write reaches the disk (fsync of file and folder) before the call returns.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from manyhands.errors import Corrupt, Refused


class StateDirectory:
    """The memory of one robot's agent. Create it with lock=False to look, or to clear a stop, while an agent runs."""

    def __init__(self, path: Path, *, lock: bool = True) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock: IO[str] | None = None
        if lock:
            self._lock = (path / "agent.lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise Refused(
                    f"another robot agent uses {path}; give every robot a --state-dir of its own", field="state_dir"
                ) from None

    def last_epoch(self) -> int:
        """0 when nobody ever had control. Corrupt when the file is not a number: guessing could revive an old lease."""
        try:
            text = (self.path / "epoch").read_text()
        except FileNotFoundError:
            return 0
        if not text.strip().isdigit():
            raise Corrupt(
                f"{self.path / 'epoch'} holds {text[:40]!r}, not a number; write one above every epoch ever granted"
            )
        return int(text)

    def save_epoch(self, epoch: int) -> None:
        self._write("epoch", f"{epoch}\n")

    def stop_reason(self) -> str | None:
        """Why the emergency stop is latched; None when it is not."""
        try:
            return (self.path / "emergency-stop").read_text().strip() or "unknown"
        except FileNotFoundError:
            return None

    def latch_stop(self, reason: str) -> None:
        self._write("emergency-stop", f"{reason}\n")

    def clear_stop(self) -> bool:
        """The local act that ends an emergency stop; a running agent notices. False when there was none."""
        try:
            (self.path / "emergency-stop").unlink()
        except FileNotFoundError:
            return False
        self._sync_folder()
        return True

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.new"
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)
        self._sync_folder()

    def _sync_folder(self) -> None:
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
