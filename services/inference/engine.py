"""The thread that runs the model, on prepared rows only.

On the CPU it runs the plain policy module. A pass is whatever the scheduler says when the model is free; between two passes
the weights may change. A row's chunk does not depend on who shares its pass: policies promise that (Policy.act), bit for bit
where they can (docs/design/0003-inference-contract.md).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
import torch

from manyhands.common.v1 import common_pb2
from manyhands.errors import InternalError, InvalidInput, TooLate, Unreachable
from policies.policy import CommittedPrefix, Sample

from .capacity import DeviceCapacity
from .engine_port import Answer, Job, Outcome, Row, Superseded
from .models import AnyPolicy, ServedModel, canary_sample
from .scheduler import Scheduler, Work
from .sessions import shown
from .timed_change import TimedChange

logger = logging.getLogger(__name__)

WARM_UP_PASSES = 3


class Progress(Protocol):
    """Told how far something is: what, done, total."""

    def __call__(self, phase: str, done: int, total: int, /) -> None: ...


class Engine:
    """Runs rows of several robots on one device.

    Args:
        models: By name.
        max_batch: Rows in one pass; with 1 a chunk is that of the policy alone, whatever its kernels do with more rows.
        torch_threads: Of the matrix kernels; 0 leaves torch's choice.
        on_fatal: Told, on the engine's thread, when the device has failed and will fail every further pass.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        *,
        max_batch: int = 1,
        torch_threads: int = 0,
        on_fatal: Callable[[Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.models = dict(models)
        self._clock = clock
        self._torch_threads = torch_threads
        self._max_batch = max_batch
        self._on_fatal = on_fatal
        self._progress: Progress = lambda phase, done, total: None
        self._scheduler: Scheduler[Job] = Scheduler(max_batch=max_batch)
        self._changed = threading.Condition()
        self._between: list[Callable[[], None]] = []
        self._is_in_pass = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._ready: Future[None] = Future()

    def start(self, progress: Progress | None = None) -> None:
        """Starts the thread and waits until every model ran a few passes, so that the first robot does not pay for them.

        Args:
            progress: Told about these passes.

        Raises:
            InternalError: A model cannot make a finite chunk.
        """
        self._progress = progress or self._progress
        self._thread.start()
        self._ready.result()

    def stop(self) -> None:
        """Ends the thread after the pass that runs; what still waits is told."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, *, owner: str, request_id: int, arrived_s: float, deadline_s: float, job: Job) -> None:
        """Puts a row in line, any thread. Its outcome, and that of the owner's row it replaces, goes to job.done."""
        # Rows with and without a previous chunk take different paths through a policy: not in one pass.
        group = (job.model, job.row.prefix is not None)
        work = Work(
            owner=owner,
            request_id=request_id,
            group=group,
            arrived_s=arrived_s,
            deadline_s=deadline_s,
            payload=job,
        )
        now_s = self._clock()
        with self._changed:
            if self._stopping:
                replaced, accepted, stopping = None, False, True
            else:
                replaced, accepted = self._scheduler.submit(work, now_s)
                estimate_s = self._scheduler.times.careful_s(group, 1, now_s)
                stopping = False
                self._changed.notify_all()
        if replaced is not None:
            replaced.payload.done(Superseded())
        if stopping:
            job.done(Unreachable("the server is going away; open a session again"))
        elif not accepted:
            job.done(_too_late(work, now_s, estimate_s))

    def withdraw(self, owner: str) -> None:
        """Drops what an owner has waiting; nobody is told."""
        with self._changed:
            self._scheduler.withdraw(owner)

    def pending(self) -> int:
        with self._changed:
            return len(self._scheduler)

    def wait_for_gap(self, timeout_s: float) -> None:
        """Blocks while a row waits or runs, timeout_s at most: for who has other work for the device, a little at a time."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_in_pass and not len(self._scheduler), timeout_s)

    def capacity(self, model: str) -> DeviceCapacity | None:
        """As passes of the last seconds showed it, without text, which runs beside them; None when none ran."""
        now_s = self._clock()
        with self._changed:
            rates = [self._scheduler.times.rows_per_s((model, prefixed), now_s) for prefixed in (False, True)]
        best = max((rate for rate in rates if rate is not None), default=None)
        return None if best is None else DeviceCapacity(chunks_per_s=best)

    def between_passes(self, change: Callable[[], None]) -> float:
        """Runs change on the engine's thread while no pass runs; answers how many seconds no pass could start.

        Raises:
            Whatever change raises; Unreachable when the engine stopped.
        """
        timed = TimedChange(change)
        with self._changed:
            if self._stopping:
                raise Unreachable("the server is going away")
            self._between.append(timed)
            self._changed.notify_all()
        return timed.done.result()

    def _run(self) -> None:
        if self._torch_threads:
            torch.set_num_threads(self._torch_threads)  # OpenMP keeps this per thread.
        try:
            self._warm_up()
        except BaseException as error:
            self._ready.set_exception(error)
            return
        self._ready.set_result(None)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopping or self._between or len(self._scheduler))
                between, self._between = self._between, []
                stopping = self._stopping
                now_s = self._clock()
                decision = self._scheduler.next_batch(now_s)
                estimates_s = [self._scheduler.times.careful_s(work.group, 1, now_s) for work in decision.late]
                self._is_in_pass = bool(decision.batch)
                self._changed.notify_all()  # Of what was withdrawn or is late, nothing waits any more.
            for change in between:
                change()
            for work, estimate_s in zip(decision.late, estimates_s, strict=True):
                work.payload.done(_too_late(work, now_s, estimate_s))
            if decision.batch:
                self._run_pass(decision.batch)
            if stopping and not decision.batch and not decision.late:
                return

    def _run_pass(self, batch: tuple[Work[Job], ...]) -> None:
        started_s = self._clock()
        served = self.models[batch[0].payload.model]
        outcomes = self._outcomes(served, batch, started_s)
        now_s = self._clock()
        with self._changed:
            self._scheduler.finished(batch, now_s - started_s, now_s)
            self._is_in_pass = False
            self._changed.notify_all()
        for work, outcome in zip(batch, outcomes, strict=True):
            work.payload.done(outcome)

    def _outcomes(self, served: ServedModel, batch: Sequence[Work[Job]], started_s: float) -> Sequence[Outcome]:
        try:
            return compute(
                served.policy,
                served.version,
                [work.payload.row for work in batch],
                [started_s - work.arrived_s for work in batch],
            )
        except Exception as error:
            if len(batch) > 1 and not is_fatal(error):  # One robot's bad row must not cost the others theirs.
                return [outcome for work in batch for outcome in self._outcomes(served, [work], started_s)]
            if isinstance(error, InvalidInput):
                return [error]
            if self._on_fatal is not None and is_fatal(error):
                self._on_fatal(error)
            logger.exception("request %d of session %s failed", batch[0].request_id, shown(batch[0].owner))
            return [InternalError("the model failed on this request; the server's log has the reason under its id")] * len(
                batch
            )

    def _warm_up(self) -> None:
        for name, served in self.models.items():
            done, total = 0, 2 * self._max_batch.bit_length() * WARM_UP_PASSES
            for prefixed in (False, True):
                row = canary_row(served.policy, prefixed=prefixed)
                num_rows = 1
                while num_rows <= self._max_batch:
                    fastest_s = float("inf")
                    for _ in range(WARM_UP_PASSES):
                        started_s = self._clock()
                        outcomes = compute(served.policy, served.version, [row] * num_rows, [0.0] * num_rows)
                        fastest_s = min(fastest_s, self._clock() - started_s)
                        done += 1
                        self._progress(f"preparing {name}", done, total)
                    for outcome in outcomes:
                        if not isinstance(outcome, Answer):
                            raise InternalError(f"model {name!r} fails on a plain observation: {outcome}")
                    self._scheduler.times.observe((name, prefixed), num_rows, fastest_s, self._clock())
                    num_rows *= 2


def compute(
    policy: AnyPolicy,
    version: common_pb2.PolicyVersion,
    rows: Sequence[Row],
    queue_s: Sequence[float],
) -> list[Outcome]:
    """One pass over rows, which all have a prefix or none. A row whose chunk is not finite becomes an InternalError.

    Raises:
        InvalidInput: The policy refuses an observation (which one is not known when there are several).
    """
    device = next(policy.parameters()).device
    started_s = time.perf_counter()
    with torch.inference_mode():
        samples = [Sample(observation=row.sample.observation, task=row.sample.task) for row in rows]
        inputs = policy.preprocess(samples, device)
        prepared_s = time.perf_counter()
        noise = policy.draw_noise([row.seed for row in rows]).to(device)
        chunk = policy.act(inputs, noise, _committed(policy, rows, device))
        model_actions = policy.carried(chunk, inputs).float().cpu().numpy()
        sampled_s = time.perf_counter()
        actions = policy.postprocess(chunk, inputs)
    finished_s = time.perf_counter()
    expected = (len(rows), policy.horizon, policy.model_action_size)
    if model_actions.shape != expected or actions.shape[:2] != expected[:2]:
        raise InternalError(f"the model answered {model_actions.shape} and {actions.shape}, expected {expected}")
    outcomes: list[Outcome] = []
    for index in range(len(rows)):
        if not (np.isfinite(model_actions[index]).all() and np.isfinite(actions[index]).all()):
            logger.error("version %d of %s answered a chunk that is not finite", version.number, version.model)
            outcomes.append(InternalError("the model's chunk is not finite; no action was sent"))
            continue
        outcomes.append(
            Answer(
                actions=actions[index],
                model_actions=model_actions[index],
                version=version,
                queue_s=queue_s[index],
                prefix_s=prepared_s - started_s,
                sample_s=sampled_s - prepared_s,
                postprocess_s=finished_s - sampled_s,
                batch_size=len(rows),
            )
        )
    return outcomes


def is_fatal(error: BaseException) -> bool:
    """After an error of the device itself (not: too little memory) every later call fails too, until the process is new."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def canary_row(policy: AnyPolicy, *, prefixed: bool = False) -> Row:
    """A plain observation that any good version must answer with a finite chunk."""
    shape = (policy.horizon, policy.model_action_size)
    return Row(
        sample=canary_sample(policy.spec),
        prefix=np.zeros(shape, dtype=np.float32) if prefixed else None,
        delay_steps=0,
        execution_horizon=policy.horizon,
        seed=0,
    )


def _committed(policy: AnyPolicy, rows: Sequence[Row], device: torch.device) -> CommittedPrefix | None:
    if rows[0].prefix is None:
        return None
    actions = torch.zeros(len(rows), policy.horizon, policy.model_action_size)
    length = torch.zeros(len(rows), dtype=torch.int64)
    for index, row in enumerate(rows):
        assert row.prefix is not None, "the scheduler's groups keep rows with and without prefix apart"
        length[index] = len(row.prefix)
        actions[index, : len(row.prefix)] = torch.from_numpy(np.array(row.prefix))
    return CommittedPrefix(
        actions=actions.to(device),
        length=length.to(device),
        delay_steps=torch.tensor([row.delay_steps for row in rows], dtype=torch.int64, device=device),
        execution_horizon=torch.tensor([row.execution_horizon for row in rows], dtype=torch.int64, device=device),
    )


def _too_late(work: Work[Job], now_s: float, estimate_s: float) -> TooLate:
    left_ms = max(0.0, work.deadline_s - now_s) * 1e3
    return TooLate(
        f"{left_ms:.1f} ms are left and a chunk takes about {estimate_s * 1e3:.1f} ms; give a longer deadline or "
        "replan less often",
        field="deadline",
    )
