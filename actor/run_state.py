"""What an actor must remember of its run to go on after a crash: one small JSON file in the spool's folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf import json_format

from manyhands import errors, framelog
from manyhands.actor.v1 import actor_pb2
from manyhands.dataset.v1 import dataset_pb2

FILE_NAME = "run.json"


@dataclass(kw_only=True)
class RunProgress:
    """How far a run is.

    Attributes:
        definition: As it was started.
        attempt_count: Episodes begun and decided, kept or not: the next one resets with first_seed + attempt_count.
        results: Of the episodes that count, in order.
        finished: The run is over; nothing to resume.
        ending: The result of an episode whose frames are all in the spool but whose end may not be: it counts once it is.
    """

    definition: actor_pb2.RunDefinition
    attempt_count: int = 0
    results: list[actor_pb2.EpisodeResult] = field(default_factory=list)
    finished: bool = False
    ending: actor_pb2.EpisodeResult | None = None

    @property
    def success_count(self) -> int:
        return sum(result.success for result in self.results)

    def begin_ending(self, result: actor_pb2.EpisodeResult) -> None:
        self.ending = result

    def complete_ending(self) -> None:
        """The episode counts now."""
        if self.ending is not None:
            self.results.append(self.ending)
            self.attempt_count += 1
            self.ending = None

    def decided_ends(self) -> dict[str, dataset_pb2.EpisodeEnd.ValueType]:
        """For Spool.recover()."""
        return {self.ending.episode_uuid: self.ending.reason} if self.ending is not None else {}

    def save(self, root: Path) -> None:
        """Atomically and durably."""
        document = {
            "definition": json_format.MessageToDict(self.definition),
            "attempt_count": self.attempt_count,
            "results": [json_format.MessageToDict(result) for result in self.results],
            "finished": self.finished,
            "ending": json_format.MessageToDict(self.ending) if self.ending is not None else None,
        }
        temporary = root / f"{FILE_NAME}.new"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(document, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(root / FILE_NAME)
        framelog.fsync_directory(root)

    @classmethod
    def load(cls, root: Path) -> RunProgress | None:
        """None when no run was ever started here. Raises Corrupt for a file that is none of ours."""
        path = root / FILE_NAME
        if not path.exists():
            return None
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            ending = document["ending"]
            return cls(
                definition=json_format.ParseDict(document["definition"], actor_pb2.RunDefinition()),
                attempt_count=document["attempt_count"],
                results=[json_format.ParseDict(result, actor_pb2.EpisodeResult()) for result in document["results"]],
                finished=document["finished"],
                ending=json_format.ParseDict(ending, actor_pb2.EpisodeResult()) if ending is not None else None,
            )
        except (ValueError, KeyError, TypeError, json_format.ParseError) as error:
            raise errors.Corrupt(f"{path} is no record of a run ({error}); move it away to start anew") from None
