"""What was measured, as a page."""

from __future__ import annotations

from typing import Any

from services.loadtest.plan import STAGES
from tests.benchmarks.serving import device
from tests.benchmarks.serving.loads import ASK_EVERY_S, ASK_TOKENS, RATE_HZ, ROBOTS, Found, is_clean

REQUIRED = {"added_ms": 3.0, "fleet_p99_ms": 100.0, "tokens_per_s": 1000.0, "swap_added_ms": 30.0, "second_start_s": 60.0}

NOTHING = {"p50": None, "p99": None}

Row = tuple[str, str, str]


def lines(title: str, settings: list[str], results: dict[str, Any], failures: dict[str, str]) -> list[str]:
    """
    Args:
        results: By part; what is not there is left out.
        failures: By part, what went wrong, or why it was left out.
    """
    rows: list[Row] = []
    if "load alone" in results:
        rows += _alone(results["load alone"], results.get("engine alone"))
    if "fleet" in results:
        rows += _fleet(results["fleet"])
    if "text" in results:
        kept = [rung["load"]["text"]["tokens_per_s"] for rung in results["text"] if is_clean(rung["load"])]
        rows.append(
            ("highest text rate without a miss, tokens/s", f"{max(kept, default=0):.0f}", f"{REQUIRED['tokens_per_s']:g}")
        )
    if "swap" in results:
        rows += _swap(results["swap"])
    rows += _device(results)
    rows += _starts(results.get("starts", []))
    if "peer" in results:
        rows += _peer(results["peer"])
    page = [f"# {title}", "", *settings, "", "| | measured | required |", "|---|---|---|"]
    page += [f"| {name} | {value} | {wanted} |" for name, value, wanted in rows]
    page += _stages(
        {name: results[key] for name, key in (("one robot", "load alone"), ("fleet", "fleet")) if key in results}
    )
    page += _texts(results.get("text", []))
    page += _where_starts_go(results.get("starts", []))
    for part, why in failures.items():
        page += ["", f"Not measured, {part}: {why}"]
    return page


def _alone(load: Found, engine: Found | None) -> list[Row]:
    rows = [("one robot, JPEG: p50 / p99, ms", _pair(load["latency_ms"], 2), "-")]
    if engine is not None and load["chunks"]:
        added = load["latency_ms"]["p50"] - engine["chunk_ms"]["p50"]
        rows += [
            ("engine alone, one row, host to host: p50 / p99, ms", _pair(engine["chunk_ms"], 2), "-"),
            (
                "making the prompt of a row, which is part of what is added: p50 / p99, ms",
                _pair(engine["preparing_ms"], 2),
                "-",
            ),
            ("added over the engine at p50, ms", f"{added:.2f}", f"{REQUIRED['added_ms']:g}"),
        ]
    return rows


def _fleet(load: Found) -> list[Row]:
    text = load["text"]
    return [
        (
            f"{ROBOTS} robots at {RATE_HZ:g} Hz with subtasks: p50 / p99 / longest, ms",
            f"{_pair(load['latency_ms'], 1)} / {_number(load['latency_ms']['max'], 1)}",
            f"p99 {REQUIRED['fleet_p99_ms']:g}",
        ),
        ("missed deadlines; errors; refusals", _failed(load), "0"),
        (
            "chunks a second; ticks skipped, still waiting",
            f"{load['chunks_per_s']:.1f}; {load['skipped']}",
            f"{ROBOTS * RATE_HZ:g}; 0",
        ),
        (
            "actions that robots executed of a chunk; that the server asked for: chunks",
            f"{load['replan_interval_steps']}; {_counts(load['chunks_by_asked_interval_steps'])}",
            "-",
        ),
        (
            f"subtasks of {ASK_TOKENS} tokens every {ASK_EVERY_S:g} s: answered; tokens of one; tokens/s",
            f"{text['texts']} of {text['questions']}; {_number(text['answer_tokens']['mean'], 1)}; "
            f"{text['tokens_per_s']:.0f}",
            f"all; {ASK_TOKENS}; {ROBOTS * ASK_TOKENS / ASK_EVERY_S:g}",
        ),
    ]


def _swap(found: Found) -> list[Row]:
    rows = [("publishing all weights twice, s", ", ".join(f"{took_s:.1f}" for took_s in found["published_s"]), "-")]
    for swap in found["swaps"]:
        name = f"swap to version {swap['number']} under that load"
        rows += [
            (
                f"{name}: asked to serving, s; pause that the server says, ms",
                f"{swap['took_s']:.1f}; {swap['pause_ms']:.2f}",
                "-",
            ),
            (
                f"{name}: chunk p50 / p99 / longest before; while it is brought in; 2 s around the change, ms",
                "; ".join(
                    f"{_pair(swap[when], 1)} / {_number(swap[when]['max'], 1)}" for when in ("before", "meanwhile", "around")
                ),
                "-",
            ),
            (f"{name}: longest added delay, ms", f"{swap['added_ms']:.1f}", f"{REQUIRED['swap_added_ms']:g}"),
        ]
    if found["failure"]:
        rows.append(("a swap failed", found["failure"], "-"))
    rows.append(("in the load with swaps: missed deadlines; errors; refusals", _failed(found["load"]), "0"))
    rows.append(("chunks by version", _counts(found["load"]["chunks_by_version"]), "-"))
    return rows


def _device(results: dict[str, Any]) -> list[Row]:
    """A row for each load."""
    loads = {"one robot": results.get("load alone"), "fleet": results.get("fleet")}
    loads |= {f"text, {rung['asked']}": rung["load"] for rung in results.get("text", []) if rung["load"] != loads["fleet"]}
    loads["swaps"] = results["swap"]["load"] if "swap" in results else None
    return [
        (f"{name}: device, ms of each second", device.line(load["device"]), "-")
        for name, load in loads.items()
        if load is not None
    ]


def _starts(starts: list[Found]) -> list[Row]:
    return [
        ("second start, command to ready, s", f"{start['ready_s']:.1f}", f"{REQUIRED['second_start_s']:g}")
        if start["is_second"]
        else ("first start, command to ready, s", f"{start['ready_s']:.1f}", "-")
        for start in starts
    ]


def _peer(found: Found) -> list[Row]:
    plain = found["plain_server"]
    rate = f"one robot at {found['requests_per_s']:.1f} Hz"
    return [
        (f"{rate}, this service: p50 / p99, ms", _pair(found["latency_ms"], 1), "-"),
        (f"{rate}, plain websocket server with the plain module: p50 / p99, ms", _pair(plain["latency_ms"], 1), "-"),
    ]


def _stages(loads: dict[str, Found]) -> list[str]:
    if not loads:
        return []
    shown: dict[str, list[str]] = {}
    for load in loads.values():
        stages, total = load["stage_ms"], load["stage_ms"].get("total", NOTHING)
        for stage in STAGES:
            shown.setdefault(stage, []).append(_pair(stages.get(stage, NOTHING), 2))
        is_known = load["latency_ms"]["p50"] is not None
        apart = sum(stages.get(stage, NOTHING)["p50"] or 0.0 for stage in STAGES if stage != "total")
        between = f"{total['p50'] - apart:.2f}" if is_known else "-"
        shown.setdefault("between threads: total's p50 less those of the stages", []).append(between)
        outside = f"{load['latency_ms']['p50'] - total['p50']:.2f}" if is_known else "-"
        shown.setdefault("outside the server: the robot's p50 less that of total", []).append(outside)
        shown.setdefault("robots in a pass, mean", []).append(f"{load['mean_batch_size']:.2f}")
        shown.setdefault("the load test's own lag", []).append(_pair(load["lag_ms"], 2))
    return [
        "",
        f"| stage, p50 / p99 ms | {' | '.join(loads)} |",
        "|---|" + "---|" * len(loads),
        *(f"| {name} | {' | '.join(values)} |" for name, values in shown.items()),
    ]


def _texts(rungs: list[Found]) -> list[str]:
    if not rungs:
        return []
    found = [
        "",
        f"Text beside the chunks of {ROBOTS} robots at {RATE_HZ:g} Hz; each robot has one question at a time:",
        "",
        "| tokens asked for | tokens/s | tokens of an answer | answered | chunk p50 / p99 / longest, ms | chunks/s "
        "| missed, skipped, refused | first token p50 / p99, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung in rungs:
        load = rung["load"]
        latency, text = load["latency_ms"], load["text"]
        found.append(
            f"| {rung['asked']} | {text['tokens_per_s']:.0f} | {_number(text['answer_tokens']['mean'], 1)} "
            f"| {text['texts']} of {text['questions']} | {_pair(latency, 1)} / {_number(latency['max'], 1)} "
            f"| {load['chunks_per_s']:.1f} | {load['missed_deadlines']}, {load['skipped']}, {_counts(load['refusals'])} "
            f"| {_pair(text['first_token_ms'], 0)} |"
        )
    return found


def _where_starts_go(starts: list[Found]) -> list[str]:
    found = []
    for start in starts:
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start["phases"])
        found += ["", f"{'Second' if start['is_second'] else 'First'} start, s: {phases}."]
    return found


def _failed(load: Found) -> str:
    of = f"{load['missed_deadlines']} of {load['requests']}" if load["missed_deadlines"] else "0"
    return f"{of}; {load['errors']}; {_counts(load['refusals'])}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name}: {number}" for name, number in counts.items()) or "none"


def _pair(values: dict[str, float | None], digits: int) -> str:
    return f"{_number(values['p50'], digits)} / {_number(values['p99'], digits)}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
