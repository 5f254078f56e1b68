"""An engine in this process: the thread that runs the model, the text head, and new weights, behind one EnginePort."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from manyhands.errors import ManyhandsError, NotFound, Refused
from manyhands.security import SecuritySettings

from .engine import Engine, Progress
from .engine_port import Job, Question, Swap, SwapResult, TextEnd
from .models import ServedModel
from .text_writer import TextWriter
from .weights_follower import Resume, WeightsFollower


class LocalEngine:
    """Fulfils EnginePort.

    Args:
        models: By name.
        max_batch, torch_threads, on_fatal: As Engine's.
        on_swap: Told what became of each version, on any thread.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        max_batch: int = 1,
        torch_threads: int = 0,
        on_fatal: Callable[[Exception], None] | None = None,
        on_swap: Callable[[Swap], None] | None = None,
    ) -> None:
        self.models = dict(models)
        self.engine = Engine(self.models, max_batch=max_batch, torch_threads=torch_threads, on_fatal=on_fatal)
        self._writer = TextWriter(self.models)
        self._follower: WeightsFollower | None = None
        self._on_swap = on_swap

    def start(self, progress: Progress | None = None) -> None:
        """Blocks until every model is warm. Raises InternalError for one that cannot make a finite chunk."""
        self.engine.start(progress)

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
            self.engine,
            follow=follow,
            security_settings=security_settings,
            on_swap=self._on_swap,
        )
        return self._follower.start(catch_up_s=catch_up_s, resume=resume)

    def stop(self) -> None:
        """After the pass that runs."""
        if self._follower is not None:
            self._follower.stop()
        self._writer.stop()
        self.engine.stop()

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        self.engine.submit(owner=owner, request_id=request_id, arrived_s=arrived_s, deadline_s=deadline_s, job=job)

    def withdraw(self, owner: str) -> None:
        self.engine.withdraw(owner)

    def pending(self) -> int:
        """Rows in line."""
        return self.engine.pending()

    def chunks_per_s(self, model: str) -> float | None:
        return self.engine.chunks_per_s(model)

    def ask(self, question: Question, heard: Callable[[str | TextEnd], None]) -> Callable[[], None]:
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
