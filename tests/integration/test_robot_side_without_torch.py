"""The robot PC's two processes at work where the packages of servers are not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.local import Topology
from manyhands.clients.actor import ActorClient, teleoperate
from manyhands.errors import Refused

# Found before any installed one by every interpreter that has its folder on PYTHONPATH.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "ray", "safetensors", "tokenizers", "pyarrow", "av", "aiohttp"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def robot_pc(tmp_path: Path):
    (tmp_path / "blocker").mkdir()
    (tmp_path / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    with Topology(tmp_path / "logs", environment={"PYTHONPATH": str(tmp_path / "blocker")}) as topology:
        yield topology


def test_robot_agent_and_actor_drive_an_episode(robot_pc: Topology, tmp_path: Path) -> None:
    robot = robot_pc.start(
        "robot", ["robot", "--robot", "arm", "--address", "127.0.0.1:0", "--state-dir", str(tmp_path / "r")]
    )
    command = ["actor", "--robot", robot.address, "--spool", str(tmp_path / "spool"), "--address", "127.0.0.1:0"]
    with ActorClient(robot_pc.start("actor", command).address) as actor:
        actor.start_run(teleoperate("", teleoperator="expert", episode_count=1, max_episode_steps=200))
        results = list(actor.results())
    assert [result.success for result in results] == [True]


def test_what_needs_torch_says_what_to_install(robot_pc: Topology, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"pip install 'manyhands\[serve\]'"):
        robot_pc.start("serve", ["serve", "--model", f"m={tmp_path}", "--address", "127.0.0.1:0"])
