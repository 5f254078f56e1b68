"""manyhands simulate-fleet: how many robots a GPU carries, in seconds and without the GPU.

The scheduler is the one that serves; how long a unit of work takes comes from a table in milliseconds. Without --durations
it is what the served engine takes for pi052 on an H200 with three cameras and 200 prompt tokens. A file has the same form:

    {"prefix": {"1": 8.2, "2": 15.4, "4": 31.5}, "expert_step": {"1": 0.68, "8": 1.23},
     "text_pictures": 2.0, "text_prefix": 6.6, "draft_check": 2.0, "text_step": {"1": 1.63, "32": 1.98}}

A question's prefix is "text_pictures", which it is spared where the robot's last chunk saw the same pictures, and
"text_prefix", each in slices about as long as a text step. "text_lag" is the time from the end of a text unit to the first
decision that knows of it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from manyhands import config
from manyhands.errors import InvalidInput

from .capacity import TEXT_WITHIN_S
from .fleet_simulator import simulate
from .simulated_fleet import Fleet, Outcome
from .unit_durations import UnitDurations

# Of a text step.
LONGEST_SLICE = 1.03


class DurationsTable(BaseModel):
    """Milliseconds of a unit by its size; the defaults are an H200's (2026-11-29, bf16, 3 cameras, 200 prompt tokens)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prefix: dict[int, float] = Field(default={1: 8.2, 2: 15.4, 4: 31.5}, min_length=1)
    expert_step: dict[int, float] = Field(
        default={1: 0.68, 2: 0.82, 3: 0.87, 4: 0.89, 5: 0.93, 6: 1.12, 8: 1.23, 10: 1.26, 12: 1.51, 16: 1.89}, min_length=1
    )
    text_pictures: float = Field(default=2.0, ge=0)
    text_prefix: float = Field(default=6.6, gt=0)
    draft_check: float = Field(default=2.0, gt=0)
    text_step: dict[int, float] = Field(default={1: 1.63, 8: 1.73, 16: 1.78, 32: 1.98}, min_length=1)
    text_lag: float = Field(default=1.5, ge=0)


class Settings(config.Settings):
    """Simulates a fleet against the scheduler that serves: latencies, misses, use of the device."""

    examples: ClassVar[tuple[str, ...]] = (
        "--robots 16 --replan-hz 5 --ask-every-s 2",
        "--robots 40 --durations my-gpu.json --json fleet.json",
    )

    robots: int = Field(default=16, ge=1, le=10000, description="robots in the fleet")
    seconds: float = Field(default=60.0, gt=0, description="of simulated time")
    control_rate_hz: float = Field(default=50.0, gt=0, description="actions a second of a robot")
    replan_hz: float = Field(default=5.0, gt=0, description="chunks a second that a robot asks for")
    horizon: int = Field(default=50, ge=1, description="actions in a chunk")
    euler_steps: int = Field(default=10, ge=1, description="steps of the expert for a chunk")
    deadline_ms: float = Field(default=100.0, gt=0, description="from sending an observation to receiving its chunk")
    keep_rate: bool = Field(
        default=False,
        description="robots replan at replan_hz whatever the service asks for, evenly out of step, as those of loadtest do",
    )
    jitter: float = Field(default=0.1, ge=0, lt=1, description="how far replanning strays, as a share of its interval")
    network_ms: float = Field(default=1.0, ge=0, description="one way, at best")
    network_jitter_ms: float = Field(default=0.5, ge=0, description="mean of what comes on top of that")
    ask_every_s: float = Field(default=2.0, ge=0, description="between a robot's questions; 0 for none")
    ask_tokens: int = Field(default=20, ge=1, description="tokens of an answer")
    ask_within_s: float = Field(default=TEXT_WITHIN_S, gt=0, description="how soon answers are wanted, for admission")
    draft_hit_share: float = Field(
        default=-1.0, ge=-1, le=1, description="share of questions whose last answer is still right; -1: no drafts"
    )
    ramp_up_s: float = Field(default=5.0, ge=0, description="robots come at random within this time")
    max_rows: int = Field(default=16, ge=1, description="chunks in progress at once")
    max_texts: int = Field(default=32, ge=1, description="texts in progress at once")
    durations: Path | None = Field(default=None, description="JSON file of unit durations in ms; default: an H200's")
    duration_jitter: float = Field(default=0.02, ge=0, lt=0.5, description="standard deviation of durations, as a share")
    seed: int = Field(default=0, description="same seed, same result")
    json_file: Path | None = Field(default=None, description="write the result here", json_schema_extra={"flag": "json"})


def main(settings: Settings) -> int:
    durations = read_durations(settings.durations, settings.duration_jitter)
    fleet = make_fleet(settings)
    console = Console()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("simulating", total=settings.seconds)
        outcome = simulate(
            fleet, durations, seed=settings.seed, on_progress=lambda now_s: progress.update(task, completed=now_s)
        )
    result = summarise(fleet, outcome)
    if settings.json_file is not None:
        settings.json_file.write_text(json.dumps(result, indent=1) + "\n")
    console.print(table(result))
    return 0


def read_durations(path: Path | None, jitter: float) -> UnitDurations:
    """Raises InvalidInput that names what is wrong in the file."""
    try:
        values = DurationsTable() if path is None else DurationsTable.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise InvalidInput(f"{path} is no table of durations: {error}", field="durations") from None
    for name in ("prefix", "expert_step", "text_step"):
        if any(size < 1 or milliseconds <= 0 for size, milliseconds in getattr(values, name).items()):
            raise InvalidInput(f"{name} in {path} must have sizes of at least 1 and times above 0", field="durations")
    return UnitDurations(
        prefix_s=_seconds(values.prefix),
        expert_step_s=_seconds(values.expert_step),
        text_pictures_s=values.text_pictures / 1e3,
        num_picture_slices=_slices(values.text_pictures, values),
        text_prefix_s=values.text_prefix / 1e3,
        draft_check_s=values.draft_check / 1e3,
        text_step_s=_seconds(values.text_step),
        num_text_slices=_slices(values.text_prefix, values),
        text_lag_s=values.text_lag / 1e3,
        jitter=jitter,
    )


def _slices(milliseconds: float, values: DurationsTable) -> int:
    """As an engine would cut it: a slice may be a little longer than a text step, since cuts fall between layers only."""
    return math.ceil(milliseconds / (LONGEST_SLICE * values.text_step[min(values.text_step)]))


def make_fleet(settings: Settings) -> Fleet:
    interval_steps = max(1, round(settings.control_rate_hz / settings.replan_hz))
    if interval_steps > settings.horizon:
        raise InvalidInput(
            f"is {settings.replan_hz:g}, {interval_steps} steps between chunks of {settings.horizon}; replan at "
            f"{settings.control_rate_hz / settings.horizon:g} Hz at least",
            field="replan_hz",
        )
    return Fleet(
        num_robots=settings.robots,
        seconds=settings.seconds,
        control_rate_hz=settings.control_rate_hz,
        interval_steps=interval_steps,
        horizon=settings.horizon,
        num_steps=settings.euler_steps,
        deadline_s=settings.deadline_ms / 1e3,
        keeps_rate=settings.keep_rate,
        jitter=settings.jitter,
        network_s=settings.network_ms / 1e3,
        network_jitter_s=settings.network_jitter_ms / 1e3,
        ask_every_s=settings.ask_every_s,
        ask_tokens=settings.ask_tokens,
        ask_within_s=settings.ask_within_s,
        draft_hit_share=settings.draft_hit_share,
        ramp_up_s=settings.ramp_up_s,
        max_rows=settings.max_rows,
        max_texts=settings.max_texts,
    )


def summarise(fleet: Fleet, outcome: Outcome) -> dict[str, Any]:
    """The result as JSON has it."""
    interval_steps = max(robot.interval_steps for robot in outcome.robots)
    return {
        "robots": fleet.num_robots,
        "robots_refused": outcome.refused_robots,
        "seconds": outcome.seconds,
        "requests": outcome.num_requests,
        "chunks": len(outcome.latencies_s),
        "missed_deadlines": outcome.num_missed,
        "starved": outcome.num_starved,
        "refusals": {reason: count for reason, count in sorted(outcome.refusals.items()) if count},
        "latency_ms": percentiles_ms(outcome.latencies_s),
        "replan_hz": fleet.control_rate_hz / interval_steps,
        "interval_stretch": outcome.stretch,
        "text": {
            "texts": outcome.num_texts,
            "tokens_per_s": outcome.num_tokens / outcome.seconds,
            "first_token_ms": percentiles_ms(outcome.first_token_s),
            "whole_ms": percentiles_ms(outcome.text_s),
        },
        "device": {
            "use": sum(outcome.busy_s.values()) / outcome.seconds,
            "use_by_unit": {kind: seconds / outcome.seconds for kind, seconds in sorted(outcome.busy_s.items())},
            "mean_rows": {
                kind: sum(size * count for size, count in sizes.items()) / sizes.total()
                for kind, sizes in sorted(outcome.sizes.items())
            },
            "chunks_per_s_without_text": outcome.chunks_per_s,
            "text_share_admitted": outcome.text_share,
        },
    }


def table(result: dict[str, Any]) -> Table:
    shown = Table("", "", show_header=False, title=f"{result['robots']} robots, {result['seconds']:.0f} s simulated")
    latency, text, device = result["latency_ms"], result["text"], result["device"]
    shown.add_row("chunk, sent to received, p50 / p99 / longest", _three(latency))
    shown.add_row("chunks; a second", f"{result['chunks']}; {result['chunks'] / result['seconds']:.1f}")
    shown.add_row("missed deadlines; times without actions", f"{result['missed_deadlines']}; {result['starved']}")
    refusals = ", ".join(f"{count} {reason}" for reason, count in result["refusals"].items())
    shown.add_row("refusals", refusals or "none")
    shown.add_row("robots never served", str(result["robots_refused"]))
    stretched = f" (asked for, times {result['interval_stretch']:.2f})" if result["interval_stretch"] > 1 else ""
    shown.add_row("replans a second of a robot", f"{result['replan_hz']:.2f}{stretched}")
    shown.add_row("text tokens a second", f"{text['tokens_per_s']:.0f}")
    shown.add_row("first token, p50 / p99 / longest", _three(text["first_token_ms"]))
    shown.add_row("whole text, p50 / p99 / longest", _three(text["whole_ms"]))
    by_unit = ", ".join(f"{kind} {share:.1%}" for kind, share in device["use_by_unit"].items())
    shown.add_row("device in use", f"{device['use']:.1%} ({by_unit})")
    rows = ", ".join(f"{kind} {mean:.2f}" for kind, mean in device["mean_rows"].items())
    shown.add_row("mean rows of a unit", rows or "-")
    shown.add_row("chunks a second without text", f"{device['chunks_per_s_without_text']:.0f}")
    return shown


def percentiles_ms(seconds: list[float]) -> dict[str, float | None]:
    """p50, p99, mean and max; None where nothing was measured."""
    if not seconds:
        return {"p50": None, "p99": None, "mean": None, "max": None}
    values = np.asarray(seconds) * 1e3
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "mean": float(values.mean()), "max": float(values.max())}


def _three(values: dict[str, float | None]) -> str:
    numbers = [values[name] for name in ("p50", "p99", "max")]
    return " / ".join("-" if number is None else f"{number:.1f}" for number in numbers) + " ms"


def _seconds(milliseconds: dict[int, float]) -> dict[int, float]:
    return {size: value / 1e3 for size, value in milliseconds.items() if math.isfinite(value)}
