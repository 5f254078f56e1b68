"""Garbage collection in processes that are to answer within milliseconds."""

from __future__ import annotations

import gc
import logging

logger = logging.getLogger(__name__)


def settle() -> None:
    """Takes what is there for permanent: no collection looks at it again. For the end of a start.

    A full collection visits every container there is and holds the interpreter meanwhile: 0.13 s where torch is imported
    (200 000 of them), and robots wait. It comes whenever enough was allocated since the last one; a new version of the
    weights does that. Afterwards it visits what came since. A cycle of objects that are there now is never freed.

    Source: https://docs.python.org/3/library/gc.html#gc.freeze
    """
    gc.collect()
    gc.freeze()
    logger.debug("%d objects are there to stay: no garbage collection looks at them", gc.get_freeze_count())
