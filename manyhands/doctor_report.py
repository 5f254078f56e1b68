"""What one line of 'manyhands doctor' says."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class State(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Check:
    """detail: what was found; advice: the command or change that mends it, "" when there is nothing to do."""

    name: str
    state: State
    detail: str
    advice: str = ""
