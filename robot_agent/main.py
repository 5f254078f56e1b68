"""One robot's agent: opens its devices, listens for one actor and many viewers, and judges every command.

An emergency stop stays latched, also over restarts, until somebody at the robot runs this command with --clear-stop and the
same --state-dir.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

from pydantic import Field

from manyhands import config, ports
from manyhands.errors import InvalidInput, Refused
from manyhands.metrics import serve_metrics
from manyhands.robot.v1 import robot_pb2, robot_pb2_grpc
from manyhands.security import SecuritySettings
from manyhands.server import GrpcServer

from .agent import Agent
from .robots import registry
from .service import RobotService
from .state import StateDirectory

logger = logging.getLogger(__name__)


class Settings(config.Settings):
    """The agent that owns one robot."""

    robot: str = Field("arm", description=f"which robot: {', '.join(sorted(registry.ROBOTS))}")
    robot_id: str = Field("robot", description="its name, unique in the fleet")
    address: str = Field(f"127.0.0.1:{ports.FIRST_ROBOT}", description="host:port to listen on; port 0 takes a free one")
    state_dir: Path = Field(Path("robot-state"), description="remembers epochs and an emergency stop; one per robot")
    task: str | None = Field(None, description="the task of a simulated scene")
    rate_hz: float | None = Field(None, description="control periods per second; default: the robot's")
    image_size: int | None = Field(None, description="pixels, height and width of the cameras; default: the robot's")
    watchdog_s: float | None = Field(
        None, description="seconds without a command until the robot holds; default: the robot's"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further knobs of this robot, as image_size=96")
    required_devices: list[Path] = Field(
        default_factory=list, description="pedals and stops that must be there: without them the agent does not start"
    )
    clear_stop: bool = Field(False, description="clear a latched emergency stop in state_dir, then end; do it at the robot")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of the Prometheus page; 0 for none")
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    if settings.clear_stop:
        cleared = StateDirectory(settings.state_dir, lock=False).clear_stop()
        print("emergency stop cleared" if cleared else f"no emergency stop is latched in {settings.state_dir}")
        return 0
    serve_metrics(settings.metrics_port)
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    """The exit code: 0 after a signal, 1 when the robot's thread failed, so that a supervisor starts the agent again."""
    if not settings.robot_id:
        raise InvalidInput("must not be empty", field="robot_id")
    for path in settings.required_devices:
        if not path.exists():
            raise Refused(f"{path} is missing; plug it in, or take it out of required_devices", field="required_devices")
    common = {name: getattr(settings, name) for name in ("task", "rate_hz", "image_size", "watchdog_s")}
    options = {**settings.options, **{name: value for name, value in common.items() if value is not None}}
    robot = registry.create(settings.robot, options)
    failures: list[str] = []

    def fail() -> None:
        # In the robot's thread: ends the process the way a supervisor would.
        failures.append("the robot's thread failed")
        os.kill(os.getpid(), signal.SIGTERM)

    state = StateDirectory(settings.state_dir)
    try:
        server = GrpcServer(settings.address, security_settings=settings.security)
        agent = Agent(robot, state, required_devices=tuple(settings.required_devices), on_failure=fail)
        agent.start()
        try:
            service = RobotService(agent, settings.robot_id)
            server.add(
                robot_pb2_grpc.add_RobotServiceServicer_to_server,
                service,
                robot_pb2.DESCRIPTOR.services_by_name["RobotService"].full_name,
            )
            await server.run_until_signalled(drain=service.drain, grace_s=1.0)
        finally:
            await asyncio.to_thread(agent.close)
    finally:
        state.close()
    return 1 if failures else 0
