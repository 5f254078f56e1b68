"""What a load test found, for files and for people. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from .plan import STAGES, Tally


def summarise(
    tally: Tally,
    *,
    robots: int,
    seconds: float,
    replan_interval_steps: int,
    server_cpu_s: float,
    server_loop_cpu_s: float,
) -> dict[str, Any]:
    """As the file has it; CPU that nobody could measure is NaN here and null there.

    Args:
        replan_interval_steps: What robots kept to.
    """
    requests = max(1, tally.requests)
    result = {
        "robots": robots,
        "robots_never_served": robots - tally.robots_served,
        "seconds": seconds,
        "requests": tally.requests,
        "chunks": tally.chunks,
        "requests_per_s": tally.requests / seconds if seconds > 0 else 0.0,
        "chunks_per_s": tally.chunks / seconds if seconds > 0 else 0.0,
        "errors": tally.num_errors,
        "errors_by_message": dict(sorted(tally.errors.items(), key=lambda item: -item[1])),
        "missed_deadlines": tally.missed_deadlines,
        "skipped": tally.skipped,
        "refusals": dict(sorted(tally.refusals.items())),
        "drains": tally.drains,
        "latency_ms": percentiles(tally.latency_ms),
        "stage_ms": {stage: percentiles(tally.stage_ms[stage]) for stage in STAGES if stage in tally.stage_ms},
        "mean_batch_size": sum(size * number for size, number in tally.batch_sizes.items()) / max(1, tally.chunks),
        "lag_ms": percentiles(tally.lag_ms),
        "replan_interval_steps": replan_interval_steps,
        "chunks_by_asked_interval_steps": dict(sorted(tally.replan_steps.items())),
        "chunks_by_version": dict(sorted(tally.versions.items())),
        "server_cpu_ms_per_request": _ms_each(server_cpu_s, requests),
        "server_loop_cpu_ms_per_request": _ms_each(server_loop_cpu_s, requests),
        "client_cpu_ms_per_request": tally.cpu_s / requests * 1e3,
        "text": {
            "questions": tally.questions,
            "texts": tally.texts,
            "answer_tokens": percentiles(tally.text_tokens),
            "tokens_per_s": tally.tokens / seconds if seconds > 0 else 0.0,
            "first_token_ms": percentiles(tally.first_token_ms),
            "whole_ms": percentiles(tally.text_ms),
        },
    }
    if tally.timeline:
        result["timeline"] = sorted(tally.timeline)
    return result


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p99, mean and max; None where nothing was measured."""
    if not values:
        return {"p50": None, "p99": None, "mean": None, "max": None}
    array = np.asarray(values)
    p50, p99 = np.percentile(array, (50, 99))
    return {"p50": float(p50), "p99": float(p99), "mean": float(array.mean()), "max": float(array.max())}


def table(results: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Results side by side, by the server's name."""
    shown = Table("", *results, title=title)

    def row(name: str, *values: str) -> None:
        shown.add_row(name, *values)

    columns = list(results.values())
    row("chunk p50 / p99 / longest, ms", *(_three(one["latency_ms"]) for one in columns))
    row("requests; a second", *(f"{one['requests']}; {one['requests_per_s']:.1f}" for one in columns))
    row("chunks; a second", *(f"{one['chunks']}; {one['chunks_per_s']:.1f}" for one in columns))
    row("actions of a chunk executed; as the server asks", *(_intervals(one) for one in columns))
    row("missed deadlines", *(str(one["missed_deadlines"]) for one in columns))
    row("errors", *(str(one["errors"]) for one in columns))
    row("refusals", *(_counts(one["refusals"]) for one in columns))
    row("ticks skipped, still waiting", *(str(one["skipped"]) for one in columns))
    if any(one["robots_never_served"] for one in columns):
        row("robots never served", *(str(one["robots_never_served"]) for one in columns))
    for stage in STAGES:
        if any(stage in one["stage_ms"] for one in columns):
            row(f"server: {stage}, ms", *(_three(one["stage_ms"].get(stage)) for one in columns))
    row("robots in a pass, mean", *(f"{one['mean_batch_size']:.2f}" for one in columns))
    row("server's CPU a request, ms", *(_number(one["server_cpu_ms_per_request"]) for one in columns))
    row("of that on its event loop, ms", *(_number(one["server_loop_cpu_ms_per_request"]) for one in columns))
    row("this tool's CPU a request, ms", *(_number(one["client_cpu_ms_per_request"]) for one in columns))
    row("this tool's lag p50 / p99 / longest, ms", *(_three(one["lag_ms"]) for one in columns))
    if any(len(one["chunks_by_version"]) > 1 for one in columns):
        row("chunks by version", *(_versions(one["chunks_by_version"]) for one in columns))
    if any(one["text"]["questions"] for one in columns):
        row("texts of questions", *(f"{one['text']['texts']} of {one['text']['questions']}" for one in columns))
        row("tokens of an answer p50 / p99 / longest", *(_three(one["text"]["answer_tokens"]) for one in columns))
        row("text tokens a second", *(f"{one['text']['tokens_per_s']:.1f}" for one in columns))
        row("first token p50 / p99 / longest, ms", *(_three(one["text"]["first_token_ms"]) for one in columns))
    return shown


def _intervals(one: Mapping[str, Any]) -> str:
    asked = list(one["chunks_by_asked_interval_steps"])
    wanted = "-" if not asked else f"{asked[0]}" if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
    return f"{one['replan_interval_steps']}; {wanted}"


def _versions(chunks: Mapping[int, int]) -> str:
    return ", ".join(f"{number} of version {version}" for version, number in chunks.items())


def _ms_each(seconds: float, number: int) -> float | None:
    return None if math.isnan(seconds) else seconds / number * 1e3


def _three(values: Mapping[str, float | None] | None) -> str:
    if not values or values["p50"] is None:
        return "-"
    return " / ".join(_number(values[name]) for name in ("p50", "p99", "max"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"
