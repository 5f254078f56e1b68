"""Settings come from where the user put them, and a mistake is answered with the key, its value and the remedy."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated, Literal

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from manyhands import config
from manyhands.errors import InvalidInput
from manyhands.knobs import POSITIONAL
from manyhands.security import SecuritySettings


class Video(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    codec: Literal["h264", "av1"] = "h264"
    crf: int = Field(default=23, ge=0, le=51)


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class RobotSettings(config.Settings):
    robot_id: str = Field(description="unique in a fleet")
    rate_hz: float = Field(default=30, gt=0, le=1000, description="control rate")
    model: dict[str, Path] = Field(default={}, description="served models")
    camera: list[str] = Field(default=[])
    size: tuple[int, int] = (480, 640)
    fast: bool = True
    state_dir: Path | None = None
    colour: Colour = Colour.RED
    video: Video = Video()
    cameras_by_name: dict[str, Video] = Field(default={})
    security: SecuritySettings = SecuritySettings()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.upper().startswith("MANYHANDS_")]:
        monkeypatch.delenv(name)


def _load(*flags: str) -> RobotSettings:
    return config.load(RobotSettings, ["--robot-id", "left", *flags])


def _refusal(*flags: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        _load(*flags)
    return str(caught.value)


def test_flags_of_every_shape() -> None:
    settings = _load(
        "--rate-hz=50", "--model", "small=/m/small", "--model", "large=/m/a=b", "--camera", "wrist", "--camera=top, left",
        "--size", "240,320", "--no-fast", "--state-dir", "/var/lib/left", "--colour", "blue", "--video.crf", "30",
        "--cameras-by-name", 'top={"codec": "av1"}', "--security.authority", "/a.pem", "--security.token-file", "/t",
    )  # fmt: skip
    assert settings.rate_hz == 50
    assert settings.model == {"small": Path("/m/small"), "large": Path("/m/a=b")}
    assert settings.camera == ["wrist", "top, left"]
    assert settings.size == (240, 320)
    assert settings.fast is False
    assert settings.state_dir == Path("/var/lib/left")
    assert settings.colour is Colour.BLUE
    assert settings.video == Video(crf=30)
    assert settings.cameras_by_name == {"top": Video(codec="av1")}
    assert settings.security.token_file == Path("/t")


def test_negative_number_is_a_value_and_not_a_flag() -> None:
    assert "greater than 0" in _refusal("--rate-hz", "-3")


def test_precedence_is_flag_environment_file_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "robot.toml"
    file.write_text("rate_hz = 10\nsize = [1, 2]\nfast = false\n[video]\ncrf = 10\ncodec = 'av1'\n[model]\na = '/file'\n")
    assert _load("--config", str(file)).rate_hz == 10
    monkeypatch.setenv("MANYHANDS_RATE_HZ", "20")
    monkeypatch.setenv("MANYHANDS_VIDEO__CRF", "20")
    monkeypatch.setenv("MANYHANDS_MODEL", '{"b": "/environment"}')
    settings = _load("--config", str(file))
    assert (settings.rate_hz, settings.size, settings.fast) == (20, (1, 2), False)
    assert settings.video == Video(crf=20, codec="av1")
    settings = _load("--config", str(file), "--rate-hz", "30", "--fast", "--model", "b=/flag")
    assert (settings.rate_hz, settings.fast) == (30, True)
    assert settings.model == {"a": Path("/file"), "b": Path("/flag")}
    assert settings.colour is Colour.RED


def test_file_can_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "robot.toml"
    file.write_text("rate_hz = 10\n")
    monkeypatch.setenv("MANYHANDS_CONFIG", str(file))
    assert _load().rate_hz == 10


def test_building_settings_in_code_does_not_read_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYHANDS_RATE_HZ", "20")
    assert RobotSettings(robot_id="left").rate_hz == 30


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rate-hx", "3"], ["unknown flag --rate-hx", "did you mean --rate-hz?"]),
        (["--rate_hz", "3"], ["unknown flag --rate_hz", "did you mean --rate-hz?"]),
        (["--video.crff", "3"], ["--video.crff", "did you mean --video.crf?"]),
        (["--rate-hz"], ["--rate-hz", "needs a value"]),
        (["--rate-hz", "--fast"], ["--rate-hz", "needs a value"]),
        (["--rate-hz", "fast"], ["rate_hz = 'fast'", "from --rate-hz", "number", "default 30", "control rate"]),
        (["--rate-hz", "2000"], ["rate_hz = '2000'", "less than or equal to 1000"]),
        (["--rate-hz", "1", "--rate-hz", "2"], ["--rate-hz", "given twice"]),
        (["--colour", "green"], ["colour = 'green'", "'red' or 'blue'"]),
        (["--video.codec", "mpeg"], ["video.codec = 'mpeg'", "'h264' or 'av1'"]),
        (["--size", "1"], ["size = ['1']", "too short"]),
        (["--size", "1,x"], ["size = 'x'", "at 1"]),
        (["--model", "small"], ["--model", "'small' must be KEY=VALUE"]),
        (["--model", "a=1", "--model", "a=2"], ["--model", "'a' is given twice"]),
        (["--fast=yes"], ["--fast takes no value", "--no-fast"]),
        (["stray"], ["unexpected argument 'stray'"]),
        (["--security.certificate", "/c"], ["security.certificate and security.key come together"]),
        (["--config", "/nowhere/robot.toml"], ["cannot read /nowhere/robot.toml"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].startswith("-") else "",
)
def test_a_bad_flag_is_answered_with_key_value_limit_and_remedy(flags: list[str], words: list[str]) -> None:
    refusal = _refusal(*flags)
    for word in words:
        assert word in refusal


def test_all_bad_values_are_told_at_once() -> None:
    refusal = _refusal("--rate-hz", "x", "--video.crf", "99")
    assert "rate_hz" in refusal
    assert "video.crf" in refusal


def test_a_missing_setting_says_all_ways_to_give_it() -> None:
    with pytest.raises(InvalidInput, match=r"robot_id is required: give --robot-id, MANYHANDS_ROBOT_ID or robot_id in"):
        config.load(RobotSettings, [])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rate_hx = 3", ["unknown key rate_hx in", "did you mean rate_hz?"]),
        ("rate-hz = 3", ["unknown key rate-hz in", "did you mean rate_hz?"]),
        ("[video]\ncfr = 3", ["unknown key video.cfr in", "did you mean video.crf?"]),
        ("rate_hz = 'x'", ["rate_hz = 'x'", "robot.toml"]),
        ("rate_hz = ", ["is not TOML"]),
    ],
)
def test_a_bad_file_is_named(content: str, words: list[str], tmp_path: Path) -> None:
    file = tmp_path / "robot.toml"
    file.write_text(content)
    refusal = _refusal("--config", str(file))
    for word in words:
        assert word in refusal


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MANYHANDS_RATE_HX", "3", ["MANYHANDS_RATE_HX", "did you mean MANYHANDS_RATE_HZ?"]),
        ("MANYHANDS_VIDEO__CFR", "3", ["MANYHANDS_VIDEO__CFR", "did you mean MANYHANDS_VIDEO__CRF?"]),
        ("MANYHANDS_RATE_HZ", "x", ["rate_hz = 'x'", "from MANYHANDS_RATE_HZ"]),
        ("MANYHANDS_CAMERA", "wrist", ["MANYHANDS_CAMERA = 'wrist' must be JSON"]),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    refusal = _refusal()
    for word in words:
        assert word in refusal


class CopySettings(config.Settings):
    source: Annotated[Path, Field(description="from"), POSITIONAL]
    targets: Annotated[list[Path], POSITIONAL] = Field(default=[])
    force: bool = False


def test_positional_settings_come_in_order_and_a_list_takes_the_rest() -> None:
    settings = config.load(CopySettings, ["a", "--force", "b", "c"])
    assert settings == CopySettings(source=Path("a"), targets=[Path("b"), Path("c")], force=True)
    with pytest.raises(InvalidInput, match="source is required: give SOURCE"):
        config.load(CopySettings, [])


WORDS = st.sampled_from(
    ["--rate-hz", "--model", "--camera", "--size", "--fast", "--no-fast", "--video.crf", "--cameras-by-name", "--colour",
     "--config", "--security.certificate", "--log-level", "--", "-", "-x", "=", "--rate-hz=", "a=b", "a={", "a=[1]", "{",
     "1,2", "1e9999", "nan", "\0", "--security", "--video", "--model=a=b=c", "--camera=[", "--size=1,,2"]
)  # fmt: skip


@given(st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=6))
@hypothesis.settings(max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_no_command_line_makes_a_traceback(words: list[str]) -> None:
    try:
        settings = config.load(RobotSettings, ["--robot-id", "left", *words])
    except (InvalidInput, config.HelpAsked):
        return
    assert 0 < settings.rate_hz <= 1000


@pytest.mark.parametrize(
    "content",
    ["video = 3", "model = 3", "camera = 'x'", "security = []", "model = {a = {b = 1}}", "size = [[1]]", "log_level = 1"],
)
def test_no_file_makes_a_traceback(content: str, tmp_path: Path) -> None:
    file = tmp_path / "robot.toml"
    file.write_text(content)
    assert content.split()[0] in _refusal("--config", str(file))
