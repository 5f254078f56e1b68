"""What the doctor finds in prepared states of a machine, and what it tells to do."""

from __future__ import annotations

import importlib
import json
import os
import socket
from pathlib import Path

import pytest

from manyhands import cli, doctor, doctor_machine, doctor_packages, ports
from manyhands.doctor_packages import parse_bounds, parse_requirement, within
from manyhands.doctor_report import Check, State


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("MANYHANDS_")]:
        monkeypatch.delenv(name)


def test_a_free_port_and_a_taken_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (check,) = doctor_machine.check_ports({"store": port})
        assert check.state is State.WARN
        assert f"pid {os.getpid()}" in check.detail
        assert "manyhands store" in check.advice
    (check,) = doctor_machine.check_ports({"store": port})
    assert (check.state, check.detail) == (State.OK, "store: free")


@pytest.mark.parametrize(
    ("command_line", "ours"),
    [
        (["/usr/bin/python3", "/venv/bin/manyhands", "store"], True),
        (["python", "-m", "manyhands", "store"], True),
        (["python", "/home/me/manyhands/serve.py"], False),
        (["nginx"], False),
        ([], False),
    ],
)
def test_our_own_servers_are_told_from_others(command_line: list[str], ours: bool) -> None:
    assert doctor_machine.is_our_command(command_line) is ours


def test_default_ports_do_not_collide() -> None:
    used = list(ports.DEFAULT_PORTS.values())
    assert len(set(used)) == len(used)
    assert set(ports.DEFAULT_PORTS) <= set(cli.COMMANDS)


def test_camera_and_serial_files(tmp_path: Path) -> None:
    (none,) = doctor_machine.check_cameras(tmp_path)
    assert none.state is State.OK
    (tmp_path / "video0").touch()
    (tmp_path / "ttyACM0").touch()
    (camera,) = doctor_machine.check_cameras(tmp_path)
    (serial,) = doctor_machine.check_serial_ports(tmp_path)
    assert (camera.state, camera.detail) == (State.OK, str(tmp_path / "video0"))
    assert (serial.state, serial.detail) == (State.OK, str(tmp_path / "ttyACM0"))


def test_a_device_without_permission_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ttyUSB0").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)
    (check,) = doctor_machine.check_serial_ports(tmp_path)
    assert check.state is State.WARN
    assert "usermod -aG dialout" in check.advice


@pytest.mark.parametrize("name", ports.DEFAULT_PORTS)
def test_commands_listen_on_the_ports_of_the_list_or_on_a_free_one(name: str) -> None:
    module = importlib.import_module(cli.COMMANDS[name].module)
    port = int(module.Settings.model_fields["address"].default.rpartition(":")[2])
    assert port in (0, ports.DEFAULT_PORTS[name])


@pytest.mark.parametrize(
    ("version", "bounds", "met"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.9", ">=2.11", False),
        ("2.11", ">=2.11", True),
        ("3.3.0", "==3.3.0", True),
        ("3.3", "==3.3.0", True),
        ("3.10.0", "<3.9", False),
        ("1.85.1", ">=1.85,<2", True),
        ("2.0", ">=1.85,<2", False),
        ("1.4.9", "~=1.4.2", True),
        ("1.5.0", "~=1.4.2", False),
        ("1.4.1", "~=1.4.2", False),
        ("7.0", "", True),
    ],
)
def test_version_bounds(version: str, bounds: str, met: bool) -> None:
    assert within(version, parse_bounds(bounds)) is met


def test_requirement_lines_of_a_distribution() -> None:
    requirement = parse_requirement('ray[train]>=2.50; extra == "learn"')
    assert (requirement.name, requirement.bounds, requirement.extra) == ("ray", ((">=", "2.50"),), "learn")
    assert parse_requirement("packaging; extra == 'sim'").bounds == ()
    assert parse_requirement("numpy>=2.0").extra == ""


def test_packages_too_old_or_missing_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "numpy>=2.0",
        "grpcio>=1.85",
        'torch>=2.11; extra == "serve"',
        'av>=14; extra == "serve"',
        'x>=1; extra == "sim"',
    ]
    monkeypatch.setattr(doctor_packages, "declared_requirements", lambda: [parse_requirement(line) for line in lines])
    versions = {"numpy": "1.26.4", "torch": "2.4.0", "av": "18.1.0"}
    monkeypatch.setattr(doctor_packages.importlib.metadata, "version", lambda name: versions[name])
    monkeypatch.setattr(doctor_packages.importlib.metadata, "PackageNotFoundError", KeyError)
    (base,) = doctor_packages.check_packages()
    assert base.state is State.FAIL
    assert base.detail == "numpy is 1.26.4, needs >=2.0; grpcio is missing"
    serve, sim = doctor_packages.check_extras()
    assert (serve.name, serve.state, serve.detail) == ("extra serve", State.FAIL, "torch is 2.4.0, needs >=2.11")
    assert (sim.state, sim.detail) == (State.WARN, "not installed: x")
    assert "pip install 'manyhands[sim]'" in sim.advice


def test_this_installation_is_within_its_own_bounds() -> None:
    (python,) = doctor_packages.check_python()
    (base,) = doctor_packages.check_packages()
    assert python.state is base.state is State.OK


def test_little_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 2**29})
    monkeypatch.setattr(doctor_machine.shutil, "disk_usage", lambda _: usage)
    (check,) = doctor_machine.check_disk(tmp_path)
    assert check.state is State.FAIL
    assert "0.5 GiB" in check.detail


def test_torch_that_does_not_start_fails_without_taking_us_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(doctor_machine, "_ASK_TORCH", "import os; os.abort()")
    (check,) = doctor_machine.check_gpu()
    assert check.state is State.FAIL


def test_a_machine_without_torch_is_a_robot_pc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(doctor_machine.Path, "exists", lambda _: False)
    assert [check.state for check in doctor_machine.check_gpu() + doctor_machine.check_rendering()] == [State.OK] * 2


def test_rendering_falls_back_to_osmesa_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_machine.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(doctor_machine, "_RENDER", "import os, sys; sys.exit(os.environ['MUJOCO_GL'] == 'egl')")
    (check,) = doctor_machine.check_rendering()
    assert (check.state, check.detail) == (State.WARN, "MuJoCo renders through osmesa")
    monkeypatch.setattr(doctor_machine, "_RENDER", "import sys; sys.exit('no display')")
    (check,) = doctor_machine.check_rendering()
    assert check.state is State.WARN
    assert "libegl1" in check.advice


def _with_checks(monkeypatch: pytest.MonkeyPatch, *states: State) -> None:
    checks = [Check(name=f"check [{state.value}]", state=state, detail="[red]found", advice="do it") for state in states]
    monkeypatch.setattr(doctor, "run_checks", lambda _: checks)


@pytest.mark.parametrize(
    ("states", "code"), [([State.OK, State.OK], 0), ([State.OK, State.WARN], 0), ([State.WARN, State.FAIL], 1)]
)
def test_exit_code_is_one_only_if_something_fails(
    states: list[State], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _with_checks(monkeypatch, *states)
    assert doctor.main(doctor.Settings()) == code
    text = capsys.readouterr().out
    assert "[red]found" in text  # What a machine calls its devices is no markup.
    assert doctor.main(doctor.Settings(print_json=True)) == code
    assert [entry["state"] for entry in json.loads(capsys.readouterr().out)] == [state.value for state in states]


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[Check]:
        raise PermissionError("/proc is closed")

    monkeypatch.setattr(doctor_machine, "check_memory", broken)
    checks = doctor.run_checks(doctor.Settings(slow=False, folder=tmp_path))
    (memory,) = [check for check in checks if check.name == "memory"]
    assert memory.state is State.WARN
    assert "/proc is closed" in memory.detail


def test_command_takes_the_flag_json(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--json", "--no-slow"])
    names = {entry["name"] for entry in json.loads(capsys.readouterr().out)}
    assert {"python", "packages", "port 50051", "disk", "clock"} <= names
