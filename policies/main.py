"""manyhands policy: make an untrained checkpoint for a robot or a dataset, look into one.

manyhands policy init --type flow --robot 127.0.0.1:50061 --output untrained
manyhands policy inspect untrained
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from manyhands import config
from manyhands.errors import InvalidInput
from manyhands.knobs import POSITIONAL
from manyhands.security import SecuritySettings
from manyhands.spec import Spec

from . import checkpoint
from .registry import POLICIES


class Settings(config.Settings):
    """Makes and inspects policy checkpoints."""

    examples: ClassVar[tuple[str, ...]] = (
        "init --type flow --robot 127.0.0.1:50061 --output untrained",
        "init --type flow --dataset demo --store 127.0.0.1:50051 --output untrained",
        "inspect untrained",
    )

    action: Annotated[Literal["init", "inspect"], POSITIONAL] = Field(
        description="init makes a checkpoint, inspect shows one"
    )
    folder: Annotated[Path | None, POSITIONAL] = Field(None, description="inspect: the checkpoint")
    type: str = Field("flow", description=f"init: one of {', '.join(sorted(POLICIES))}")
    output: Path | None = Field(None, description="init: folder to write")
    robot: str = Field("", description="init: host:port of a robot agent whose spec the policy is for")
    dataset: str = Field("", description="init: a dataset of the store whose spec the policy is for")
    store: str = Field("127.0.0.1:50051", description="init with --dataset: host:port of the store")
    spec: Path | None = Field(None, description="init: a JSON file with the spec, as in a checkpoint's config.json")
    policy_config: dict[str, Any] = Field(
        default_factory=dict, description="init: KEY=VALUE of the policy's own configuration, values as JSON"
    )
    seed: int = Field(0, description="init: of the fresh weights")
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    if settings.action == "init":
        init(settings)
    else:
        inspect(settings)
    return 0


def init(settings: Settings) -> None:
    """Writes a checkpoint with fresh weights and no statistics."""
    if settings.output is None:
        raise InvalidInput("is required for init: the folder to write", field="output")
    spec = _spec(settings)
    torch.manual_seed(settings.seed)
    policy = checkpoint.build(settings.type, {key: _value(value) for key, value in settings.policy_config.items()}, spec)
    checkpoint.save(policy, settings.output)
    Console().print(f"{settings.output}: untrained {settings.type} policy, {_num_parameters(policy):,} parameters")


def inspect(settings: Settings) -> None:
    """Loads the checkpoint, with all its checks, and shows what it is."""
    if settings.folder is None:
        raise InvalidInput("is required for inspect: the checkpoint's folder", field="folder")
    policy = checkpoint.load(settings.folder)
    console = Console()
    spec = policy.spec
    console.print(f"{settings.folder}: type {policy.type_name}, {_num_parameters(policy):,} parameters")
    console.print(f"chunks of {policy.horizon}, {spec.control_rate_hz:g} Hz, {spec.robot_type}, {spec.digest.hex()[:16]}")
    table = Table("feature", "kind", "shape", "read")
    used = policy.used_observations()
    for feature in spec.observation + spec.action:
        is_read = "-" if feature in spec.action else ("yes" if feature.name in used else "no")
        table.add_row(feature.name, feature.kind.name.lower(), "x".join(map(str, feature.shape)), is_read)
    console.print(table)
    console.print_json(json.dumps(policy.config_dict()))


def _spec(settings: Settings) -> Spec:
    given = [name for name in ("robot", "dataset", "spec") if getattr(settings, name)]
    if len(given) != 1:
        raise InvalidInput(
            f"init takes one of --robot, --dataset and --spec; got {', '.join(given) or 'none'}", field="spec"
        )
    if settings.robot:
        from manyhands.clients.robot import RobotClient

        with RobotClient(settings.robot, security_settings=settings.security) as robot:
            return robot.describe().spec
    if settings.dataset:
        from manyhands.clients.dataset import DatasetClient

        with DatasetClient(settings.store, security_settings=settings.security) as store:
            return Spec.from_proto(store.get_dataset(settings.dataset).definition.spec)
    assert settings.spec is not None
    try:
        return checkpoint.spec_from_json(json.loads(settings.spec.read_text()))
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(f"{settings.spec} cannot be read: {error}", field="spec") from None


def _value(text: Any) -> Any:
    """KEY=VALUE flags come as text: JSON where it is, else the text itself."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _num_parameters(policy: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in policy.parameters())
