"""Publishing beside training: a slow or absent weights service costs versions, never steps."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from manyhands import weights_manifest
from manyhands.common.v1 import common_pb2
from manyhands.errors import ManyhandsError, TooLate, Unreachable
from manyhands.spec import Spec

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Version:
    """What is published; tensors are copies that training does not touch."""

    step: int
    policy_type: str
    config_json: str
    spec: Spec
    tensors: Mapping[str, weights_manifest.RawTensor]
    metrics: Mapping[str, float]


Publish = Callable[[Version], common_pb2.PolicyVersion]


class BackgroundPublisher:
    """Publishes in a thread of its own. A newer version replaces one that still waits.

    Args:
        publish: Blocking; ManyhandsErrors of a service that is away are tried again, others drop that version.
        published: Called in the thread with what the service answered.
        failed: Called in the thread when a version is dropped or must wait, with words for people.
    """

    def __init__(
        self,
        publish: Publish,
        *,
        published: Callable[[Version, common_pb2.PolicyVersion], None],
        failed: Callable[[Version, str], None],
    ) -> None:
        self._publish = publish
        self._published = published
        self._failed = failed
        self._changed = threading.Condition()
        self._waiting: Version | None = None
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
        self._thread.start()

    def offer(self, version: Version) -> None:
        with self._changed:
            self._waiting = version
            self._changed.notify_all()

    def close(self, timeout_s: float) -> bool:
        """Waits until the newest version is published, at most timeout_s; False where it is not."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._waiting is None and not self._busy, timeout_s)
            self._closed = True
            self._changed.notify_all()
        return done

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._closed:
                    return
                version, self._waiting = self._waiting, None
                self._busy = True
            assert version is not None
            try:
                self._publish_or_replace(version)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _publish_or_replace(self, version: Version) -> None:
        pause_s = _FIRST_PAUSE_S
        told = False
        while True:
            try:
                self._published(version, self._publish(version))
                return
            except (Unreachable, TooLate) as error:
                if not told:
                    self._failed(version, f"step {version.step} waits for the weights service: {error}")
                    told = True
            except ManyhandsError as error:
                self._failed(version, f"step {version.step} is not published: {error}")
                return
            except Exception as error:  # A bug here must not cost the run.
                logger.exception("publishing step %d failed", version.step)
                self._failed(version, f"step {version.step} is not published: {type(error).__name__}: {error}")
                return
            with self._changed:
                if self._changed.wait_for(lambda: self._waiting is not None or self._closed, pause_s):
                    return  # A newer one is there, or nobody waits any more.
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
