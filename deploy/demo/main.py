"""`manyhands demo`: three simulated robots, one served policy, learning from what they recorded.

Every process is the one a fleet would run, with the same flags and contracts; only the sizes are small.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field
from rich.console import Console
from rich.panel import Panel

from manyhands.config import Settings as BaseSettings
from manyhands.errors import ManyhandsError, Refused

from ..local import Topology
from . import report, stages
from .fleet import Fleet

console = Console(highlight=False)


class Settings(BaseSettings):
    """Runs the whole system on this machine: records, serves, learns, swaps, and measures before and after."""

    output: Path = Field(Path("demo-output"), description="folder for the dataset, checkpoints, logs, video and plot")
    keep: bool = Field(False, description="leave everything running at the end, until Ctrl-C")
    recorded_episodes: int = Field(10, ge=1, description="episodes that each robot's expert records (reach: twice)")
    untrained_episodes: int = Field(2, ge=1, description="closed-loop episodes per robot before training")
    evaluation_episodes: int = Field(20, ge=1, description="closed-loop episodes per robot after training")
    train_s: float = Field(70.0, gt=0, description="how long the learner may train, s")
    required_success: float = Field(0.9, ge=0, le=1, description="success rate after training that the demo demands")
    dashboard_address: str = Field("127.0.0.1:8080", description="host:port of the page; port 0 takes a free one")


def main(settings: Settings) -> int:
    """0 only if every stage held."""
    output = settings.output.resolve()
    if output.exists() and any(output.iterdir()):
        # Never mix two runs, never delete somebody's data.
        aside = output.with_name(f"{output.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(output.stat().st_mtime))}")
        output.rename(aside)
        console.print(f"{output} held an earlier run; it is now {aside}", soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    findings = report.Findings()
    problems: list[str] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # The same orderly end as Ctrl-C.
    with Topology(output / "logs", environment=stages.ENVIRONMENT) as topology:
        try:
            problems = _run(settings, output, topology, findings)
        except KeyboardInterrupt:
            console.print("\nInterrupted. Ending every process; what was recorded stays valid.", style="yellow")
            topology.stop()
            console.print(f"Kept under {output}: the dataset, logs and whatever was finished.", soft_wrap=True)
            return 130
        except ManyhandsError as error:
            problems.append(str(error))
        report.print_table(findings, console)
        for problem in problems:
            console.print(f"NOT HELD: {problem}", style="bold red", soft_wrap=True)
        if settings.keep and "dashboard" in topology.services:
            _keep(topology)
    console.print(
        "Every stage held." if not problems else "The demo did not hold.", style="bold green" if not problems else "bold red"
    )
    return 0 if not problems else 1


def _run(settings: Settings, output: Path, topology: Topology, findings: report.Findings) -> list[str]:
    """The stages in order; returns what did not hold."""
    problems: list[str] = []

    def demand(held: bool, problem: str) -> None:
        if not held:
            problems.append(problem)

    with _stage(findings, "a. start", stages.START_TEXT):
        fleet = Fleet(output, topology, dashboard_address=settings.dashboard_address)
        fleet.start(console)
    with contextlib.closing(fleet):
        with _stage(findings, "b. record", stages.RECORD_TEXT):
            findings.recorded = stages.record(fleet, settings.recorded_episodes, console)
            wanted = settings.recorded_episodes * sum(robot.recording_factor for robot in fleet.robots)
            demand(
                len(findings.recorded) == wanted, f"{len(findings.recorded)} of {wanted} expert episodes are in the store"
            )
            findings.paths["dataset"] = stages.publish(fleet, stages.DATASET)
            stages.verify(fleet, findings.paths["dataset"], console)

        with _stage(findings, "c. untrained", stages.UNTRAINED_TEXT):
            runs = stages.closed_loop(fleet, "untrained", settings.untrained_episodes, console, first_seed=5_000)
            findings.before = [episode for run in runs for episode in run.episodes]

        with _stage(findings, "d. learn", stages.LEARN_TEXT):
            stages.learn(fleet, settings.train_s, findings, console)
            findings.paths["checkpoint"] = fleet.checkpoint_path()
            demand(
                len(findings.published) >= 2,
                f"the learner published {len(findings.published)} versions; at least 2 are needed",
            )
            demand(
                len(findings.served_versions) >= 2,
                f"versions {findings.served_versions} acted during training; swaps under live streams need at least 2",
            )

        with _stage(findings, "e. trained", stages.TRAINED_TEXT):
            runs = stages.closed_loop(
                fleet, "trained", settings.evaluation_episodes, console, first_seed=10_000, dataset=stages.EVALUATION_DATASET
            )
            findings.after = [episode for run in runs for episode in run.episodes]
            findings.latencies_ms = [latency_ms for run in runs for latency_ms in run.latencies_ms]
            rate = report.Success.of(findings.after).rate
            demand(
                rate >= settings.required_success,
                f"success after training is {rate:.0%}; {settings.required_success:.0%} is required",
            )
            newest = findings.published[-1][1] if findings.published else 0
            demand(
                {number for episode in findings.after for number in episode.version_numbers} == {newest},
                f"the evaluated episodes were not all made by the newest version, {newest}",
            )

        with _stage(findings, "f. report", stages.REPORT_TEXT):
            evaluation_root = stages.publish(fleet, stages.EVALUATION_DATASET)
            findings.paths["video"] = stages.make_video(fleet, evaluation_root, output / "robots.mp4")
            report.draw_plot(findings, output / "plot.png")
            findings.paths["plot"] = output / "plot.png"
            findings.paths["logs"] = topology.log_dir
            findings.paths["summary"] = output / "summary.json"
            report.write_summary(findings, findings.paths["summary"])
        topology.check()
    return problems


@contextlib.contextmanager
def _stage(findings: report.Findings, name: str, text: str) -> Iterator[None]:
    console.print(Panel(text, title=name, title_align="left", border_style="cyan"))
    started = time.monotonic()
    yield
    findings.stage_seconds[name] = time.monotonic() - started


def _keep(topology: Topology) -> None:
    console.print("Everything is still running:")
    for service in topology.services.values():
        console.print(f"  {service.name:<14} {service.address}")
    console.print(f"Open http://{topology.services['dashboard'].address}/ in a browser. Ctrl-C ends all of it.")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
            try:
                topology.check()
            except Refused as error:
                console.print(str(error), style="red", soft_wrap=True)
                return
