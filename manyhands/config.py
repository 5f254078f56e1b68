"""Typed configuration of every command: TOML file, environment, flags; unknown keys are refused.

A command is a module with a Settings class (a subclass of Settings below, one field per knob, each with a description)
and main(settings) -> int, the exit code. Order of precedence: flags, environment (MANYHANDS_<FIELD>), --config FILE, defaults.
"""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict


class Settings(BaseSettings):
    """Base of every command's configuration."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix="MANYHANDS_", env_nested_delimiter="__", frozen=True)
