"""What the engine's thread, the thread of results and whoever asks the engine share. The lock is `changed`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .device_use import DeviceUse
from .fused_model import FusedModel
from .launches import DeviceLine
from .unit_answers import ChunkInWork, TextInWork
from .unit_scheduler import UnitScheduler
from .units import ChunkWork, TextWork


@dataclass(kw_only=True, eq=False)
class EngineState:
    """Attributes:
    models: By name.
    use: What the device did.
    device: What it has before it.
    between: For the engine's thread, before its next unit: slots to give back.
    num_outstanding: Units that were launched and are not taken in: tokens, chunks, and what the scheduler is told.
    is_waiting: The scheduler had nothing to run when it was asked last, and nothing has changed since.
    """

    models: Mapping[str, FusedModel]
    scheduler: UnitScheduler[ChunkInWork, TextInWork]
    clock: Callable[[], float]
    use: DeviceUse
    changed: threading.Condition = field(default_factory=threading.Condition)
    device: DeviceLine = field(default_factory=DeviceLine)
    between: list[Callable[[], None]] = field(default_factory=list)
    num_outstanding: int = 0
    is_waiting: bool = False

    def wake(self) -> None:
        """Something changed; the lock is held."""
        self.is_waiting = False
        self.changed.notify()

    def release_later(self, works: Iterable[ChunkWork[ChunkInWork] | TextWork[TextInWork]], *, wipe: bool = False) -> None:
        """The lock is held. A unit that is launched may still write into their slots; those behind it write later."""
        for work in works:
            self.between.append(functools.partial(self.models[work.model].release, work.payload.row, wipe=wipe))
        self.wake()
