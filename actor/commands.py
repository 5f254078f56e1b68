"""What 'manyhands record' and 'manyhands rollout' share: start a run on a running actor, show it, sum it up."""

from __future__ import annotations

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from manyhands import config
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.actor import ActorClient
from manyhands.dataset.v1 import dataset_pb2
from manyhands.errors import Refused
from manyhands.security import SecuritySettings
from manyhands.statistics import wilson_interval

# An actor that is restarted with --resume-run is back well within this.
PATIENCE_S = 30.0


class RunSettings(config.Settings):
    """Of every command that starts a run."""

    actor: str = Field(description="HOST:PORT of the actor")
    task: str = Field("", description="instruction; default: the robot's own")
    episodes: int = Field(10, ge=0, description="how many; 0 means until Ctrl-C")
    max_steps: int = Field(500, gt=0, description="control periods after which an episode ends without success")
    first_seed: int = Field(0, ge=0, description="episode i of a simulated robot is reset with this plus i")
    security: SecuritySettings = Field(SecuritySettings(), description="certificates and token")


def run_and_report(settings: RunSettings, run: actor_pb2.RunDefinition) -> int:
    """Exit code: 0 when the run came to its end (also by Ctrl-C), 1 when it failed."""
    console = Console()
    results: list[actor_pb2.EpisodeResult] = []
    with ActorClient(settings.actor, security_settings=settings.security) as actor:
        actor.start_run(run)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        failure = ""
        try:
            with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
                bar = progress.add_task("episodes", total=run.episode_count or None, note="")
                for result in actor.results(patience_s=PATIENCE_S):
                    results.append(result)
                    progress.update(bar, advance=1, note=describe(result))
        except Refused as error:
            failure = error.message
        except KeyboardInterrupt:
            console.print("stopping after this tick")
            actor.stop_run(run.run_id)
        spooled = actor.status().spooled_frame_count
    console.print(summary(results))
    if spooled:
        console.print(f"{spooled} frames are in the actor's spool and go to the store when it takes them.")
    if failure:
        console.print(f"The run failed: {failure}", style="bold red")
    return 1 if failure else 0


def describe(result: actor_pb2.EpisodeResult) -> str:
    """One line of an episode."""
    end = dataset_pb2.EpisodeEnd.Name(result.reason).removeprefix("EPISODE_END_").lower().replace("_", " ")
    held = f", held {result.held_tick_count}" if result.held_tick_count else ""
    return f"{end}, {result.frame_count} steps{held}: {result.task}"


def summary(results: list[actor_pb2.EpisodeResult]) -> str:
    """Success rate per task with its 95 % interval (Wilson); interrupted episodes are no trials."""
    lines = []
    for task in dict.fromkeys(result.task for result in results):
        trials = [r for r in results if r.task == task and r.reason != dataset_pb2.EPISODE_END_INTERRUPTED]
        if not trials:
            continue
        successes = sum(result.success for result in trials)
        low, high = wilson_interval(successes, len(trials))
        lines.append(f"{successes} of {len(trials)} succeeded (95 % interval {low:.0%} to {high:.0%}): {task}")
    return "\n".join(lines) or "no episode came to its end"
