"""Checks this machine for what manyhands needs and says what to do about what it lacks.

A line is ok, warn (something works less well, or a part is not installed) or fail (manyhands cannot work). Exit code 1
if anything fails.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import rich.console
import rich.markup
import rich.table
from pydantic import Field

from . import config, doctor_machine, doctor_packages
from .doctor_report import Check, State

_COLOURS = {State.OK: "green", State.WARN: "yellow", State.FAIL: "bold red"}


class Settings(config.Settings):
    examples = ("", "--json", "--no-slow")

    print_json: bool = Field(default=False, description="print JSON", json_schema_extra={"flag": "json"})
    folder: Path = Field(default=Path(), description="where data will be kept: its disk is checked")
    slow: bool = Field(default=True, description="also start torch and a renderer, which takes seconds")


def main(settings: Settings) -> int:
    checks = run_checks(settings)
    if settings.print_json:
        print(json.dumps([{**asdict(check), "state": check.state.value} for check in checks], indent=2))
    else:
        _print_table(checks)
    return 1 if any(check.state is State.FAIL for check in checks) else 0


def run_checks(settings: Settings) -> list[Check]:
    """All checks in the order of the table. A check that breaks is itself a finding, never a traceback."""
    groups: list[tuple[str, Callable[[], list[Check]]]] = [
        ("python", doctor_packages.check_python),
        ("packages", doctor_packages.check_packages),
        ("extras", doctor_packages.check_extras),
        ("ports", doctor_machine.check_ports),
        ("cameras", doctor_machine.check_cameras),
        ("serial ports", doctor_machine.check_serial_ports),
        ("gpu", lambda: doctor_machine.check_gpu(ask_torch=settings.slow)),
        ("rendering", lambda: doctor_machine.check_rendering(render=settings.slow)),
        ("disk", lambda: doctor_machine.check_disk(settings.folder)),
        ("memory", doctor_machine.check_memory),
        ("clock", doctor_machine.check_clock),
        ("open files", doctor_machine.check_open_files),
        ("browser", doctor_machine.check_browser),
    ]
    checks: list[Check] = []
    for name, run in groups:
        try:
            checks += run()
        except Exception as error:
            checks.append(Check(name=name, state=State.WARN, detail=f"could not be checked: {error!r}"))
    return checks


def _print_table(checks: Sequence[Check]) -> None:
    table = rich.table.Table("check", "", "found", "what to do", title="manyhands doctor", title_justify="left")
    for check in checks:
        # Text from the machine (paths, process names) is no markup.
        plain = [rich.markup.escape(text) for text in (check.name, check.detail, check.advice)]
        table.add_row(plain[0], f"[{_COLOURS[check.state]}]{check.state.value}", plain[1], plain[2])
    console = rich.console.Console()
    console.print(table)
    num_failed = sum(check.state is State.FAIL for check in checks)
    num_warned = sum(check.state is State.WARN for check in checks)
    console.print(f"{num_failed} failed, {num_warned} to look at, {len(checks) - num_failed - num_warned} ok")
