"""Lets a served policy act for some episodes and says how often it succeeded.

The actor must run already ('manyhands actor') with an inference service. With --dataset the episodes are recorded too; with
--teleoperator a person may take over, and what the policy wanted meanwhile is recorded beside what was done.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from manyhands.clients.actor import roll_out

from .commands import RunSettings, run_and_report


class Settings(RunSettings):
    examples: ClassVar[tuple[str, ...]] = ("--actor 127.0.0.1:50054 --model flow --episodes 20 --first-seed 1000",)

    model: str = Field(description="name in the inference service's list")
    replan_interval: int = Field(8, gt=0, description="actions to execute of each chunk")
    subtask_every_chunks: int = Field(
        0,
        ge=0,
        description="ask the model's text head what to do next every so many chunks, and act on that; 0: act on the task",
    )
    dataset: str = Field("", description="record into this dataset; default: nothing is recorded")
    teleoperator: str = Field("", description="who may take over; default: nobody")


def main(settings: Settings) -> int:
    run = roll_out(
        settings.model,
        episode_count=settings.episodes,
        max_episode_steps=settings.max_steps,
        replan_interval_steps=settings.replan_interval,
        subtask_every_chunks=settings.subtask_every_chunks,
        task=settings.task,
        first_seed=settings.first_seed,
        dataset=settings.dataset,
        teleoperator=settings.teleoperator,
    )
    return run_and_report(settings, run)
