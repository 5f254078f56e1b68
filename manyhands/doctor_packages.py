"""Python and the packages: installed versions against the bounds that this distribution declares."""

from __future__ import annotations

import importlib.metadata
import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

from .doctor_report import Check, State

DISTRIBUTION = "manyhands"
_REQUIREMENT = re.compile(
    r"(?P<name>[A-Za-z0-9._-]+)(\[[^]]*\])?\s*(?P<bounds>[^;]*)(;.*extra\s*==\s*[\"'](?P<extra>\w+)[\"'])?"
)


@dataclass(frozen=True, kw_only=True)
class Requirement:
    name: str
    bounds: tuple[tuple[str, str], ...]  # (">=", "2.0")
    extra: str = ""


def check_python() -> list[Check]:
    found = ".".join(str(part) for part in sys.version_info[:3])
    needed = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ">=3.11"
    if within(found, parse_bounds(needed)):
        return [Check(name="python", state=State.OK, detail=found)]
    return [Check(name="python", state=State.FAIL, detail=f"{found}, needs {needed}", advice=f"install Python {needed}")]


def check_packages() -> list[Check]:
    """One line for the packages that every process needs."""
    base = [requirement for requirement in declared_requirements() if not requirement.extra]
    problems = [problem for problem in (describe_problem(requirement) for requirement in base) if problem]
    if problems:
        return [
            Check(
                name="packages", state=State.FAIL, detail="; ".join(problems), advice=f"pip install --upgrade {DISTRIBUTION}"
            )
        ]
    return [Check(name="packages", state=State.OK, detail=f"all {len(base)} within their bounds")]


def check_extras() -> list[Check]:
    """A line for each extra. One that is not installed is fine; one whose package is out of bounds is not."""
    checks: list[Check] = []
    by_extra = itertools.groupby(
        sorted((r for r in declared_requirements() if r.extra), key=lambda requirement: requirement.extra),
        key=lambda requirement: requirement.extra,
    )
    for extra, members in by_extra:
        requirements = list(members)
        missing = [r.name for r in requirements if installed_version(r.name) is None]
        problems = [p for p in (describe_problem(r) for r in requirements if r.name not in missing) if p]
        advice = f"pip install '{DISTRIBUTION}[{extra}]'"
        if problems:
            state, detail = State.FAIL, "; ".join(problems)
        elif missing:
            state, detail = State.WARN, f"not installed: {', '.join(missing)}"
            advice = f"if this machine needs it: {advice}"
        else:
            state, detail, advice = State.OK, f"all {len(requirements)} within their bounds", ""
        checks.append(Check(name=f"extra {extra}", state=state, detail=detail, advice=advice))
    return checks


def declared_requirements() -> list[Requirement]:
    """What the installed distribution declares."""
    return [parse_requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or ()]


def parse_requirement(line: str) -> Requirement:
    """As 'ray[train]>=2.50; extra == "learn"'."""
    match = _REQUIREMENT.match(line)
    if match is None:
        raise ValueError(f"requirement {line!r} is not in a form this check reads")
    return Requirement(name=match["name"], bounds=parse_bounds(match["bounds"]), extra=match["extra"] or "")


def parse_bounds(text: str) -> tuple[tuple[str, str], ...]:
    """(">=", "2.0") from each part of ">=2.0,<3"."""
    return tuple((found[1], found[2]) for found in re.finditer(r"(>=|<=|==|!=|~=|>|<)\s*([0-9][^,\s()]*)", text))


def installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_problem(requirement: Requirement, version_of: Callable[[str], str | None] = installed_version) -> str:
    """ "" where the requirement is met."""
    found = version_of(requirement.name)
    if found is None:
        return f"{requirement.name} is missing"
    if not within(found, requirement.bounds):
        return f"{requirement.name} is {found}, needs {','.join(sign + bound for sign, bound in requirement.bounds)}"
    return ""


def within(version: str, bounds: tuple[tuple[str, str], ...]) -> bool:
    """Compares release numbers only: what comes after them (rc1, +cpu) does not decide whether the library works with it."""
    release = _release(version)
    for sign, bound in bounds:
        limit = _release(bound)
        width = max(len(release), len(limit))
        have = (*release, *([0] * (width - len(release))))
        want = (*limit, *([0] * (width - len(limit))))
        met = {
            ">=": have >= want,
            "<=": have <= want,
            ">": have > want,
            "<": have < want,
            "==": have == want,
            "!=": have != want,
            "~=": have >= want and have[: len(limit) - 1] == limit[:-1],
        }[sign]
        if not met:
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()
