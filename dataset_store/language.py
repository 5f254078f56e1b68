"""Language rows of a published root: what was said and asked in an episode, and what was being done when.

The two columns hold, for every frame, the whole episode's persistent rows and the frame's own events. Kept like that they
would outgrow the numbers many times over, so an episode is read when one of its frames is asked for, and its persistent
rows are kept once.
"""

from __future__ import annotations

import bisect
import collections
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manyhands.errors import Corrupt

PERSISTENT = "language_persistent"
EVENTS = "language_events"
LANGUAGE_DTYPE = "language"
_MAX_EPISODES = 4096

Row = dict[str, Any]
"""role, content, style, camera, tool_calls; persistent ones also timestamp, in seconds of the episode."""


def has_language(features: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether info.json's features declare the two columns; Corrupt where only one is there."""
    declared = [name for name in (PERSISTENT, EVENTS) if features.get(name, {}).get("dtype") == LANGUAGE_DTYPE]
    if len(declared) == 1:
        raise Corrupt(f"declares {declared[0]} alone; {PERSISTENT} and {EVENTS} come together", field=declared[0])
    return bool(declared)


@dataclass(frozen=True, kw_only=True)
class _Group:
    """A row group: where it is, and the index of its first frame."""

    path: Path
    number: int
    first: int


@dataclass(frozen=True, kw_only=True)
class _Episode:
    """events: By frame of the episode, of frames that have any."""

    persistent: list[Row]
    events: Mapping[int, list[Row]]


class LanguageRows:
    """Any thread may read.

    Args:
        paths: The data files, in order.
        starts: (num_episodes + 1,) first frame index of each episode, and the number of all frames.
    """

    def __init__(self, paths: Sequence[Path], starts: npt.NDArray[np.int64]) -> None:
        self._starts = starts
        self._groups: list[_Group] = []
        first = 0
        for path in paths:
            metadata = pq.read_metadata(path)
            for number in range(metadata.num_row_groups):
                self._groups.append(_Group(path=path, number=number, first=first))
                first += metadata.row_group(number).num_rows
        self._firsts = [group.first for group in self._groups]
        self._lock = threading.Lock()
        self._episodes: collections.OrderedDict[int, _Episode] = collections.OrderedDict()

    def of_frame(self, index: int) -> dict[str, list[Row]]:
        """{"persistent": rows of the episode, "events": rows of the frame}; the lists are shared, not to be changed."""
        episode = int(np.searchsorted(self._starts, index, side="right")) - 1
        rows = self._episode(episode)
        return {"persistent": rows.persistent, "events": rows.events.get(index - int(self._starts[episode]), [])}

    def event_frames(self) -> npt.NDArray[np.int64]:
        """Indices of the frames that have events, ascending."""
        found: list[npt.NDArray[np.int64]] = []
        for group in self._groups:
            column = pq.ParquetFile(group.path).read_row_group(group.number, columns=[EVENTS]).column(0)
            found.append(group.first + _filled(column))
        frames: npt.NDArray[np.int64] = np.concatenate([np.zeros(0, np.int64), *found])
        counted: npt.NDArray[np.int64] = frames[frames < self._starts[-1]]
        return counted

    def _episode(self, episode: int) -> _Episode:
        with self._lock:
            rows = self._episodes.get(episode)
            if rows is None:
                rows = self._read(episode)
                while len(self._episodes) >= _MAX_EPISODES:
                    self._episodes.popitem(last=False)
                self._episodes[episode] = rows
            self._episodes.move_to_end(episode)
            return rows

    def _read(self, episode: int) -> _Episode:
        start, stop = int(self._starts[episode]), int(self._starts[episode + 1])
        before = bisect.bisect_right(self._firsts, start) - 1
        groups = self._groups[before : bisect.bisect_left(self._firsts, stop)]
        try:
            tables = [pq.ParquetFile(g.path).read_row_group(g.number, columns=[PERSISTENT, EVENTS]) for g in groups]
        except (OSError, pa.ArrowException) as error:
            raise Corrupt(f"the language columns of episode {episode} cannot be read: {error}", field=PERSISTENT) from None
        table = pa.concat_tables(tables).slice(start - groups[0].first, stop - start)
        # All frames of an episode have the same list.
        persistent = table[PERSISTENT][0].as_py()
        events = table[EVENTS]
        return _Episode(
            persistent=_rows(persistent, episode, PERSISTENT),
            events={frame: _rows(events[frame].as_py(), episode, EVENTS) for frame in _filled(events).tolist()},
        )


def _filled(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """Positions whose list is not empty; a null is empty."""
    lengths: npt.NDArray[np.int64] = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    return np.flatnonzero(lengths)


def _rows(values: Sequence[Mapping[str, Any]] | None, episode: int, column: str) -> list[Row]:
    return [{**row, "tool_calls": _tool_calls(row.get("tool_calls"), episode, column)} for row in values or ()]


def _tool_calls(values: Sequence[Any] | None, episode: int, column: str) -> list[Any]:
    """Each as an object: data sets keep them as JSON."""
    try:
        return [json.loads(value) if isinstance(value, str) else value for value in values or ()]
    except ValueError as error:
        raise Corrupt(f"episode {episode} has a tool call that is no JSON: {error}", field=column) from None
