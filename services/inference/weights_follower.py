"""New weights under live control: fetched, checked and staged beside the serving model, swapped in between two passes.

All staging runs on one low-priority thread. What the serving copy already has is copied, not fetched. A version that does
not fit, or whose canary chunk is not finite, is refused and the old one keeps serving.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

import torch

from manyhands import weights_manifest
from manyhands.clients.weights import VersionWatch, WeightsClient
from manyhands.common.v1 import common_pb2
from manyhands.errors import Cancelled, InvalidInput, ManyhandsError, NotFound, Refused, Unreachable
from manyhands.security import SecuritySettings
from manyhands.weights.v1 import weights_pb2

from .engine import canary_row, compute, is_fatal
from .engine_port import Answer, Swap, SwapResult
from .fused_model import FusedModel
from .models import AnyPolicy, ServedModel, check_fits
from .spare import Spare
from .weights_bringer import WeightsBringer

logger = logging.getLogger(__name__)

SWAPS_KEPT = 100
# Below live inference: on a busy CPU the kernel gives the engine's thread its time first.
STAGING_NICENESS = 10
RETRY_S = 1.0
VERSIONS_TRIED_AT_START = 5
BORROWED_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Resume:
    """What an engine that ended had served, to be served again; pinned: newer versions do not replace it."""

    version: common_pb2.PolicyVersion
    pinned: bool


@dataclass(kw_only=True)
class _Slot:
    """One model's staging."""

    served: ServedModel
    spare: Spare | None = None
    newest_number: int = 0
    pinned: bool = False


class WeightsFollower:
    """Brings versions of the weights service into an engine's models.

    Args:
        address: Of the weights service.
        follow: Swap to every new version as it is published; without it only swap() does.
        on_swap: Told what became of each version, on the staging thread.
    """

    def __init__(
        self,
        address: str,
        models: Mapping[str, ServedModel],
        between_passes: Callable[[str, Callable[[], None]], float],
        *,
        follow: bool,
        security_settings: SecuritySettings | None = None,
        on_swap: Callable[[Swap], None] | None = None,
    ) -> None:
        self._client = WeightsClient(address, security_settings=security_settings)
        self._bringer = WeightsBringer(address, security_settings=security_settings)
        self._between_passes = between_passes
        self._follow = follow
        self._slots = {name: _Slot(served=served) for name, served in models.items()}
        self._swaps: deque[Swap] = deque(maxlen=SWAPS_KEPT)
        self._stopping = threading.Event()
        self._staging = ThreadPoolExecutor(max_workers=1, thread_name_prefix="staging", initializer=_yield_to_others)
        self._watches: list[VersionWatch] = []
        self._threads: list[threading.Thread] = []
        self._on_swap = on_swap

    def start(self, *, catch_up_s: float = 0.0, resume: Mapping[str, Resume] | None = None) -> list[str]:
        """Starts watching, having waited up to catch_up_s for the versions to begin with: a restarted server should not
        serve its robots older weights than they had. What a swap needs beside the weights is taken here.

        Args:
            resume: Versions to begin with, by model; the others begin with the newest good one when following.

        Returns:
            Notes for the log: which model begins with its checkpoint, and why.
        """
        resume = resume or {}
        for slot in self._slots.values():
            self._staging.submit(_prepare, slot).result()
        swaps = {
            name: self._staging.submit(self._take_first, slot, resume.get(name))
            for name, slot in self._slots.items()
            if self._follow or name in resume
        }
        notes = []
        until_s = time.monotonic() + catch_up_s
        for name, swap in swaps.items():
            try:
                swap.result(max(0.0, until_s - time.monotonic()))
            except (ManyhandsError, FutureTimeoutError) as error:
                notes.append(f"{name} starts with its checkpoint: {str(error) or 'the version is not in yet'}")
        if self._follow:
            for name in self._slots:
                watch = self._client.watch(name, after_number=self._slots[name].newest_number)
                thread = threading.Thread(target=self._watch, args=(name, watch), name=f"watch-{name}", daemon=True)
                self._watches.append(watch)
                self._threads.append(thread)
                thread.start()
        return notes

    def end_swaps(self) -> None:
        """No version comes in from now on; a swap that runs ends with Cancelled and changes nothing. Does not wait."""
        self._stopping.set()
        for watch in self._watches:
            watch.close()
        self._staging.shutdown(wait=False, cancel_futures=True)
        # What waits for the weights service ends with these.
        self._bringer.close()
        self._client.close()

    def stop(self) -> None:
        """end_swaps(), and waits for the threads that watch."""
        self.end_swaps()
        for thread in self._threads:
            thread.join(2.0)

    def swaps(self) -> list[Swap]:
        """Newest last."""
        return list(self._swaps)

    def is_pinned(self, model: str) -> bool:
        """Whether an operator went back to the version that serves: newer ones do not replace it."""
        return self._slots[model].pinned

    def swap(self, model: str, number: int) -> Future[SwapResult]:
        """Swaps to a version, 0 being the newest. Going back to an older one holds the model there until swap(model, 0).

        The future raises NotFound, Refused, Unreachable or Cancelled.
        """
        if model not in self._slots:
            raise NotFound(f"{model!r} is not served; there are {', '.join(self._slots)}", field="model")
        if number < 0:
            raise InvalidInput(f"is {number}; versions count from 1, 0 is the newest", field="number")
        self._check_going_on()
        return self._staging.submit(self._swap_asked, self._slots[model], number)

    def _swap_asked(self, slot: _Slot, number: int) -> SwapResult:
        try:
            result = self._stage(slot, number)
        except Exception:
            self._check_going_on()  # What went wrong is then that the client was closed.
            raise
        slot.newest_number = max(slot.newest_number, result.current.number)
        slot.pinned = 0 < number < slot.newest_number
        return result

    def _take_first(self, slot: _Slot, resume: Resume | None) -> None:
        if resume is None:
            self._take_newest_good(slot)
            return
        # Also while it cannot be had: what an operator turned away from must not come in instead.
        slot.newest_number = resume.version.number
        slot.pinned = resume.pinned
        while True:
            try:
                self._stage(slot, resume.version.number)
            except Unreachable as error:
                logger.warning("version %d of %s: %s; trying again", resume.version.number, slot.served.name, error)
                self._stopping.wait(RETRY_S)
                self._check_going_on()
                continue
            except (Refused, NotFound):
                if not self._follow or slot.pinned:
                    raise
                self._take_newest_good(slot)
            return

    def _take_newest_good(self, slot: _Slot) -> None:
        published = self._client.list_versions(slot.served.name)
        for candidate in reversed(published[-VERSIONS_TRIED_AT_START:]):
            slot.newest_number = max(slot.newest_number, candidate.version.number)
            try:
                self._stage(slot, candidate.version.number)
                return
            except (Refused, NotFound) as error:
                logger.warning("version %d of %s: %s", candidate.version.number, slot.served.name, error)

    def _watch(self, model: str, watch: VersionWatch) -> None:
        slot = self._slots[model]
        try:
            for published in watch:
                slot.newest_number = max(slot.newest_number, published.version.number)
                if not self._stopping.is_set():
                    self._staging.submit(self._catch_up, slot, published.version.number)
        except Exception:  # Stopping: the client is closed, the executor shut down.
            if not self._stopping.is_set():
                logger.exception("no longer following the weights of %s", model)

    def _catch_up(self, slot: _Slot, number: int) -> None:
        """Swaps to the newest version; older ones that queued up meanwhile are skipped."""
        while not self._stopping.is_set():
            if number != slot.newest_number or slot.pinned:
                return
            try:
                self._stage(slot, number)
            except Unreachable as error:
                logger.warning("version %d of %s: %s; trying again", number, slot.served.name, error)
                self._stopping.wait(RETRY_S)
                continue
            except ManyhandsError as error:
                logger.warning("version %d of %s is refused: %s", number, slot.served.name, error)
            except Exception:
                if self._stopping.is_set():
                    return
                logger.exception("version %d of %s could not be staged", number, slot.served.name)
            return

    def _stage(self, slot: _Slot, number: int) -> SwapResult:
        served = slot.served
        manifest = self._client.get_manifest(served.name, number)
        version = weights_manifest.version_of(manifest)
        if version == served.version:
            return SwapResult(previous=version, current=version, pause_s=0.0)
        try:
            spare = self._filled_spare(slot, manifest)
            if isinstance(served, FusedModel):
                served.stage(spare.policy)
            else:
                _check_canary(spare.policy, version)
        except (Unreachable, Cancelled):
            raise
        except ManyhandsError as error:
            self._record(version, accepted=False, reason=str(error))
            if isinstance(error, (Refused, NotFound)):
                raise
            raise Refused(f"version {version.number} of {served.name}: {error}", field=error.field) from error
        except Exception as error:
            # Else it would be missing among the swaps; of an end of the server it says nothing about the version.
            if not is_fatal(error) and not self._stopping.is_set():
                self._record(version, accepted=False, reason="it could not be staged; the engine's log has the reason")
            raise
        self._check_going_on()
        previous = served.version

        def flip() -> None:
            free = served.replace(spare.policy, version, spare.digests)
            slot.spare = Spare(policy=free, digests=digests_before)

        digests_before = dict(served.digests)
        try:
            pause_s = self._between_passes(served.name, flip)
        except Refused as error:
            self._record(version, accepted=False, reason=str(error))
            raise
        self._record(version, accepted=True, reason="", pause_s=pause_s)
        logger.info("%s: version %d serves, pause %.3f ms", served.name, version.number, pause_s * 1e3)
        return SwapResult(previous=previous, current=version, pause_s=pause_s)

    def _filled_spare(self, slot: _Slot, manifest: weights_pb2.Manifest) -> Spare:
        served = slot.served
        check_fits(served, manifest)
        if slot.spare is None:
            slot.spare = Spare.of(served.policy)
        spare = slot.spare
        if not served.wait_until_returned(spare.policy, BORROWED_TIMEOUT_S):
            raise Unreachable(f"a text answer still runs on the spare copy of {served.name}; try again")
        spare.fill(
            manifest,
            self._bringer,
            live=served.policy,
            live_digests=served.digests,
            check_going_on=self._check_going_on,
        )
        return spare

    def _check_going_on(self) -> None:
        if self._stopping.is_set():
            raise Cancelled("the server is going away; nothing was changed")

    def _record(self, version: common_pb2.PolicyVersion, *, accepted: bool, reason: str, pause_s: float = 0.0) -> None:
        swap = Swap(version=version, accepted=accepted, reason=reason, pause_s=pause_s, at_s=time.monotonic())
        self._swaps.append(swap)
        if self._on_swap is not None:
            self._on_swap(swap)


def _prepare(slot: _Slot) -> None:
    """While robots are served, copying the module (its Python objects; no weights yet) would hold the interpreter for too
    long, and the first version would be in everybody's way. A module that is on a device is copied when it is needed."""
    policy = slot.served.policy
    if next(iter(policy.state_dict().values())).device.type == "cpu":
        slot.spare = Spare.of(policy)
    if isinstance(slot.served, FusedModel):
        try:
            slot.served.rehearse_stage()
        except (RuntimeError, Refused) as error:  # Of memory too: libraries say it in their own ways.
            if is_fatal(error):
                raise
            slot.served.forget_stage()
            logger.warning("%s: its weights cannot be swapped as things are now: %s", slot.served.name, error)


def _check_canary(policy: AnyPolicy, version: common_pb2.PolicyVersion) -> None:
    try:
        outcome = compute(policy, version, [canary_row(policy)], [0.0])[0]
    except ManyhandsError:
        raise
    except Exception as error:
        raise Refused(f"its canary chunk failed: {error}") from error
    if not isinstance(outcome, Answer):
        raise Refused(f"its canary chunk is refused: {outcome}")


def _yield_to_others() -> None:
    """Makes this thread, and only it, a low-priority one."""
    torch.set_num_threads(1)
    if hasattr(os, "PRIO_PROCESS"):
        try:
            # On Linux a thread's own id names just that thread here.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), STAGING_NICENESS)
        except OSError:
            logger.debug("cannot lower this thread's priority", exc_info=True)
