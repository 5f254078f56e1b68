"""A small but real system for fault tests: store, inference service, simulated arms and their actors, each a process."""

from __future__ import annotations

import uuid
from pathlib import Path

from deploy.local import Topology
from manyhands.actor.v1 import actor_pb2
from manyhands.clients.actor import ActorClient
from manyhands.clients.dataset import DatasetClient
from manyhands.clients.robot import RobotClient, RobotMode
from manyhands.dataset.v1 import dataset_pb2
from manyhands.spec import Spec

from .waiting import wait_until

MODEL = "arm"
DATASET = "arm"


class ArmSystem:
    """Processes by name: "store", "inference", "robot-N", "actor-N". Every one can be killed and started again in place."""

    def __init__(self, topology: Topology, folder: Path) -> None:
        self.topology = topology
        self.folder = folder
        self.checkpoint = folder / "checkpoint"

    # -- starting ------------------------------------------------------------------------------------------------------

    def start_robot(self, index: int, *, robot_id: str = "") -> str:
        name = f"robot-{index}"
        command = ["robot", "--robot", "arm", "--robot-id", robot_id or name, "--state-dir", str(self.folder / name)]
        return self.topology.start(name, [*command, "--address", self._address(name)], wave=1).address

    def start_store(self) -> str:
        root = str(self.folder / "store")
        return self.topology.start("store", ["store", "--root", root, "--address", self._address("store")]).address

    def start_inference(self) -> str:
        command = ["serve", "--model", f"{MODEL}={self.checkpoint}", "--address", self._address("inference")]
        return self.topology.start("inference", command, wave=1).address

    def start_actor(self, index: int, *flags: str, inference: str = "", robot: str = "") -> str:
        name = f"actor-{index}"
        command = ["actor", "--robot", robot or self.address(f"robot-{index}"), "--address", self._address(name)]
        command += ["--spool", str(self.folder / f"spool-{index}"), *flags]
        if "store" in self.topology.services:
            command += ["--store", self.address("store")]
        if inference or "inference" in self.topology.services:
            command += ["--inference", inference or self.address("inference")]
        return self.topology.start(name, command, wave=2).address

    def start(self, num_robots: int) -> None:
        for index in range(num_robots):
            self.start_robot(index)
        self.make_checkpoint(self.spec())
        self.start_store()
        self.start_inference()
        for index in range(num_robots):
            self.start_actor(index)
        with self.store() as store:
            store.create_dataset(DATASET, self.spec())

    def make_checkpoint(self, spec: Spec) -> None:
        """An untrained policy of that spec."""
        import torch

        from policies import checkpoint

        torch.manual_seed(0)
        config = {"cameras": [camera.name for camera in spec.images], "width": 64}
        checkpoint.save(checkpoint.build("flow", config, spec), self.checkpoint)

    # -- looking -------------------------------------------------------------------------------------------------------

    def address(self, name: str) -> str:
        return self.topology.services[name].address

    def spec(self) -> Spec:
        with RobotClient(self.address("robot-0")) as robot:
            return robot.describe().spec

    def store(self) -> DatasetClient:
        return DatasetClient(self.address("store"))

    def actor(self, index: int) -> ActorClient:
        return ActorClient(self.address(f"actor-{index}"))

    def robot_mode(self, index: int) -> RobotMode:
        with RobotClient(self.address(f"robot-{index}")) as robot:
            return robot.describe().status.mode

    def wait_for_mode(self, index: int, mode: RobotMode, timeout_s: float = 15.0) -> None:
        wait_until(lambda: self.robot_mode(index) is mode, timeout_s, f"robot {index} is {mode.name}")

    def wait_for_source(self, index: int, source: dataset_pb2.ActionSource.ValueType, timeout_s: float = 20.0) -> None:
        """Until a tick whose action came from that source is seen."""

        def seen() -> bool:
            with self.actor(index) as actor:
                for event in actor.watch(max_tick_rate_hz=20):
                    if event.WhichOneof("event") == "tick":
                        return event.tick.source == source
            return False

        wait_until(seen, timeout_s, f"actor {index} acts by {dataset_pb2.ActionSource.Name(source)}")

    def published(self) -> list[dataset_pb2.Episode]:
        with self.store() as store:
            store.publish(DATASET)
            return list(store.list_episodes(DATASET))

    def verify_dataset(self) -> None:
        with self.store() as store:
            root = store.get_dataset(DATASET).root_path
        self.topology.run("verify", ["dataset", "verify", root])

    def _address(self, name: str) -> str:
        """Where it listened before, so that peers find a restarted process again; a free port the first time."""
        service = self.topology.services.get(name)
        return service.address if service is not None and service.address else "127.0.0.1:0"


def policy_run(**fields: object) -> actor_pb2.RunDefinition:
    """Until stopped, recorded, replanning every 8 ticks."""
    defaults = {
        "run_id": uuid.uuid4().hex,
        "mode": actor_pb2.RUN_MODE_POLICY,
        "model": MODEL,
        "replan_interval_steps": 8,
        "max_episode_steps": 100_000,
        "dataset": DATASET,
    }
    return actor_pb2.RunDefinition(**{**defaults, **fields})


def teleoperated_run(**fields: object) -> actor_pb2.RunDefinition:
    defaults = {
        "run_id": uuid.uuid4().hex,
        "mode": actor_pb2.RUN_MODE_TELEOPERATE,
        "teleoperator": "expert",
        "max_episode_steps": 200,
        "dataset": DATASET,
    }
    return actor_pb2.RunDefinition(**{**defaults, **fields})
