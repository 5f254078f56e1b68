"""Runs on all robots at once: started together, watched in a thread each, gathered into one result."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from manyhands import stamps
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.actor import ActorClient
from manyhands.errors import Cancelled, ManyhandsError, Refused

from .fleet import Fleet
from .report import Episode

_OVER = (actor_pb2.RUN_STATE_FINISHED, actor_pb2.RUN_STATE_FAILED)


@dataclass(kw_only=True)
class RobotRun:
    """What one robot's run brought.

    Attributes:
        episodes: In order.
        latencies_ms: Observation captured to chunk merged.
        version_numbers: Of the chunks, in order of arrival.
        error: Why the run failed, or "".
    """

    robot: str
    episodes: list[Episode] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    version_numbers: list[int] = field(default_factory=list)
    error: str = ""


class Runs:
    """One run on every robot; wait() until all are over, or stop() them."""

    def __init__(self, fleet: Fleet, name: str, definitions: Mapping[str, actor_pb2.RunDefinition]) -> None:
        """definitions: By robot; they get a run_id of their own."""
        self.results = {robot: RobotRun(robot=robot) for robot in fleet.actors}
        self._actors = fleet.actors
        self._run_id = f"{name}-{uuid.uuid4().hex[:8]}"
        self._definitions = definitions
        for definition in definitions.values():
            definition.run_id = self._run_id
        self._threads: list[threading.Thread] = []

    def start(self, on_episode: Callable[[str, Episode], None] | None = None) -> None:
        for robot, actor in self._actors.items():
            actor.start_run(self._definitions[robot])
            thread = threading.Thread(target=self._watch, args=(robot, actor, on_episode), daemon=True)
            thread.start()
            self._threads.append(thread)

    def wait(self) -> list[RobotRun]:
        """Raises Refused, naming the robot, if a run failed."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.2)  # In pieces, so that Ctrl-C is heard.
        for result in self.results.values():
            if result.error:
                raise Refused(f"the run of robot {result.robot} failed: {result.error}", field=result.robot)
        return list(self.results.values())

    def stop(self) -> None:
        for actor in self._actors.values():
            actor.stop_run(self._run_id)

    def _watch(self, robot: str, actor: ActorClient, on_episode: Callable[[str, Episode], None] | None) -> None:
        result = self.results[robot]
        try:
            for event in actor.watch():
                which = event.WhichOneof("event")
                if which == "episode":
                    result.episodes.append(_episode(robot, event.episode))
                    if on_episode is not None:
                        on_episode(robot, result.episodes[-1])
                elif which == "chunk" and not event.chunk.refusal:
                    result.latencies_ms.append(stamps.to_seconds(event.chunk.latency) * 1e3)
                    result.version_numbers.append(event.chunk.version.number)
                elif which == "status" and event.status.run.run_id == self._run_id and event.status.state in _OVER:
                    # The stream's first status may be newer than the results that follow it.
                    if len(result.episodes) < event.status.finished_episode_count:
                        continue
                    if event.status.state == actor_pb2.RUN_STATE_FAILED:
                        result.error = event.status.detail or "no reason was given"
                    return
            result.error = "the actor ended"
        except Cancelled:
            result.error = "the connection was closed"
        except ManyhandsError as error:
            result.error = str(error)


def run_with_progress(
    fleet: Fleet, name: str, definitions: Mapping[str, actor_pb2.RunDefinition], console: Console
) -> list[RobotRun]:
    """Starts the run everywhere and shows a bar per robot until all are over."""
    columns = (TextColumn("  {task.description:<8}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bars = {
            robot: progress.add_task(robot, total=definition.episode_count, note="")
            for robot, definition in definitions.items()
        }
        counts = dict.fromkeys(fleet.actors, 0)

        def on_episode(robot: str, episode: Episode) -> None:
            counts[robot] += episode.success
            progress.update(bars[robot], advance=1, note=f"{counts[robot]} succeeded: {episode.task}")

        runs = Runs(fleet, name, definitions)
        runs.start(on_episode)
        return runs.wait()


def _episode(robot: str, result: actor_pb2.EpisodeResult) -> Episode:
    return Episode(
        robot=robot,
        task=result.task,
        success=result.success,
        num_frames=result.frame_count,
        version_numbers=tuple(version.number for version in result.versions),
    )
