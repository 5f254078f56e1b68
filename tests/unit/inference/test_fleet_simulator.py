"""The fleet simulator: what it says about a fleet is what the scheduler would do to it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from manyhands.cli import main as manyhands
from manyhands.errors import InvalidInput
from services.inference.fleet_simulator import simulate
from services.inference.fused.settings import FusedSettings
from services.inference.simulate_fleet import Settings, make_fleet, read_durations, summarise
from services.inference.simulated_fleet import Fleet
from services.inference.unit_durations import UnitDurations, interpolate
from services.inference.units import UnitKind

# What the matrix products of an H200 take, without anything around them.
H200 = UnitDurations(
    prefix_s={1: 0.0059, 2: 0.0118, 4: 0.0235},
    expert_step_s={1: 0.000163, 2: 0.000182, 4: 0.00022, 8: 0.000392},
    text_prefix_s=0.0059,
    draft_check_s=0.0012,
    text_step_s={1: 0.00117, 32: 0.00132},
    num_text_slices=6,
)


# As the engine benchmark of 2026-11-28 measured the served engine, and with the expert's steps as they may become.
SERVED = UnitDurations(
    prefix_s={1: 0.0083, 2: 0.0152, 4: 0.0303},
    expert_step_s={1: 0.00078, 2: 0.00083, 4: 0.00096, 8: 0.00137, 16: 0.00203},
    text_prefix_s=0.0078,
    draft_check_s=0.002,
    text_step_s={1: 0.00166, 8: 0.00174, 16: 0.00182, 32: 0.00197},
    num_text_slices=6,
    jitter=0.01,
)
FASTER = dataclasses.replace(SERVED, expert_step_s={1: 0.0005, 2: 0.0006, 4: 0.00075, 8: 0.00115, 16: 0.002})


def fleet(**changed: Any) -> Fleet:
    return dataclasses.replace(make_fleet(Settings(seconds=20.0, ramp_up_s=1.0)), **changed)


def held(**changed: Any) -> Fleet:
    """16 robots at 5 Hz, whatever the service asks for, evenly out of step."""
    return fleet(keeps_rate=True, **{"jitter": 0.0, "ramp_up_s": 0.0, "max_rows": 16, **changed})


def slower(durations: UnitDurations, factor: float) -> UnitDurations:
    def scaled(seconds: Mapping[int, float]) -> dict[int, float]:
        return {size: factor * value for size, value in seconds.items()}

    return dataclasses.replace(
        durations,
        prefix_s=scaled(durations.prefix_s),
        expert_step_s=scaled(durations.expert_step_s),
        text_prefix_s=factor * durations.text_prefix_s,
        text_step_s=scaled(durations.text_step_s),
    )


def test_the_fleet_of_the_requirement_misses_nothing() -> None:
    result = summarise(fleet(), simulate(fleet(seconds=60.0), H200))
    assert result["missed_deadlines"] == 0
    assert result["refusals"] == {}
    assert result["chunks"] == pytest.approx(4800, rel=0.03)
    assert result["latency_ms"]["p99"] < 60.0
    # 16 robots, 20 tokens each every 2 s.
    assert result["text"]["tokens_per_s"] == pytest.approx(160, rel=0.1)
    # Prefixes and steps alone take 60 % of the device.
    assert 0.6 < result["device"]["use"] < 0.95


def test_the_same_seed_gives_the_same_result_and_another_seed_another() -> None:
    short = fleet(seconds=5.0)
    first, again = (summarise(short, simulate(short, H200, seed=3)) for _ in range(2))
    assert first == again
    assert first != summarise(short, simulate(short, H200, seed=4))


def test_questions_delay_chunks_by_less_than_one_of_their_prefixes() -> None:
    silent, asking = fleet(ask_every_s=0.0), fleet(ask_every_s=1.0)
    without, with_text = (summarise(one, simulate(one, H200)) for one in (silent, asking))
    assert without["text"]["tokens_per_s"] == 0
    assert with_text["latency_ms"]["p50"] < without["latency_ms"]["p50"] + 1e3 * H200.text_prefix_s
    assert with_text["missed_deadlines"] == 0


def test_what_is_promised_is_kept_where_a_single_row_cannot_be_hurried(tmp_path: Path) -> None:
    """A device whose step of eight rows takes twice as long as that of one: one after the other 66 chunks a second are made,
    106 with shared steps, and 20 robots at 5 Hz that ask every 2 s replan less often."""
    table = tmp_path / "gpu.json"
    table.write_text(
        json.dumps(
            {
                "prefix": {"1": 7.6, "2": 15.0, "4": 29.0},
                "expert_step": {"1": 0.75, "2": 1.0, "4": 1.3, "8": 1.5, "16": 2.4},
                "text_pictures": 1.8,
                "text_prefix": 6.0,
                "text_step": {"1": 1.65, "32": 1.65},
            }
        )
    )
    outcome = simulate(fleet(num_robots=20, max_rows=16, seconds=60.0, ramp_up_s=5.0), read_durations(table, 0.02))
    assert outcome.chunks_per_s == pytest.approx(1 / (0.0076 + 0.015 / 8))
    # 10 questions a second, and 20 steps a second that serve all.
    assert outcome.text_share == pytest.approx(10 * 0.0078 + 20 * 0.00165)
    assert outcome.stretch == pytest.approx(100 / (0.8 * 105.5 * (1 - outcome.text_share)), rel=0.01)
    assert outcome.num_missed == 0
    assert outcome.refused_robots == 0


@pytest.mark.parametrize(("durations", "least"), [(SERVED, 900), (FASTER, 1100)], ids=["served", "faster"])
def test_text_of_sixteen_robots_gets_what_chunks_at_5_hz_leave_and_none_of_them_is_late(
    durations: UnitDurations, least: int
) -> None:
    many = held(ask_every_s=1.0, ask_tokens=120)
    result = summarise(many, simulate(many, durations))
    assert result["text"]["tokens_per_s"] > least
    assert result["missed_deadlines"] == 0
    assert result["chunks"] / result["seconds"] == pytest.approx(80, abs=0.5)
    assert result["latency_ms"]["p99"] < 97.0
    # Who is not amid a prefix, steps with the others.
    assert result["device"]["mean_rows"]["text"] > 11


def test_text_that_comes_late_to_the_host_loses_nothing_by_it_where_several_step_together() -> None:
    many = held(ask_every_s=1.0, ask_tokens=120)
    at_once, late = (
        summarise(many, simulate(many, dataclasses.replace(SERVED, text_lag_s=lag_s))) for lag_s in (0.0, 0.0015)
    )
    assert late["missed_deadlines"] == at_once["missed_deadlines"] == 0
    assert late["text"]["tokens_per_s"] > 0.95 * at_once["text"]["tokens_per_s"] > 850
    assert late["device"]["mean_rows"]["text"] > 11


def test_a_slower_device_takes_from_text_first() -> None:
    rates = []
    for factor in (1.0, 1.05, 1.1):
        many = held(ask_every_s=1.0, ask_tokens=120)
        result = summarise(many, simulate(many, slower(SERVED, factor)))
        assert result["missed_deadlines"] == 0
        assert result["text"]["texts"] > 0
        rates.append(result["text"]["tokens_per_s"])
    assert rates[0] > 1.2 * rates[1] > 1.2 * 1.2 * rates[2] > 400


def test_faster_steps_make_no_device_slower() -> None:
    """They save less where they are shared; a full device must go on sharing them."""
    served, faster = (simulate(held(ask_every_s=2.0), durations) for durations in (SERVED, FASTER))
    assert served.num_missed == faster.num_missed == 0
    p50_s = [sorted(outcome.latencies_s)[len(outcome.latencies_s) // 2] for outcome in (served, faster)]
    assert p50_s[1] < p50_s[0]


def test_answers_come_as_soon_as_admission_counts_on() -> None:
    """Robots that replan as rarely as they are asked to leave room for text to come within a second."""
    for asked in ({"ask_every_s": 1.0, "ask_tokens": 120}, {"ask_every_s": 0.5, "ask_tokens": 20}):
        obeying = fleet(max_rows=16, **asked)
        result = summarise(obeying, simulate(obeying, SERVED))
        # Robots come at random: several observations of one moment can cost one of them.
        assert result["missed_deadlines"] <= 1
        assert result["interval_stretch"] > 1.3
        assert result["text"]["whole_ms"]["p99"] < 1100


def test_robots_keep_their_rate_evenly_out_of_step_where_that_is_asked_for() -> None:
    keeping = held(seconds=10.0, ask_every_s=0.0, network_jitter_s=0.0)
    outcome = simulate(keeping, slower(SERVED, 0.5), seed=1)
    assert outcome.num_requests == pytest.approx(16 * 5 * 10, abs=1)
    # Nobody meets anybody: all take the same.
    assert max(outcome.latencies_s) < 1.1 * min(outcome.latencies_s)
    crowded = held(seconds=10.0, num_robots=24, ask_every_s=0.0)
    outcome = simulate(crowded, SERVED)
    assert outcome.stretch > 1.3
    assert {robot.interval_steps for robot in outcome.robots} == {crowded.interval_steps}


def test_as_many_questions_are_amid_their_prefixes_as_in_the_engine() -> None:
    def default(owner: type, name: str) -> object:
        return next(field.default for field in dataclasses.fields(owner) if field.name == name)

    assert default(Fleet, "max_prefixes") == default(FusedSettings, "questions_at_once")


def test_sizes_that_are_not_prepared_take_as_long_as_the_next_bigger_one() -> None:
    assert SERVED.of(UnitKind.EXPERT, 7) == SERVED.of(UnitKind.EXPERT, 8) > SERVED.of(UnitKind.EXPERT, 6)
    assert SERVED.of(UnitKind.TEXT, 9) == SERVED.of(UnitKind.TEXT, 16) > SERVED.of(UnitKind.TEXT, 8)
    assert H200.of(UnitKind.PREFIX, 1) == pytest.approx(0.0059)


def test_a_questions_prefix_comes_in_slices_of_about_a_text_step(tmp_path: Path) -> None:
    table = tmp_path / "gpu.json"
    table.write_text(json.dumps({"text_pictures": 2.0, "text_prefix": 5.9, "text_step": {"1": 1.17, "32": 1.32}}))
    sliced = read_durations(table, 0.0)
    assert (sliced.num_picture_slices, sliced.num_text_slices) == (2, 5)
    assert [sliced.slice_s(index) for index in (1, 2)] == pytest.approx([0.001, 0.00118])
    assert sliced.of(UnitKind.TEXT_PREFIX, 1) == pytest.approx(0.00118)
    table.write_text(json.dumps({"text_pictures": 0.0}))
    assert read_durations(table, 0.0).num_question_slices == read_durations(table, 0.0).num_text_slices > 0


def test_a_table_says_how_late_text_comes_to_the_host(tmp_path: Path) -> None:
    table = tmp_path / "mine.json"
    for written, expected_s in (("{}", 0.0015), ('{"text_lag": 0.4}', 0.0004)):
        table.write_text(written)
        assert read_durations(table, 0.02).text_lag_s == pytest.approx(expected_s)


def test_over_capacity_intervals_grow_before_robots_are_refused() -> None:
    many = fleet(num_robots=60, ask_every_s=0.0, ramp_up_s=5.0)
    crowded = simulate(many, H200)
    assert crowded.refused_robots == 0
    assert crowded.stretch > 2.0
    assert summarise(many, crowded)["replan_hz"] < 2.5
    assert crowded.num_missed == 0
    too_many = simulate(fleet(num_robots=200, ask_every_s=0.0, ramp_up_s=5.0), H200)
    assert too_many.refused_robots > 50
    # Those who are in are served, at whole chunks between replans.
    served = [robot for robot in too_many.robots if robot.is_open]
    assert min(len(robot.latencies_s) for robot in served) > 5
    assert too_many.num_missed < 0.005 * too_many.num_requests


def test_a_question_is_spared_the_pictures_that_a_chunk_of_its_robot_saw() -> None:
    apart = dataclasses.replace(
        SERVED, text_pictures_s=0.002, num_picture_slices=2, text_prefix_s=0.0058, num_text_slices=4, jitter=0.0
    )
    outcome = simulate(held(num_robots=4, ask_every_s=1.0), apart)
    assert outcome.num_texts > 60
    assert outcome.busy_s["text_prefix"] == pytest.approx(0.0058 * outcome.num_texts, rel=0.02)
    # Chunks that are refused see nothing.
    nobody = simulate(held(num_robots=4, ask_every_s=1.0, deadline_s=0.004), apart)
    assert nobody.latencies_s == []
    assert nobody.busy_s["text_prefix"] == pytest.approx(0.0078 * nobody.num_texts, rel=0.02)


def test_drafts_that_are_right_save_steps() -> None:
    asking = fleet(ask_every_s=0.5)
    plain = simulate(asking, H200)
    drafted = simulate(dataclasses.replace(asking, draft_hit_share=1.0), H200)
    assert drafted.num_texts == pytest.approx(plain.num_texts, rel=0.05)
    assert drafted.busy_s.get("text", 0.0) < 0.2 * plain.busy_s["text"]


def test_a_slower_network_is_seen_and_counts_against_the_deadline() -> None:
    near, far = (simulate(fleet(seconds=5.0, network_s=way_s), H200) for way_s in (0.001, 0.040))
    assert sorted(far.latencies_s)[50] > sorted(near.latencies_s)[50] + 0.070
    lost = simulate(fleet(seconds=5.0, network_s=0.060), H200)
    assert lost.num_missed == pytest.approx(lost.num_requests, abs=20)


def test_times_between_two_sizes_lie_on_a_line() -> None:
    assert interpolate({1: 1.0, 4: 2.5}, 3) == pytest.approx(2.0)
    assert interpolate({2: 1.0, 4: 2.5}, 1) == 1.0
    assert interpolate({1: 1.0, 4: 2.0}, 8) == pytest.approx(4.0)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    durations = tmp_path / "gpu.json"
    durations.write_text(json.dumps({"prefix": {"1": 20.0}, "expert_step": {"1": 1.0}}))
    output = tmp_path / "fleet.json"
    flags = ["--robots", "2", "--seconds", "3", "--ramp-up-s", "0", "--durations", str(durations), "--json", str(output)]
    assert manyhands(["simulate-fleet", *flags]) == 0
    assert "p50 / p99" in capsys.readouterr().out
    result = json.loads(output.read_text())
    assert result["robots"] == 2
    assert result["latency_ms"]["p50"] > 30.0


def test_a_bad_table_is_named(tmp_path: Path) -> None:
    durations = tmp_path / "gpu.json"
    for text in ("{", '{"prefixes": {}}', '{"prefix": {}}', '{"prefix": {"0": 1.0}}', '{"prefix": {"1": -1.0}}'):
        durations.write_text(text)
        with pytest.raises(InvalidInput, match=r"gpu\.json"):
            read_durations(durations, 0.0)
