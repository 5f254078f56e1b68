"""A checkpoint of either form, ours or lerobot's, with a progress bar of the bytes in place where somebody watches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from . import checkpoint, lerobot_folder
from .policy import Policy

logger = logging.getLogger(__name__)


def load(
    folder: Path, device: torch.device | None = None, *, progress: Callable[[str, int], None] | None = None
) -> Policy[Any]:
    """The policy in folder, in evaluation mode; what lerobot's form leaves open is logged.

    Args:
        progress: Called with the name and the bytes of each tensor that is in place, instead of the bar.

    Raises:
        What checkpoint.load() and lerobot_folder.read() raise.
    """
    console = Console(stderr=True)
    seen = console.is_terminal and progress is None
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not seen, transient=True) as bar:
        task = bar.add_task(folder.name, total=total)

        def advance(_: str, num_bytes: int) -> None:
            bar.advance(task, num_bytes)

        report = progress or advance
        if not lerobot_folder.is_one(folder):
            return checkpoint.load(folder, device, progress=report)
        imported = lerobot_folder.read(folder, device=device, progress=report)
    for note in imported.notes:
        logger.warning("%s: %s", folder, note)
    return imported.policy
