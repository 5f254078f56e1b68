"""One Ray Train worker: reads what the run folder says, trains its share, writes points and versions from rank 0."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from manyhands.clients.weights import WeightsClient
from manyhands.common.v1 import common_pb2
from manyhands.security import SecuritySettings
from policies import checkpoint as policy_checkpoint
from policies.policy import Policy

from .data import Batches
from .progress import Point, ProgressWriter
from .publishing import BackgroundPublisher, Version
from .ranks import Ranks
from .recipe import Recipe
from .run_folder import RunFolder
from .starting import Places, start
from .train import Hooks, Metrics, train

logger = logging.getLogger(__name__)

# The stop file is looked for this often, not before every step.
_STOP_CHECK_S = 0.1
_LAST_PUBLISH_TIMEOUT_S = 15.0


def run_worker(config: Mapping[str, Any]) -> None:
    """Ray Train's entry: config {"folder": run folder, "weights": address or "", "security": JSON, "threads": int,
    "checkpoints" and "cache": folders, see Places}."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    context = ray_train.get_context()
    torch.set_num_threads(config["threads"])
    run(
        RunFolder(Path(config["folder"])),
        Ranks(rank=context.get_world_rank(), world_size=context.get_world_size(), device=get_device()),
        Places(checkpoints=Path(config["checkpoints"]), cache=Path(config["cache"])),
        weights_address=config["weights"],
        security=SecuritySettings.model_validate_json(config["security"]),
    )


def run(
    folder: RunFolder, ranks: Ranks, places: Places, *, weights_address: str, security: SecuritySettings | None = None
) -> None:
    """Trains the run in folder to its end, from its newest checkpoint."""
    definition = folder.read_definition()
    assert definition is not None, f"{folder.path} has no run.json"
    recipe = Recipe.from_json(definition["recipe"])
    seed = int(definition["seed"])
    torch.manual_seed(seed)  # Every rank draws the same first weights.
    begun = start(Path(definition["snapshot"]), recipe, folder, ranks, places)
    policy = begun.policy
    batches = Batches(begun.demonstrations, policy, max_cached_bytes=recipe.max_cached_bytes)

    writer = ProgressWriter(folder.progress_path)
    for note in begun.notes if ranks.is_first else ():
        writer.write(Point(kind="note", step=0, note=note))
    publisher = None
    if ranks.is_first and weights_address:
        publisher = _publisher(definition, writer, weights_address, security)
    try:
        hooks = _hooks(folder, policy, writer, publisher)
        train(
            recipe=recipe,
            seed=seed,
            max_steps=int(definition["max_steps"]),
            max_duration_s=float(definition["max_duration_s"]),
            policy=policy,
            batches=batches,
            num_frames=begun.demonstrations.num_frames,
            ranks=ranks,
            folder=folder,
            hooks=hooks,
        )
        if publisher is not None and not publisher.close(_LAST_PUBLISH_TIMEOUT_S):
            step = folder.checkpoint_steps()[-1]
            writer.write(
                Point(kind="note", step=step, note="the last version is not published: the weights service is away")
            )
    finally:
        batches.close()
        writer.close()


def _hooks(folder: RunFolder, policy: Policy[Any], writer: ProgressWriter, publisher: BackgroundPublisher | None) -> Hooks:
    next_check_s = 0.0

    def should_stop() -> bool:
        nonlocal next_check_s
        if time.monotonic() < next_check_s:
            return False
        next_check_s = time.monotonic() + _STOP_CHECK_S
        return folder.stop_path.exists()

    def saved(step: int, averaged: dict[str, torch.Tensor], metrics: Metrics) -> None:
        if publisher is not None:
            publisher.offer(_version(step, policy, averaged, metrics))

    return Hooks(
        started=lambda step: writer.write(Point(kind="started", step=step, note=f"process {os.getpid()}")),
        report=lambda step, metrics: writer.write(Point(kind="metrics", step=step, metrics=metrics)),
        saved=saved,
        should_stop=should_stop,
    )


def _version(step: int, policy: Policy[Any], averaged: dict[str, torch.Tensor], metrics: Metrics) -> Version:
    return Version(
        step=step,
        policy_type=policy.type_name,
        config_json=policy_checkpoint.config_json(policy),
        spec=policy.spec,
        tensors=policy_checkpoint.to_wire(averaged),
        metrics=metrics,
    )


def _publisher(
    definition: Mapping[str, Any], writer: ProgressWriter, address: str, security: SecuritySettings | None
) -> BackgroundPublisher:
    client = WeightsClient(address, security_settings=security, patience_s=0.0)
    # A run that is resumed may reach a step with other weights, when time bounds it: the id says which start it was.
    start = f"{definition['run_id']}/{os.getpid()}-{time.time_ns():x}"

    def publish(version: Version) -> common_pb2.PolicyVersion:
        return client.publish(
            model=definition["model"],
            policy_type=version.policy_type,
            config_json=version.config_json,
            spec=version.spec,
            tensors=version.tensors,
            publish_id=f"{start}/{version.step}",
            metrics=version.metrics,
        )

    def published(version: Version, answer: common_pb2.PolicyVersion) -> None:
        metrics = {"publish/step": float(version.step)}
        writer.write(
            Point(kind="published", step=version.step, metrics=metrics, number=answer.number, digest=answer.digest.hex())
        )

    def failed(version: Version, message: str) -> None:
        logger.warning("%s", message)
        writer.write(Point(kind="note", step=version.step, note=message))

    return BackgroundPublisher(publish, published=published, failed=failed)
