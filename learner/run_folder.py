"""A run on disk. Everything a restarted worker or learner needs is here, nothing else is remembered.

run.json               what was asked (RunDefinition, recipe), the snapshot it trains on
checkpoints/step-N/    a policy folder (averaged weights) with the training state beside it
progress.jsonl         points of the curve, published versions, starts of workers
stop                   there when somebody asked the run to end
loss.png, summary.json written at the end
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyhands.errors import InvalidInput

_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")
_STEP = re.compile(r"step-(\d{9})\Z")


def check_run_id(run_id: str) -> str:
    if not _RUN_ID.match(run_id):
        raise InvalidInput(
            f"{run_id[:80]!r} must be 1 to 64 letters, digits, '_', '-' or '.', the first a letter or digit",
            field="run.run_id",
        )
    return run_id


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def definition_path(self) -> Path:
        return self.path / "run.json"

    @property
    def progress_path(self) -> Path:
        return self.path / "progress.jsonl"

    @property
    def stop_path(self) -> Path:
        return self.path / "stop"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_path / f"step-{step:09d}"

    def checkpoint_steps(self) -> list[int]:
        """Of the whole checkpoints, ascending: a folder gets its name only when everything in it is on disk."""
        if not self.checkpoints_path.is_dir():
            return []
        matches = (_STEP.match(path.name) for path in self.checkpoints_path.iterdir())
        return sorted(int(match.group(1)) for match in matches if match)

    def newest_checkpoint(self) -> Path | None:
        steps = self.checkpoint_steps()
        return self.checkpoint_path(steps[-1]) if steps else None

    def read_definition(self) -> dict[str, Any] | None:
        if not self.definition_path.is_file():
            return None
        values: dict[str, Any] = json.loads(self.definition_path.read_text())
        return values

    def write_definition(self, values: Mapping[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.definition_path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
