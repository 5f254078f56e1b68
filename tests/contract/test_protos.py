"""What the proto files themselves must hold: lint, no breaking change, a comment that binds on every RPC, one role table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from manyhands import roles

from .messages import ROOT, contract_enums, rpc_names

BUF = Path(sys.executable).with_name("buf")
# What a caller must know: whether a call may be repeated, and what a broken or refused one leaves behind.
_SAYS_WHAT_A_REPEAT_DOES = re.compile(r"idempotent|retr(y|ied)|again|reconnect|broken stream", re.IGNORECASE)


def _buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], cwd=ROOT / "protos", capture_output=True, text=True, timeout=60, check=False)


@cache
def _rpc_comments() -> dict[str, str]:
    """Leading comment of each RPC, from an image with source positions."""
    done = _buf("build", "-o", "-#format=json")
    assert done.returncode == 0, done.stderr
    comments: dict[str, str] = {}
    for file in json.loads(done.stdout)["file"]:
        if not file["name"].startswith("manyhands/"):
            continue
        at: dict[tuple[int, ...], str] = {
            tuple(location["path"]): location.get("leadingComments", "")
            for location in file["sourceCodeInfo"]["location"]
            if "path" in location
        }
        services: list[dict[str, Any]] = file.get("service", [])
        for i, service in enumerate(services):
            for j, method in enumerate(service["method"]):
                # Numbers of FileDescriptorProto.service and ServiceDescriptorProto.method.
                comments[f"/{file['package']}.{service['name']}/{method['name']}"] = at.get((6, i, 2, j), "")
    return comments


def test_lint() -> None:
    done = _buf("lint")
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_breaks_against_the_baseline() -> None:
    done = _buf("breaking", "--against", "baseline.binpb")
    assert done.returncode == 0, f"a peer of an older release would not understand this:\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("rpc", rpc_names())
def test_rpc_says_what_a_repeat_does(rpc: str) -> None:
    comment = _rpc_comments()[rpc]
    assert _SAYS_WHAT_A_REPEAT_DOES.search(comment), f"{rpc}: {comment.strip() or 'no comment'}"


def test_role_table_has_only_rpcs_that_exist() -> None:
    assert set(roles.ROLES_BY_METHOD) <= set(rpc_names())


def test_roles_are_those_that_the_protos_name() -> None:
    """Prose and table say the same: "Needs the learner role" is not everyone's, and not a viewer's."""
    for rpc, comment in _rpc_comments().items():
        for found in re.finditer(r"needs\s+the\s+(\w+)\s+role", comment, re.IGNORECASE):
            allowed = roles.roles_for(rpc)
            assert roles.Role(found[1]) in allowed, rpc
            assert roles.Role.VIEWER not in allowed, rpc


def test_an_operator_may_call_everything_and_a_new_rpc_is_for_operators_only() -> None:
    assert all(roles.Role.OPERATOR in roles.roles_for(rpc) for rpc in rpc_names())
    assert roles.roles_for("/manyhands.robot.v1.RobotService/NewRpc") == {roles.Role.OPERATOR}


def test_only_looking_and_stopping_is_for_viewers() -> None:
    """Pinned: who adds an RPC here gives it to everyone in the lab."""
    names = {rpc.rpartition("/")[2] for rpc in rpc_names() if roles.Role.VIEWER in roles.roles_for(rpc)}
    looking = ("Get", "List", "Watch", "Observe", "Describe", "Fetch", "Read", "Sample")
    assert {name for name in names if not name.startswith(looking)} == {"Hold", "EmergencyStop"}


def test_zero_of_every_enum_is_unspecified() -> None:
    for enum in contract_enums():
        assert enum.values_by_number[0].name.endswith("_UNSPECIFIED"), enum.full_name
