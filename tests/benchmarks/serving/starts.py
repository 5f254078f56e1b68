"""Where the time of a server's start goes, by what it logs."""

from __future__ import annotations

import itertools
import re
from datetime import datetime
from pathlib import Path

_LINE = re.compile(r"(\S+Z) INFO \S+ (\S+): (.*)")
# Logger, beginning of the message, and what begins there; nothing: the message up to its colon.
_MARKS = (
    ("services.inference.start_progress", "", ""),
    ("services.inference.engine_supervisor", "pi052 serves version", "opening the port"),
    ("manyhands.server", "listening on", "ready"),
)


def phases(log: Path, launched_unix_s: float) -> list[tuple[str, float]]:
    """What took how many seconds, from the command on. Of a phase that tells of its steps, what came after the last one is
    told apart.
    """
    marks = [("interpreter", launched_unix_s)]
    for line in log.read_text(errors="replace").splitlines():
        matched = _LINE.match(line)
        if matched is None:
            continue
        at, logger, message = matched.groups()
        for of, beginning, phase in _MARKS:
            if logger == of and message.startswith(beginning):
                marks.append((phase or message.partition(":")[0], datetime.fromisoformat(at).timestamp()))
    spans = []
    for name, group in itertools.groupby(marks, key=lambda mark: mark[0]):
        times = [at_s for _, at_s in group]
        spans.append((name, times[0], times[-1]))
    found = []
    for (name, first_s, last_s), (_, next_s, _) in itertools.pairwise(spans):
        if last_s > first_s:
            found += [(name, last_s - first_s), (f"after {name}", next_s - last_s)]
        else:
            found.append((name, next_s - first_s))
    return found
