"""One real system, one dashboard over it and one browser for all tests of the page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from deploy.local import Topology
from manyhands.actor.v1 import actor_pb2
from manyhands.learner.v1 import learner_pb2
from tests.browser.chromium import running_chromium
from tests.browser.peers import ScriptedActor, ScriptedLearner, serve_actor, serve_learner
from tests.support.system import DATASET, MODEL, ArmSystem, teleoperated_run

NUM_EPISODES = 2
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(kw_only=True)
class Lab:
    """Two arms, the first with an actor; store with recorded episodes, inference, weights; a scripted actor and learner.

    Attributes:
        url: Of the dashboard.
        ghost: Actor of a robot that has no agent of its own, so that the test alone decides what it says.
    """

    system: ArmSystem
    ghost: ScriptedActor
    learner: ScriptedLearner
    url: str

    @property
    def topology(self) -> Topology:
        return self.system.topology

    def restart(self, name: str) -> None:
        """The same command at the same address."""
        service = self.topology.services[name]
        command = list(service.command)
        command[command.index("--address") + 1] = service.address
        self.topology.start(name, command, wave=service.wave)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    ghost = ScriptedActor(
        actor_pb2.GetStatusResponse(
            robot_id="ghost",
            state=actor_pb2.RUN_STATE_RUNNING,
            run=actor_pb2.RunDefinition(run_id="g1", mode=actor_pb2.RUN_MODE_POLICY, episode_count=60),
            finished_episode_count=20,
            success_count=19,
        )
    )
    learner = ScriptedLearner(
        learner_pb2.GetStatusResponse(
            state=learner_pb2.RUN_STATE_TRAINING,
            run=learner_pb2.RunDefinition(run_id="run-1", recipe="flow-arm", dataset=DATASET, model=MODEL),
            step=200,
            max_steps=1000,
            worker_count=2,
        )
    )
    with Topology(folder / "logs", environment=ENVIRONMENT) as topology, serve_actor(ghost) as ghost_server, serve_learner(
        learner
    ) as learner_server:  # fmt: skip
        system = ArmSystem(topology, folder)
        start_system(system, folder)
        command = ["dashboard", "--address", "127.0.0.1:0"]
        for index in range(2):
            command += ["--robot", f"robot-{index}={system.address(f'robot-{index}')}"]
        command += [
            "--actor",
            system.address("actor-0"),
            "--actor",
            ghost_server.address,
            "--learner",
            learner_server.address,
        ]
        for flag in ("inference", "weights", "store"):
            command += [f"--{flag}", system.address(flag)]
        dashboard = topology.start("dashboard", command, wave=3)
        yield Lab(system=system, ghost=ghost, learner=learner, url=f"http://{dashboard.address}/")


def start_system(system: ArmSystem, folder: Path) -> None:
    topology = system.topology
    system.start_robot(0)
    system.start_robot(1)
    system.make_checkpoint(system.spec())
    weights = topology.start("weights", ["weights", "--root", str(folder / "weights"), "--address", "127.0.0.1:0"])
    serve = ["serve", "--model", f"{MODEL}={system.checkpoint}", "--address", "127.0.0.1:0", "--weights", weights.address]
    topology.launch("inference", serve, wave=1)
    system.start_store()
    topology.wait_ready("inference")
    system.start_actor(0)
    with system.store() as store:
        store.create_dataset(DATASET, system.spec())
    with system.actor(0) as actor:
        actor.start_run(teleoperated_run(episode_count=NUM_EPISODES, max_episode_steps=60))
        assert len(list(actor.results())) == NUM_EPISODES
    assert len(system.published()) == NUM_EPISODES


# While playwright runs, this thread counts as inside its event loop, where no asyncio test can run: not for the session.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, lab: Lab) -> Iterator[Page]:
    """The dashboard, open and live; a script error or a request to anywhere else fails the test."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(15_000)
    expect.set_options(timeout=15_000)  # It has one of its own.
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.on("request", lambda request: problems.append(f"asks {request.url}") if foreign(request.url, lab.url) else None)
    page.goto(lab.url)
    page.wait_for_selector("#link[data-state=live]")
    yield page
    context.close()
    assert problems == []


def foreign(url: str, home: str) -> bool:
    return not url.startswith((home, home.replace("http", "ws", 1), "data:", "blob:"))
