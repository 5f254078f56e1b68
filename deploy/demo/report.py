"""What the demo leaves behind for people: a table on the terminal, summary.json, and a plot."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from manyhands.statistics import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Episode:
    """How one closed-loop or recorded episode ended."""

    robot: str
    task: str
    success: bool
    num_frames: int
    version_numbers: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Success:
    """Successes of a group of episodes with the 95 % Wilson interval of their rate."""

    num_successes: int
    num_episodes: int

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Success:
        return cls(num_successes=sum(episode.success for episode in episodes), num_episodes=len(episodes))

    @property
    def rate(self) -> float:
        return self.num_successes / self.num_episodes if self.num_episodes else 0.0

    def __str__(self) -> str:
        low, high = wilson_interval(self.num_successes, self.num_episodes)
        return f"{self.num_successes}/{self.num_episodes} = {self.rate:.0%} (95 % CI {low:.0%} to {high:.0%})"


@dataclass(kw_only=True)
class Findings:
    """Filled stage by stage.

    Attributes:
        recorded: Teleoperated episodes in the store.
        before: Closed loop with the untrained policy.
        after: Closed loop with the served, trained policy.
        latencies_ms: Observation captured to chunk merged, of the last stage.
        learner_curve: (step, metrics) in order.
        published: (step, version number) of every version the learner published.
        served_versions: Numbers of the versions that made at least one executed chunk, in order of appearance.
        paths: What is kept, by name.
        stage_seconds: Wall clock of each stage.
    """

    recorded: list[Episode] = field(default_factory=list)
    before: list[Episode] = field(default_factory=list)
    after: list[Episode] = field(default_factory=list)
    latencies_ms: list[float] = field(default_factory=list)
    learner_curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    published: list[tuple[int, int]] = field(default_factory=list)
    served_versions: list[int] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(episode.task for episode in [*self.recorded, *self.before, *self.after]))

    def latency_percentile_ms(self, percentile: float) -> float:
        return float(np.percentile(self.latencies_ms, percentile)) if self.latencies_ms else float("nan")


def by_task(episodes: Sequence[Episode]) -> dict[str, Success]:
    tasks = dict.fromkeys(episode.task for episode in episodes)
    return {task: Success.of([episode for episode in episodes if episode.task == task]) for task in tasks}


def print_table(findings: Findings, console: Console) -> None:
    table = Table(title="What happened", show_header=False, title_justify="left")
    table.add_row("episodes recorded", f"{len(findings.recorded)}, {sum(e.num_frames for e in findings.recorded)} frames")
    table.add_row("versions published / served", f"{len(findings.published)} / {len(findings.served_versions)}")
    table.add_row(
        "latency, observation to chunk",
        f"p50 {findings.latency_percentile_ms(50):.1f} ms, p99 {findings.latency_percentile_ms(99):.1f} ms "
        f"({len(findings.latencies_ms)} chunks)",
    )
    table.add_row("success before training", str(Success.of(findings.before)))
    for task, success in by_task(findings.after).items():
        table.add_row(f"success after: {task}", str(success))
    table.add_row("success after, in all", str(Success.of(findings.after)))
    for stage, seconds in findings.stage_seconds.items():
        table.add_row(f"time: {stage}", f"{seconds:.0f} s")
    console.print(table)
    for name, path in findings.paths.items():
        console.print(f"  {name}: {path}", soft_wrap=True)


def write_summary(findings: Findings, path: Path) -> None:
    """summary.json: the table's content for machines."""

    def success(values: Mapping[str, Success]) -> dict[str, dict[str, int]]:
        return {task: dataclasses.asdict(value) for task, value in values.items()}

    summary = {
        "episodes_recorded": len(findings.recorded),
        "frames_recorded": sum(episode.num_frames for episode in findings.recorded),
        "success_before": success(by_task(findings.before)),
        "success_after": success(by_task(findings.after)),
        "success_rate_after": Success.of(findings.after).rate,
        "latency_ms": {
            "p50": findings.latency_percentile_ms(50),
            "p99": findings.latency_percentile_ms(99),
            "count": len(findings.latencies_ms),
        },
        "versions_published": [number for _, number in findings.published],
        "versions_served": findings.served_versions,
        "stage_seconds": findings.stage_seconds,
        "paths": {name: str(value) for name, value in findings.paths.items()},
    }
    path.write_text(json.dumps(summary, indent=2) + "\n")


def draw_plot(findings: Findings, path: Path) -> None:
    """One picture: learner's loss with published versions, success before and after, latency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axes, success_axes, latency_axes) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")

    points = [(step, metrics["train/loss"]) for step, metrics in findings.learner_curve if "train/loss" in metrics]
    loss_axes.plot([step for step, _ in points], [loss for _, loss in points], color="tab:blue")
    for step, number in findings.published:
        loss_axes.axvline(step, color="tab:orange", alpha=0.5, linewidth=1)
        loss_axes.annotate(f"v{number}", (step, 1), xycoords=("data", "axes fraction"), fontsize=7, ha="center", va="bottom")
    loss_axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    loss_axes.set_title("Learning, with published versions", pad=16)

    before, after = by_task(findings.before), by_task(findings.after)
    tasks = list(dict.fromkeys([*before, *after]))
    for offset, (label, group, colour) in enumerate(
        [("untrained", before, "tab:gray"), ("after training", after, "tab:green")]
    ):
        for index, task in enumerate(tasks):
            if task not in group:
                continue
            success = group[task]
            low, high = wilson_interval(success.num_successes, success.num_episodes)
            position = index + (offset - 0.5) * 0.36
            success_axes.bar(position, success.rate, width=0.34, color=colour, label=label if index == 0 else None)
            # Rounding may put a bound on the wrong side of a rate of 0 or 1.
            bars = [[max(0.0, success.rate - low)], [max(0.0, high - success.rate)]]
            success_axes.errorbar(position, success.rate, bars, color="black", capsize=3)
    success_axes.set_xticks(range(len(tasks)), [task.replace(" ", "\n", 1) for task in tasks], fontsize=8)
    success_axes.set(ylabel="success rate", ylim=(0, 1.05), title="Closed loop, 95 % intervals")
    success_axes.legend(loc="center left", fontsize=8)

    latency_axes.hist(findings.latencies_ms, bins=40, color="tab:purple")
    for percentile in (50, 99):
        value = findings.latency_percentile_ms(percentile)
        latency_axes.axvline(value, color="black", linestyle="--", linewidth=1)
        latency_axes.annotate(
            f" p{percentile} {value:.0f} ms", (value, 0.95), xycoords=("data", "axes fraction"), fontsize=8
        )
    latency_axes.set(xlabel="observation to chunk, ms", ylabel="chunks", title="Latency of the served policy")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
