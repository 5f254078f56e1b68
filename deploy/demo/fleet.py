"""The demo's processes and how it speaks to them: each a `manyhands` command of its own, all over gRPC on loopback."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from manyhands.clients.actor import ActorClient
from manyhands.clients.dataset import DatasetClient
from manyhands.clients.inference import InferenceClient
from manyhands.clients.learner import LearnerClient
from manyhands.clients.robot import RobotClient
from manyhands.errors import Refused

from ..local import Topology

MODEL = "demo"
RECIPE = "flow_metaworld"
_ANY_PORT = "127.0.0.1:0"
# Demonstrations that never err never show the way back, and ones that end at success never show how to stay: without these
# two, ten episodes of reach are worth about 60 % in closed loop instead of 90 (docs/design/0010-policy-interface.md).
_EXPERT_OPTIONS = {"expert_noise": 0.3, "settle_ticks": 10}


@dataclass(frozen=True, kw_only=True)
class RobotPlan:
    """A robot of the demo.

    Attributes:
        name: In the fleet.
        scene: The Meta-World task it stands in front of.
        recording_factor: Episodes it records for each one asked for.
    """

    name: str
    scene: str
    recording_factor: int = 1


ROBOTS = (
    # Its goal is anywhere in a box and its episodes take half the time: twice as many in the same minute.
    RobotPlan(name="left", scene="reach", recording_factor=2),
    RobotPlan(name="middle", scene="drawer-open"),
    RobotPlan(name="right", scene="button-press-topdown"),
)


class Fleet:
    """Starts everything and keeps the clients; close() closes the clients, the topology ends the processes."""

    def __init__(self, output: Path, topology: Topology, *, dashboard_address: str) -> None:
        self.output = output
        self.topology = topology
        self.robots = ROBOTS
        self.actors: dict[str, ActorClient] = {}
        self._dashboard_address = _free_or_refuse(dashboard_address)

    def start(self, console: Console) -> None:
        """Launches in the order of need; what does not depend on another starts beside it."""
        topology, output = self.topology, self.output
        with console.status("store, weights service, learner (Ray takes a few seconds), robots"):
            topology.launch("store", ["store", "--root", str(output / "store"), "--address", _ANY_PORT])
            topology.launch("weights", ["weights", "--root", str(output / "weights"), "--address", _ANY_PORT])
            for robot in self.robots:
                topology.launch(f"robot-{robot.name}", self._robot_command(robot), wave=1)
            store, weights = (topology.wait_ready(name).address for name in ("store", "weights"))
            learner_command = ["learner", "--address", _ANY_PORT, "--store", store, "--weights", weights]
            topology.launch("learner", [*learner_command, "--output", str(output / "learner")], wave=1)
            robots = {robot.name: topology.wait_ready(f"robot-{robot.name}", timeout_s=90).address for robot in self.robots}
        with console.status("an untrained policy, the inference service"):
            self._make_untrained_policy(next(iter(robots.values())))
            serve_command = ["serve", "--address", _ANY_PORT, "--model", f"{MODEL}={self.untrained_path}"]
            inference = topology.start("inference", [*serve_command, "--weights", weights, "--follow"], wave=1).address
        with console.status("actors, dashboard"):
            for robot in self.robots:
                command = ["actor", "--address", _ANY_PORT, "--robot", robots[robot.name], "--inference", inference]
                command += ["--store", store, "--spool", str(output / "spool" / robot.name)]
                topology.launch(f"actor-{robot.name}", command, wave=2)
            actors = {robot.name: topology.wait_ready(f"actor-{robot.name}").address for robot in self.robots}
            learner = topology.wait_ready("learner", timeout_s=120).address
            command = ["dashboard", "--address", self._dashboard_address, "--inference", inference, "--weights", weights]
            command += ["--learner", learner, "--store", store]
            for address in actors.values():
                command += ["--actor", address]
            dashboard = topology.start("dashboard", command, wave=3).address
        self.store = DatasetClient(store)
        self.inference = InferenceClient(inference)
        self.learner = LearnerClient(learner)
        self.actors = {name: ActorClient(address) for name, address in actors.items()}
        console.print(f"Everything runs. Watch it at http://{dashboard}/", style="bold")

    def create_datasets(self, *names: str) -> None:
        with RobotClient(self.topology.services[f"robot-{self.robots[0].name}"].address) as robot:
            spec = robot.describe().spec
        for name in names:
            self.store.create_dataset(name, spec)

    @property
    def untrained_path(self) -> Path:
        return self.output / "untrained"

    def checkpoint_path(self) -> Path:
        return Path(self.learner.status().checkpoint_path)

    def close(self) -> None:
        for actor in self.actors.values():
            actor.close()
        self.learner.close()
        self.inference.close()
        self.store.close()

    def _robot_command(self, robot: RobotPlan) -> list[str]:
        command = ["robot", "--robot", "metaworld", "--task", robot.scene, "--robot-id", robot.name]
        for name, value in _EXPERT_OPTIONS.items():
            command += ["--options", f"{name}={value}"]
        return [*command, "--address", _ANY_PORT, "--state-dir", str(self.output / "robots" / robot.name)]

    def _make_untrained_policy(self, robot_address: str) -> None:
        self.topology.run(
            "policy-init",
            ["policy", "init", "--type", "flow", "--robot", robot_address, "--output", str(self.untrained_path)],
        )


def _free_or_refuse(address: str) -> str:
    """Finds out before five minutes of work whether the page can be shown."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, int(port)))
        except OSError as error:
            raise Refused(
                f"the dashboard cannot listen on {address} ({error.strerror}); name another with --dashboard-address, "
                "port 0 takes a free one",
                field="dashboard_address",
            ) from None
    return address
