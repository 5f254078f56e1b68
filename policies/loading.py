"""Loading a checkpoint where somebody watches: a progress bar of the bytes in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from . import checkpoint
from .policy import Policy


def load(folder: Path, device: torch.device | None = None) -> Policy[Any]:
    """checkpoint.load(), with a bar on standard error where that is a terminal."""
    console = Console(stderr=True)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    columns = (TextColumn("loading {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(folder.name, total=total)
        return checkpoint.load(folder, device, progress=lambda _, num_bytes: bar.advance(task, num_bytes))
