"""The life of runs in a learner: one at a time, in a thread that owns Ray; state that any thread may read."""

from __future__ import annotations

import dataclasses
import enum
import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from manyhands.errors import AlreadyExists, InvalidInput, ManyhandsError, Refused

from .progress import Point, ProgressReader, curve, plot
from .recipe import Recipe
from .recipes import build_recipe
from .run_folder import RunFolder, check_run_id, write_atomically

logger = logging.getLogger(__name__)

POLL_S = 0.2
_STOP_TIMEOUT_S = 2.5


class State(enum.Enum):
    IDLE = "idle"
    STARTING = "starting"
    TRAINING = "training"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class RunRequest:
    """What StartRun asks. max_steps 0 is the recipe's, max_duration_s 0 is no bound."""

    run_id: str
    recipe: str
    dataset: str
    model: str
    max_steps: int = 0
    max_duration_s: float = 0.0
    seed: int = 0

    def check(self) -> None:
        check_run_id(self.run_id)
        if not self.dataset:
            raise InvalidInput("must name a dataset of the store", field="run.dataset")
        if not self.model:
            raise InvalidInput("must name what to publish under", field="run.model")
        if self.max_steps < 0 or self.max_duration_s < 0:
            raise InvalidInput("max_steps and max_duration must be >= 0", field="run.max_steps")


@dataclass(frozen=True, kw_only=True)
class Status:
    state: State
    request: RunRequest | None = None
    detail: str = ""
    step: int = 0
    max_steps: int = 0
    published: Sequence[Point] = ()
    checkpoint: Path | None = None
    num_restarts: int = 0


class Fit(Protocol):
    """Trains the run in folder to its end, restarting workers that die; raises what they raised."""

    def __call__(self, config: Mapping[str, Any], *, folder: Path, max_failures: int) -> None: ...


class Runs:
    """Starts, watches and ends runs.

    Args:
        output: Folder of everything this learner writes.
        fit: Trains on the cluster; called in a thread of this object.
        fetch: (dataset) -> root of a snapshot that stays as it is.
        worker_config: Given to every worker besides the folder.
    """

    def __init__(
        self,
        output: Path,
        *,
        fit: Fit,
        fetch: Callable[[str], Path],
        worker_config: Mapping[str, Any],
        max_failures: int = 5,
    ) -> None:
        self._output = output
        self._fit = fit
        self._fetch = fetch
        self._worker_config = worker_config
        self._max_failures = max_failures
        self._changed = threading.Condition()
        self._status = Status(state=State.IDLE)
        self._points: list[Point] = []
        self._request: RunRequest | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="runs", daemon=True)
        self._thread.start()

    @property
    def status(self) -> Status:
        with self._changed:
            return self._status

    def points(self) -> list[Point]:
        """Of the present run, as the file has them."""
        with self._changed:
            return list(self._points)

    def wait_for_change(self, timeout_s: float) -> Status:
        """The status after the next change or timeout_s."""
        with self._changed:
            self._changed.wait(timeout_s)
            return self._status

    def start(self, request: RunRequest) -> None:
        """Answers at once; the run begins in the background. Asking again for the run in progress changes nothing."""
        request.check()
        recipe = build_recipe(request.recipe)
        if request.max_steps == 0:
            request = dataclasses.replace(request, max_steps=recipe.max_steps)
        with self._changed:
            running = self._status.request
            if self._status.state in (State.STARTING, State.TRAINING) and running is not None:
                if running.run_id == request.run_id:
                    return
                raise Refused(f"run {running.run_id!r} is in progress; stop it or wait for its end", field="run.run_id")
            self._check_against_earlier(request)
            self._points = []
            self._status = Status(
                state=State.STARTING, request=request, max_steps=request.max_steps, detail="fetching the data"
            )
            self._request = request
            self._changed.notify_all()

    def stop(self, run_id: str) -> None:
        """Ends the run in progress after its present step. Nothing happens where it is not in progress."""
        status = self.status
        if (
            status.request is not None
            and status.request.run_id == run_id
            and status.state in (State.STARTING, State.TRAINING)
        ):
            self._folder(run_id).stop_path.touch()

    def close(self) -> None:
        """Ends a run, with a checkpoint if that is quick."""
        status = self.status
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if status.state is State.TRAINING and status.request is not None:
            self.stop(status.request.run_id)
            with self._changed:
                self._changed.wait_for(lambda: self._status.state is not State.TRAINING, _STOP_TIMEOUT_S)

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._request is not None or self._closing)
                if self._closing:
                    return
                request, self._request = self._request, None
            assert request is not None
            try:
                self._run(request)
            except Exception as error:
                if not isinstance(error, ManyhandsError):
                    logger.exception("run %s failed", request.run_id)
                self._update(state=State.FAILED, detail=_reason(error))

    def _run(self, request: RunRequest) -> None:
        folder = self._folder(request.run_id)
        self._prepare(folder, request)
        folder.stop_path.unlink(missing_ok=True)
        self._update(detail="starting the workers")
        ended = threading.Event()
        follower = threading.Thread(target=self._follow, args=(folder, ended), name="follow", daemon=True)
        follower.start()
        config = {**self._worker_config, "folder": str(folder.path)}
        try:
            self._fit(config, folder=folder.path, max_failures=self._max_failures)
        finally:
            ended.set()
            follower.join()
        self._finish(folder)

    def _prepare(self, folder: RunFolder, request: RunRequest) -> None:
        """Writes run.json; a run that exists keeps its snapshot and recipe, so that it goes on exactly as it began."""
        earlier = folder.read_definition()
        if earlier is None:
            recipe = build_recipe(request.recipe).to_json()
            snapshot = str(self._fetch(request.dataset).resolve())
        else:
            recipe, snapshot = earlier["recipe"], earlier["snapshot"]
        folder.write_definition(
            {
                "run_id": request.run_id,
                "recipe_name": request.recipe,
                "recipe": recipe,
                "dataset": request.dataset,
                "snapshot": snapshot,
                "model": request.model,
                "max_steps": request.max_steps,
                "max_duration_s": request.max_duration_s,
                "seed": request.seed,
            }
        )
        Recipe.from_json(recipe)

    def _check_against_earlier(self, request: RunRequest) -> None:
        earlier = self._folder(request.run_id).read_definition()
        if earlier is None:
            return
        asked = {"recipe_name": request.recipe, "dataset": request.dataset, "model": request.model, "seed": request.seed}
        for name, value in asked.items():
            if earlier[name] != value:
                raise AlreadyExists(
                    f"run {request.run_id!r} exists with {name} {earlier[name]!r}, asked {value!r}; take another run_id",
                    field=f"run.{name.removesuffix('_name')}",
                )

    def _follow(self, folder: RunFolder, ended: threading.Event) -> None:
        """Copies what workers write into the state, until ended and everything is read."""
        reader = ProgressReader(folder.progress_path)
        last = False
        while True:
            points = reader.read_new()
            if points:
                self._take(folder, points)
            if last:
                return
            last = ended.wait(POLL_S)

    def _take(self, folder: RunFolder, points: Sequence[Point]) -> None:
        with self._changed:
            self._points += points
            starts = [point for point in self._points if point.kind == "started"]
            notes = [point.note for point in points if point.kind == "note"]
            published = [point for point in self._points if point.kind == "published"]
            # Other kinds carry the step they are about, which may be an earlier one.
            steps = [point.step for point in points if point.kind in ("started", "metrics")]
            training = self._status.state is State.STARTING and bool(starts)
            self._status = dataclasses.replace(
                self._status,
                state=State.TRAINING if training else self._status.state,
                detail=notes[-1] if notes else ("" if training else self._status.detail),
                step=steps[-1] if steps else self._status.step,
                published=published,
                checkpoint=folder.newest_checkpoint(),
                num_restarts=max(0, len(starts) - 1),
            )
            self._changed.notify_all()

    def _finish(self, folder: RunFolder) -> None:
        status = self.status
        points = self.points()
        metrics = curve(points)
        summary = {
            "step": status.step,
            "restarts": status.num_restarts,
            "published": [
                {"number": point.number, "digest": point.digest, "step": point.step} for point in status.published
            ],
            "last_metrics": dict(metrics[-1].metrics) if metrics else {},
            "checkpoint": str(folder.newest_checkpoint() or ""),
        }
        write_atomically(folder.path / "summary.json", json.dumps(summary, indent=2) + "\n")
        try:
            plot(points, folder.path / "loss.png")
        except Exception:  # The run is whole without its picture.
            logger.exception("the curve of %s could not be drawn", folder.path)
        self._update(state=State.FINISHED, checkpoint=folder.newest_checkpoint())

    def _update(self, **changes: Any) -> None:
        with self._changed:
            self._status = dataclasses.replace(self._status, **changes)
            self._changed.notify_all()

    def _folder(self, run_id: str) -> RunFolder:
        return RunFolder(self._output / "runs" / run_id)


def _reason(error: BaseException) -> str:
    """The workers' own words: Ray wraps them in exceptions of its own and a traceback."""
    failures = getattr(error, "worker_failures", None)
    cause: BaseException = next(iter(failures.values())) if failures else error
    while isinstance(inner := getattr(cause, "cause", None), BaseException):
        cause = inner
    text = str(cause).strip()
    return f"{type(cause).__name__}: {text.splitlines()[-1] if text else 'no reason given'}"
