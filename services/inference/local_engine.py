"""An engine in this process: threads that run models, the text head, and new weights, behind one EnginePort.

Models on the fused path share a UnitEngine, which runs their chunks and their text; the others share an Engine, which runs
whole passes of the plain module, with a TextWriter beside it.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from manyhands.errors import ManyhandsError, NotFound, Refused
from manyhands.security import SecuritySettings

from .capacity import DeviceCapacity
from .device_gate import DeviceGate
from .device_memory import device_memory
from .device_use import DeviceTime
from .engine import Engine, Progress
from .engine_port import EngineLoad, Job, Question, Row, Swap, SwapResult, TextEnd
from .fused_model import MAX_TEXTS, FusedModel
from .models import ServedModel
from .picture_gate import PictureGate
from .text_writer import TextWriter
from .unit_engine import UnitEngine
from .weights_follower import Resume, WeightsFollower

logger = logging.getLogger(__name__)


class LocalEngine:
    """Fulfils EnginePort.

    Args:
        models: By name.
        max_batch, torch_threads, on_fatal: As Engine's.
        device: torch's name of what the models run on, for load().
        on_swap: Told what became of each version, on any thread.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        max_batch: int = 1,
        torch_threads: int = 0,
        device: str = "cpu",
        on_fatal: Callable[[Exception], None] | None = None,
        on_swap: Callable[[Swap], None] | None = None,
    ) -> None:
        self.models = dict(models)
        fused = {name: model for name, model in models.items() if isinstance(model, FusedModel)}
        plain = {name: model for name, model in models.items() if name not in fused}
        self._units = UnitEngine(fused, max_rows=max_batch, max_texts=MAX_TEXTS, on_fatal=on_fatal) if fused else None
        self._passes = Engine(plain, max_batch=max_batch, torch_threads=torch_threads, on_fatal=on_fatal) if plain else None
        self._engines: list[Engine | UnitEngine] = [engine for engine in (self._units, self._passes) if engine is not None]
        self._writer = TextWriter(plain, self._passes.wait_for_gap) if self._passes is not None else None
        self._follower: WeightsFollower | None = None
        self._on_swap = on_swap
        self._device = device
        self._gate: DeviceGate | None = None
        self.restart_count = 0

    def engine_of(self, model: str) -> Engine | UnitEngine:
        if self._units is not None and model in self._units.models:
            return self._units
        assert self._passes is not None
        return self._passes

    def start(self, progress: Progress | None = None) -> None:
        """Blocks until every model is warm. Raises InternalError for one that cannot make a finite chunk."""
        for engine in self._engines:
            engine.start(progress)

    def follow_weights(
        self,
        address: str,
        *,
        follow: bool,
        security_settings: SecuritySettings | None = None,
        catch_up_s: float = 0.0,
        resume: Mapping[str, Resume] | None = None,
    ) -> list[str]:
        """Takes versions from the weights service at address; blocks as WeightsFollower.start, whose notes it answers."""
        self._follower = WeightsFollower(
            address,
            self.models,
            lambda model, change: self.engine_of(model).between_passes(change),
            follow=follow,
            security_settings=security_settings,
            on_swap=self._on_swap,
        )
        return self._follower.start(catch_up_s=catch_up_s, resume=resume)

    def stop(self) -> None:
        """After the pass that runs."""
        if self._follower is not None:
            self._follower.stop()
        if self._writer is not None:
            self._writer.stop()
        for engine in self._engines:
            engine.stop()

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        self.engine_of(job.model).submit(
            owner=owner, request_id=request_id, arrived_s=arrived_s, deadline_s=deadline_s, job=job
        )

    @property
    def waits_at_gate(self) -> bool:
        """Whether use_gate() is of any use, and safe: a device must not see that a gate is open before it sees the pictures,
        and only this processor writes in the order in which it is told to.
        """
        return platform.machine() == "x86_64" and any(
            model.waits_at_gate for model in self.models.values() if isinstance(model, FusedModel)
        )

    def use_gate(self, gate: PictureGate) -> None:
        """Before start(): pictures of rows that are expected may come through it."""
        try:
            self._gate = DeviceGate(gate, torch.device(self._device))
        except (RuntimeError, OSError, AttributeError) as error:
            logger.warning("pictures come without a gate: %s", error)
            return
        for model in self.models.values():
            if isinstance(model, FusedModel):
                model.use_gate(self._gate)

    def open_left(self, now_s: float) -> None:
        """See DeviceGate.open_left."""
        if self._gate is not None:
            self._gate.open_left(now_s)

    @property
    def uses_gate(self) -> bool:
        return self._gate is not None

    def expect(self, model: str, row: Row, *, with_gate: bool = False, gate: int = 0) -> int:
        """gate: Of use_gate(), as whoever owns it has closed it."""
        engine = self.engine_of(model)
        if isinstance(engine, UnitEngine):
            engine.expect(model, row, gate)
        return gate

    def give_up(self, gate: int) -> None:
        """Whoever owns the gate opens it."""

    def rehearse(self, model: str, row: Row) -> None:
        engine = self.engine_of(model)
        if isinstance(engine, UnitEngine):
            engine.rehearse(model, row)

    def withdraw(self, owner: str) -> None:
        for engine in self._engines:
            engine.withdraw(owner)

    def pending(self) -> int:
        """Rows in line."""
        return sum(engine.pending() for engine in self._engines)

    def load(self) -> EngineLoad:
        used, total = device_memory(self._device)
        return EngineLoad(
            waiting_count=self.pending(),
            device=self._device,
            memory_used_bytes=used,
            memory_total_bytes=total,
            device_time=self._units.device_time() if self._units is not None else DeviceTime(),
        )

    def capacity(self, model: str) -> DeviceCapacity | None:
        return self.engine_of(model).capacity(model)

    def ask(self, question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
        engine = self.engine_of(question.model)
        if isinstance(engine, UnitEngine):
            return engine.ask(question, heard)
        assert self._writer is not None
        return self._writer.ask(question, heard)

    def swap(self, model: str, number: int) -> Future[SwapResult]:
        try:
            if model not in self.models:
                raise NotFound(f"{model!r} is not served; there are {', '.join(self.models)}", field="model")
            if self._follower is None:
                raise Refused("no weights service is configured; start 'manyhands serve' with --weights HOST:PORT")
            return self._follower.swap(model, number)
        except ManyhandsError as error:
            failed: Future[SwapResult] = Future()
            failed.set_exception(error)
            return failed

    def swaps(self) -> Sequence[Swap]:
        return self._follower.swaps() if self._follower is not None else ()

    def end_swaps(self) -> None:
        if self._follower is not None:
            self._follower.end_swaps()

    def is_pinned(self, model: str) -> bool:
        """Whether an operator went back to the version that serves."""
        return self._follower is not None and self._follower.is_pinned(model)
