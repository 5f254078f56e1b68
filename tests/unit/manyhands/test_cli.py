"""The command as a user meets it: what it prints, and the exit code; real processes where a process is the point."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyhands import __version__, cli, config, logs

PROGRAM = '''"""Owns one robot.

The agent judges every command last."""
from pathlib import Path
from pydantic import Field
from manyhands import config, errors
{imports}

class Settings(config.Settings):
    examples = ("--robot-id left",)
    robot_id: str = Field(description="unique in a fleet")
    rate_hz: float = Field(default=30, gt=0, description="control rate")

def main(settings):
    {body}
'''


@pytest.fixture
def make_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("MANYHANDS_")]:
        monkeypatch.delenv(name)
    # A command's main sets up logging for its process; pytest's own must come back.
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    made: list[str] = []

    def make(body: str = "return 0", imports: str = "", extra: str = "") -> str:
        module = f"probe_command_{tmp_path.name}_{len(made)}"
        (tmp_path / f"{module}.py").write_text(PROGRAM.format(body=body, imports=imports))
        made.append(module)
        monkeypatch.setitem(cli.COMMANDS, "probe", cli.Command(module=module, summary="own a robot", extra=extra))
        return "probe"

    yield make
    root.handlers[:], root.level = handlers, level


def test_list_of_commands_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert any(line.split()[:1] == [name] and command.summary in line for line in lines)


def test_list_of_commands_imports_none_of_them() -> None:
    program = (
        "import sys; from manyhands import cli; cli.main(['--help'])\n"
        "heavy = {c.module for c in cli.COMMANDS.values()} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_command_of_the_table_exists() -> None:
    missing = [name for name, command in cli.COMMANDS.items() if importlib.util.find_spec(command.module) is None]
    assert missing == []


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"manyhands {__version__}\n"


def test_no_command_is_a_usage_error() -> None:
    assert cli.main([]) == 2


def test_misspelt_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["robt"]) == 2
    assert "did you mean 'manyhands robot'?" in capsys.readouterr().err


def test_help_of_a_command_is_complete(make_command: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([make_command(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "The agent judges every command last." in text
    assert re.search(r"--robot-id TEXT\n\s+unique in a fleet \[required\]", text)
    assert re.search(r"--rate-hz HZ\n\s+control rate \[> 0; default: 30\]", text)
    assert "--log-level {debug,info,warning,error}" in text
    assert "manyhands probe --robot-id left" in text


def test_exit_code_is_the_commands_own(make_command: Callable[..., str]) -> None:
    assert cli.main([make_command("return 7 if settings.robot_id == 'left' else 0"), "--robot-id", "left"]) == 7


def test_bad_setting_is_two_lines_and_no_traceback(
    make_command: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([make_command(), "--robot-id", "left", "--rate-hz", "0"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("manyhands probe: rate_hz = '0' (from --rate-hz) must be greater than 0")
    assert "manyhands probe --help" in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("errors.Refused('the port is taken; give another --address')", 2),
        ("errors.InvalidInput('must be > 0', field='rate_hz')", 2),
        ("errors.NotFound('no dataset pick')", 2),
        ("errors.Unreachable('127.0.0.1:1 does not answer')", 1),
        ("KeyboardInterrupt()", 130),
    ],
)
def test_what_a_command_raises_on_purpose_is_a_message(
    raised: str, code: int, make_command: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([make_command(f"raise {raised}"), "--robot-id", "left"]) == code
    assert "Traceback" not in capsys.readouterr().err


def test_a_bug_is_not_dressed_up_as_a_users_mistake(make_command: Callable[..., str]) -> None:
    with pytest.raises(ZeroDivisionError):
        cli.main([make_command("return 1 // 0"), "--robot-id", "left"])


@pytest.mark.parametrize(
    ("imports", "extra", "advice"),
    [
        ("import torch_that_is_not_there", "serve", "pip install 'manyhands[serve]'"),
        ("import package_nobody_has", "", "pip install 'manyhands'"),
    ],
)
def test_a_missing_package_says_what_to_install(
    imports: str, extra: str, advice: str, make_command: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([make_command(imports=imports, extra=extra), "--robot-id", "left"]) == 2
    text = capsys.readouterr().err
    assert imports.split()[1] in text
    assert advice in text


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [("serve", "torch", "serve"), ("learner", "torch", "learn"), ("learner", "ray", "learn"), ("robot", "mujoco", "sim")],
)
def test_advice_names_the_extra_that_brings_the_package(command: str, module: str, extra: str) -> None:
    assert f"manyhands[{extra}]" in cli.missing_module_advice(command, module)


def test_every_module_of_the_advice_is_in_that_extra() -> None:
    text = (Path(cli.__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for module, extra in cli.EXTRA_OF_MODULE.items():
        if module == "gymnasium":  # Comes with metaworld.
            continue
        listing = re.search(rf"^{extra} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
        assert listing is not None
        assert f'"{module}' in listing[1], f"{module} is not in extra {extra}"


def test_module_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manyhands", "--version"], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"manyhands {__version__}\n")


def test_reader_that_leaves_early_gets_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "manyhands", "--help"],
            stdout=writing,
            # Buffered, as on a user's machine: then the complaint would come while Python ends.
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert done.stderr == ""


def _record(message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("robot_agent.main", logging.WARNING, __file__, 1, message, arguments, None)


def test_log_record_is_one_line_whatever_a_peer_put_in_it() -> None:
    line = logs.TextFormatter("robot").format(_record("robot %s", "x\n2026-01-01 INFO forged\x1b[31m"))
    assert "\n" not in line
    assert "\x1b" not in line
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:.]+Z WARNING robot\[\d+\] robot_agent.main: robot x", line)


def test_json_log_has_the_traceback_in_its_own_field() -> None:
    try:
        raise ValueError("broken\nin two lines")
    except ValueError:
        record = _record("failed")
        record.exc_info = sys.exc_info()
    line = logs.JsonFormatter("actor/left").format(record)
    assert "\n" not in line
    fields = json.loads(line)
    assert (fields["process"], fields["level"], fields["message"]) == ("actor/left", "WARNING", "failed")
    assert "ValueError: broken" in fields["traceback"]


def test_log_level_and_form_come_from_the_settings(
    make_command: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    name = make_command(
        "import logging; logging.getLogger('x').info('seen'); logging.getLogger('x').debug('hidden'); return 0"
    )
    assert cli.main([name, "--robot-id", "left", "--log-json"]) == 0
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["message"] for line in lines] == ["seen"]
    assert json.loads(lines[0])["process"] == "probe"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_of_a_command_are_accepted(name: str) -> None:
    """An example in --help that is refused is worse than none."""
    module = importlib.import_module(cli.COMMANDS[name].module)
    for example in module.Settings.examples:
        config.load(module.Settings, shlex.split(example))
