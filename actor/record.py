"""Records episodes of a teleoperator, or a scripted expert, into a dataset.

The actor must run already ('manyhands actor') with a store. Ctrl-C ends the run after the present tick; what was recorded is
kept.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from manyhands.clients.actor import teleoperate

from .commands import RunSettings, run_and_report


class Settings(RunSettings):
    examples: ClassVar[tuple[str, ...]] = (
        "--actor 127.0.0.1:50054 --dataset reach --teleoperator expert --episodes 20 --discard-failures",
    )

    dataset: str = Field(description="name in the store; made if it is not there")
    teleoperator: str = Field(description="which of the robot's teleoperators acts")
    discard_failures: bool = Field(False, description="keep and count successes only")


def main(settings: Settings) -> int:
    run = teleoperate(
        settings.dataset,
        teleoperator=settings.teleoperator,
        episode_count=settings.episodes,
        max_episode_steps=settings.max_steps,
        task=settings.task,
        first_seed=settings.first_seed,
        discard_failures=settings.discard_failures,
    )
    return run_and_report(settings, run)
