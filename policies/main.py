"""manyhands policy: make an untrained checkpoint for a robot or a dataset, look into one, exchange it with lerobot.

manyhands policy init --type flow --robot 127.0.0.1:50061 --output untrained
manyhands policy inspect untrained
manyhands policy convert pi05_base --tokenizer paligemma --robot 127.0.0.1:50061 --output mine
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from manyhands import config
from manyhands.errors import InvalidInput, NotOffered
from manyhands.knobs import POSITIONAL
from manyhands.security import SecuritySettings
from manyhands.spec import Spec

from . import checkpoint, inspection, lerobot_folder, loading
from . import files as policy_files
from .policy import Policy
from .registry import POLICIES


class Settings(config.Settings):
    """Makes, inspects and converts policy checkpoints."""

    examples: ClassVar[tuple[str, ...]] = (
        "init --type flow --robot 127.0.0.1:50061 --output untrained",
        "init --type flow --dataset demo --store 127.0.0.1:50051 --output untrained",
        'inspect untrained --task "open the drawer"',
        "convert pi05_base --tokenizer paligemma --output mine",
        "convert mine --to lerobot --output for_lerobot",
    )

    action: Annotated[Literal["init", "inspect", "convert"], POSITIONAL] = Field(
        description="init makes a checkpoint, inspect shows one, convert exchanges one with lerobot"
    )
    folder: Annotated[Path | None, POSITIONAL] = Field(None, description="inspect, convert: the checkpoint")
    type: str = Field("flow", description=f"init: one of {', '.join(sorted(POLICIES))}")
    output: Path | None = Field(None, description="init, convert: folder to write; one with a checkpoint is replaced")
    robot: str = Field("", description="init, convert: host:port of a robot agent whose spec the policy is for")
    dataset: str = Field("", description="init, convert: a dataset of the store whose spec the policy is for")
    store: str = Field("127.0.0.1:50051", description="with --dataset: host:port of the store")
    spec: Path | None = Field(None, description="init, convert: a JSON file with the spec, as in a checkpoint's config.json")
    policy_config: dict[str, Any] = Field(
        default_factory=dict, description="init: KEY=VALUE of the policy's own configuration, values as JSON"
    )
    seed: int = Field(0, description="init: of the fresh weights")
    files: Path | None = Field(
        None, description="init: folder with the policy's tokenizers and recipe, under the names a checkpoint has for them"
    )
    task: str = Field("open the drawer", description="inspect: the instruction in the prompts that are shown")
    annotations: Path | None = Field(
        None, description="inspect: JSON file with language rows, {persistent: [...], events: [...]}, of the shown prompt"
    )
    to: Literal["manyhands", "lerobot"] = Field("manyhands", description="convert: whose form is written")
    tokenizer: Path | None = Field(None, description="convert: folder with tokenizer.json, where the checkpoint has none")
    action_tokenizer: Path | None = Field(None, description="convert: folder of the FAST tokenizer, likewise")
    recipe: Path | None = Field(None, description="convert: recipe file, likewise")
    control_rate_hz: float = Field(
        30.0, gt=0, description="convert: of the robot, where neither --robot, --dataset nor --spec says it"
    )
    security: SecuritySettings = SecuritySettings()


def main(settings: Settings) -> int:
    {"init": init, "inspect": inspect, "convert": convert}[settings.action](settings)
    return 0


def init(settings: Settings) -> None:
    """Writes a checkpoint with fresh weights and no statistics."""
    if settings.output is None:
        raise InvalidInput("is required for init: the folder to write", field="output")
    spec = _spec(settings)
    torch.manual_seed(settings.seed)
    config = {key: _value(value) for key, value in settings.policy_config.items()}
    files = policy_files.read(settings.files) if settings.files is not None else {}
    if settings.files is not None and not files:
        raise InvalidInput(f"{settings.files} has none of {', '.join(policy_files.NAMES)}", field="files")
    policy = checkpoint.build(settings.type, config, spec, files)
    checkpoint.save(policy, settings.output)
    Console().print(f"{settings.output}: untrained {settings.type} policy, {_num_parameters(policy):,} parameters")


def inspect(settings: Settings) -> None:
    """Loads the checkpoint, with all its checks, and shows what it is."""
    policy = loading.load(_folder(settings))
    console = Console()
    spec = policy.spec
    console.print(f"{settings.folder}: type {policy.type_name}, {_num_parameters(policy):,} parameters")
    console.print(f"chunks of {policy.horizon}, {spec.control_rate_hz:g} Hz, {spec.robot_type}, {spec.digest.hex()[:16]}")
    console.print(_features(policy))
    console.print(_parts(policy))
    memory = inspection.memory(policy)
    console.print(
        f"memory to serve: {_size(memory.weights)} of weights and {_size(memory.per_robot)} for each robot in a pass; "
        f"to train: {_size(memory.training)} (float32 with AdamW and averaged weights); activations not counted"
    )
    for use, text in _prompts(policy, settings).items():
        console.print(f"prompt, {use}:", style="bold")
        console.print(text, markup=False, highlight=False)
    console.print_json(json.dumps(policy.config_dict()))


def convert(settings: Settings) -> None:
    """Writes the checkpoint in the other form."""
    folder = _folder(settings)
    if settings.output is None:
        raise InvalidInput("is required for convert: the folder to write", field="output")
    console = Console()
    if lerobot_folder.is_one(folder):
        spec = _spec(settings) if _spec_sources(settings) else None
        imported = lerobot_folder.read(
            folder,
            spec=spec,
            control_rate_hz=settings.control_rate_hz,
            tokenizer=settings.tokenizer,
            action_tokenizer=settings.action_tokenizer,
            recipe=settings.recipe,
        )
        policy = imported.policy
        for note in imported.notes:
            console.print(f"note: {note}")
    else:
        for name in ("robot", "dataset", "spec", "tokenizer", "action_tokenizer", "recipe"):
            if getattr(settings, name):
                raise InvalidInput(f"is for folders of lerobot's; {folder} is ours and keeps its own", field=name)
        policy = loading.load(folder)
    if settings.to == "lerobot":
        lerobot_folder.write(policy, settings.output)
    else:
        checkpoint.save(policy, settings.output)
    console.print(f"{settings.output}: {policy.type_name} for {settings.to}, {_num_parameters(policy):,} parameters")


def _folder(settings: Settings) -> Path:
    if settings.folder is None:
        raise InvalidInput(f"is required for {settings.action}: the checkpoint", field="folder")
    return settings.folder


def _features(policy: Policy[Any]) -> Table:
    table = Table("feature", "kind", "shape", "read")
    used = policy.used_observations()
    for feature in policy.spec.observation + policy.spec.action:
        is_read = "-" if feature in policy.spec.action else ("yes" if feature.name in used else "no")
        table.add_row(feature.name, feature.kind.name.lower(), "x".join(map(str, feature.shape)), is_read)
    return table


def _parts(policy: Policy[Any]) -> Table:
    table = Table("part", "parameters", "trained", "in memory", "precision")
    for part in inspection.parts(policy):
        table.add_row(part.name, f"{part.parameters:,}", f"{part.trained:,}", _size(part.num_bytes), ", ".join(part.dtypes))
    return table


def _prompts(policy: Policy[Any], settings: Settings) -> Mapping[str, str]:
    annotations = None
    if settings.annotations is not None:
        annotations = _read_json(settings.annotations, field="annotations")
    try:
        return policy.shown_prompts(inspection.example_sample(policy, task=settings.task, annotations=annotations))
    except NotOffered as missing:
        return {"none": str(missing)}


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"


def _spec(settings: Settings) -> Spec:
    given = _spec_sources(settings)
    if len(given) != 1:
        raise InvalidInput(
            f"{settings.action} takes one of --robot, --dataset and --spec; got {', '.join(given) or 'none'}", field="spec"
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
    return checkpoint.spec_from_json(_read_json(settings.spec, field="spec"))


def _spec_sources(settings: Settings) -> list[str]:
    return [name for name in ("robot", "dataset", "spec") if getattr(settings, name)]


def _read_json(path: Path, *, field: str) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{path} cannot be read: {error}", field=field) from None


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
